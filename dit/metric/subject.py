"""What a metric is given to judge."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Samples = Mapping[str, Any]  # fields of N samples: `image`, uint8 (N, C, H, W), `label` (N,), arrays of others


class Subject(NamedTuple):
    """A trained model, as far as metrics look at it."""

    told: Callable[[Samples], dict[str, Tensor]]  # what the network is told of samples
    draw: Callable[..., Tensor]  # told that, uint8 images (N, C, H, W), as configured; `start`: the first one's number
    denoise: Any  # x_t (B, C, H, W), t (B,) or (), told -> (x0, eps); None of an autoencoder
    schedule: Any  # t -> (alpha, sigma); None of an autoencoder
    shape: tuple[int, ...]  # (C, H, W) of what the network sees
    restores: bool = False  # what is drawn of samples is their images anew
    fields: Sequence[str] = ()  # of samples, that say what it is told
    num_classes: int | None = None  # where it is told a class


def rows(samples: Samples, which: Any) -> dict[str, Any]:
    """Some of the samples, by a slice or numbers (N,)."""
    numbers = which.numpy() if isinstance(which, Tensor) else which  # a tensor of one number would take one element
    return {name: value[numbers] for name, value in samples.items()}


def check_given(metric: Any, fields: Sequence[str], pixels: bool) -> None:
    """See beforehand whether a metric is given what it reads: by its attributes `fields` and `pixels`, if it has them.

    Args:
        metric: a function, or one with some arguments set.
        fields: of samples, beside the image.
        pixels: whether the network sees images themselves.

    Raises:
        ValueError: if not, with the way out.
    """
    metric = getattr(metric, "func", metric)
    name = metric.__module__.rpartition(".")[2]
    if missing := [field for field in getattr(metric, "fields", ()) if field not in fields]:
        given = ",".join([*fields, *missing])
        raise ValueError(f"metric={name} reads {missing[0]}, which data.fields leaves out: data.fields=[{given}]")
    if getattr(metric, "pixels", False) and not pixels:
        raise ValueError(f"metric={name} is that of pixels: take latent=pixels, or another metric")


def check(metric: Any, subject: Subject) -> None:
    """See beforehand whether a metric can judge a subject: by its attribute `check`, if it has one.

    Raises:
        ValueError: if not, with the way out.
    """
    getattr(getattr(metric, "func", metric), "check", lambda subject: None)(subject)
