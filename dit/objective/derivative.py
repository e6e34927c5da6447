"""The derivative of a network along a direction, without a gradient: exact, or by differences."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit.noise.denoiser import Denoiser

Derivative = Callable[[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]


def check_forward(denoiser: Denoiser, x: Tensor, cond: Mapping[str, Tensor]) -> None:
    """See, for `jvp`, that all of a network has a forward derivative.

    Args:
        denoiser: on the meta device, where nothing is computed.
        x: of the right size, there.
        cond: the same.

    Raises:
        ValueError: if something has none, such as a kernel of attention, with the way out.
    """
    t = torch.empty(len(x), device=x.device)
    try:
        jvp(lambda x, t: denoiser(x, t, **cond).eps, (x, t), (x, t))
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"objective/derivative=jvp: the network {type(denoiser.network).__name__} has no forward derivative "
            f"({' '.join(str(error).split())[:120]}): take objective/derivative=central"
        ) from error


def is_forward(derivative: object) -> bool:
    """Whether it is `jvp`."""
    return getattr(derivative, "func", derivative) is jvp


@torch.no_grad()
def jvp(function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """D f(at + h along) / dh at h = 0, by forward-mode differentiation.

    Attention is computed by plain matrix products meanwhile, as faster kernels have no forward derivative.
    """
    with sdpa_kernel(SDPBackend.MATH):
        derivative: Tensor = torch.func.jvp(function, tuple(at), tuple(along))[1]
    return derivative


@torch.no_grad()
def central(
    function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor], *, h: float = 5e-3
) -> Tensor:
    """(f(at + h along) - f(at - h along)) / (2 h): two plain passes, with any attention, sharding and compiler.

    Args:
        function: tensors -> tensor.
        at: its arguments.
        along: the direction, of the same shapes.
        h: in bfloat16 no less than 5e-3.

    Raises:
        ValueError: if h is not positive.
    """
    if not h > 0:
        raise ValueError(f"objective.derivative.h={h} must be positive, like 5e-3")
    ahead, behind = (function(*(x + sign * h * d for x, d in zip(at, along, strict=True))) for sign in (1, -1))
    return (ahead - behind) / (2 * h)
