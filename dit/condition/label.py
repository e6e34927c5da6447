"""A class label."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.condition.condition import Condition, Encode, check_dropout, check_learned


class Label(Condition):
    """`cond = {"label": (B,)}`, 0..num_classes - 1; the label num_classes means none.

    Args:
        num_classes: number of classes.
        dropout: probability that a training sample is told no class, for classifier-free guidance (arXiv:2207.12598).

    Raises:
        ValueError: if dropout is outside [0, 1], or num_classes is not positive.
    """

    fields = ("label",)
    asks = ("label",)

    def __init__(self, num_classes: int, dropout: float = 0.1):
        if num_classes < 1:
            raise ValueError(f"condition.num_classes={num_classes} must be at least 1")
        self.num_classes = num_classes
        self.dropout = check_dropout(dropout)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of classes."""
        return {"num_classes": self.num_classes}

    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """The field `label`, checked.

        Raises:
            ValueError: if a label is not a class.
        """
        try:
            label = torch.as_tensor(asked["label"])
            whole = label.ndim == 1 and not label.is_floating_point() and label.dtype != torch.bool
        except (TypeError, ValueError, RuntimeError):  # as torch rejects texts, or nothing
            whole = False
        if not whole or (not label.is_cuda and not ((label >= 0) & (label < self.num_classes)).all()):
            raise ValueError(
                f"label={_said(asked['label'])}: give whole numbers from 0 to {self.num_classes - 1}, like label=[0, 1]"
            )
        return {"label": label.long().to(draw.device)}

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """No class for anyone.

        Raises:
            ValueError: if the network never learns what that means.
        """
        check_learned(self.dropout)
        none = self.num_classes
        return {name: torch.full_like(value, none) if name == "label" else value for name, value in cond.items()}

    def augment(self, cond: Mapping[str, Tensor], draw: Any) -> dict[str, Tensor]:
        """No class for a share `dropout` of the rows."""
        dropped = draw.uniform("drop") < self.dropout
        return {**cond, "label": torch.where(dropped, self.num_classes, cond["label"])}


def _said(label: Any) -> str:
    text = str(label.tolist() if isinstance(label, torch.Tensor) else label)
    return text if len(text) < 120 else text[:117] + "..."
