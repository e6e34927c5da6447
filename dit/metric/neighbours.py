"""Improved precision and recall: is an image within the manifold of the others?"""

import torch
from torch import Tensor

from dit.metric.seen import Seen

CHUNK = 4096  # rows at a time


def prec_recall(samples: Seen, reference: Seen, *, num_neighbours: int = 3) -> dict[str, float]:
    """Improved precision and recall (arXiv:1904.06991).

    An image lies in a manifold if it is no farther from one of its images than that one's k-th neighbour there is.

    Args:
        samples: with rows `pool` (N, D).
        reference: the same, (M, D); published figures have 10,000.
        num_neighbours: k.

    Returns:
        `precision`, the share of samples in the manifold of the reference, and `recall`, that of the reference in the
        manifold of the samples.

    Raises:
        ValueError: if there are no more images than neighbours.
    """
    x, y = samples.rows("pool"), reference.rows("pool")
    if num_neighbours >= min(len(x), len(y)):
        raise ValueError(f"precision and recall need more than {num_neighbours} images, not {len(x)} and {len(y)}")
    return {"precision": _inside(x, y, num_neighbours), "recall": _inside(y, x, num_neighbours)}


prec_recall.rows = ("pool",)  # type: ignore[attr-defined]


def _inside(images: Tensor, manifold: Tensor, k: int) -> float:
    """The share of images that lie in a manifold."""
    # The nearest is the image itself.
    radii = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(CHUNK)])
    inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in images.split(CHUNK)]
    return torch.cat(inside).float().mean().item()
