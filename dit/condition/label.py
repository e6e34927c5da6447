"""A class label."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.condition.condition import Condition


class Label(Condition):
    """`cond = {"label": (B,)}`, 0..num_classes - 1; the label num_classes means none.

    Args:
        num_classes: number of classes.
        dropout: probability that a training sample is told no class, for classifier-free guidance (arXiv:2207.12598).

    Raises:
        ValueError: if dropout is outside [0, 1], or num_classes is not positive.
    """

    def __init__(self, num_classes: int, dropout: float = 0.1):
        if num_classes < 1:
            raise ValueError(f"condition.num_classes={num_classes} must be at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"condition.dropout={dropout} is a probability: it must lie in [0, 1]")
        self.num_classes = num_classes
        self.dropout = dropout

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch's field `label`, checked.

        Raises:
            ValueError: if a label is not a class.
        """
        label = torch.as_tensor(batch["label"])
        if not label.is_cuda and label.numel() and not (label.min() >= 0 and label.max() < self.num_classes):
            raise ValueError(
                f"labels must be whole numbers from 0 to {self.num_classes - 1}, got {label.min()} to {label.max()}"
            )
        return {"label": label.long()}

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """No class for anyone.

        Raises:
            ValueError: if the network never learns what that means.
        """
        if self.dropout == 0:
            raise ValueError(
                "condition.dropout=0: what the network says without a class is not learned, so that it cannot guide; "
                "take guidance.scale=1, or train with condition.dropout=0.1"
            )
        return {name: torch.full_like(label, self.num_classes) for name, label in cond.items()}

    def drop(self, cond: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
        """No class where u < dropout."""
        return {"label": torch.where(u < self.dropout, self.num_classes, cond["label"])}
