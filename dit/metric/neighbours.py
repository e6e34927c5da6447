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
    check_neighbours(min(len(x), len(y)), num_neighbours)
    return {"precision": _inside(x, y, num_neighbours), "recall": _inside(y, x, num_neighbours)}


def check_neighbours(num_images: int, num_neighbours: int = 3) -> None:
    """See whether images have so many neighbours.

    Raises:
        ValueError: if not.
    """
    if not 1 <= num_neighbours < num_images:
        raise ValueError(
            f"metric.prec_recall.figure.num_neighbours={num_neighbours} of {num_images} images: take at least 1, and "
            "more images"
        )


prec_recall.rows = ("pool",)  # type: ignore[attr-defined]
prec_recall.check = check_neighbours  # type: ignore[attr-defined]


def _inside(images: Tensor, manifold: Tensor, k: int) -> float:
    """The share of images that lie in a manifold."""
    # The nearest is the image itself.
    radii = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(CHUNK)])
    inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in images.split(CHUNK)]
    return torch.cat(inside).float().mean().item()
