"""Plain denoising: regress the network's output on what its prediction says it is."""

from collections.abc import Callable, Iterator

from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.schedule import Schedule
from dit.objective.objective import Batch, Objective


class Denoising(Objective):
    """E |F(alpha x0 + sigma eps, t) - (a x0 + b eps)|^2, mean over all elements.

    With prediction eps this is DDPM's simple loss (arXiv:2006.11239, equation 14), with flow it is flow matching
    (arXiv:2210.02747), with edm EDM's weighted loss (arXiv:2206.00364, equation 8).

    Args:
        times: the density of t, (schedule, u) -> t, both (B,).
    """

    def __init__(self, times: Callable[[Schedule, Tensor], Tensor]):
        super().__init__()
        self.times = times

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0 = batch.x0
        t = self.times(denoiser.schedule, batch.draw.uniform("t"))  # (B,)
        eps = batch.draw.normal("eps", x0.shape[1:])  # (B, C, H, W)
        alpha, sigma = (expand_like(c, x0) for c in denoiser.schedule(t))
        a, b = (expand_like(c, x0) for c in denoiser.prediction(denoiser.schedule, t))
        f = denoiser.output(alpha * x0 + sigma * eps, t, **batch.cond)
        yield "denoiser", (f - (a * x0 + b * eps)).square().mean()
