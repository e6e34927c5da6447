"""The inception score: are classes clear, and all of them there?"""

import torch

from dit.metric.seen import Seen


def inception_score(samples: Seen, reference: Seen, *, split_size: int = 5000) -> dict[str, float]:
    """exp(mean KL(p(class | x) | p(class))) (arXiv:1606.03498), the mean over splits of the samples in their order.

    Args:
        samples: with rows `logits` (N, classes).
        reference: unused.
        split_size: samples of a split, as in the published evaluation of ADM; a last one that is shorter counts, too.

    Returns:
        `inception_score`, and `inception_score_std` over splits.
    """
    scores = []
    for logits in samples.rows("logits").double().split(split_size):
        log_p = logits.log_softmax(1)
        log_mean = log_p.exp().mean(0).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    found = torch.stack(scores)
    return {"inception_score": found.mean().item(), "inception_score_std": found.std(correction=0).item()}


inception_score.rows = ("logits",)  # type: ignore[attr-defined]
inception_score.reference_rows = ()  # type: ignore[attr-defined]
