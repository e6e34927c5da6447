"""Autoencoding: say again what was shown, through a narrow posterior."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.objective.objective import Batch, Objective


class Autoencoding(Objective):
    """|x - y| + w_p perceptual(x, y) + w_kl KL(q(z | x) | N(0, 1)) / CHW - w_adv lambda D(y), y = decode(z), z ~ q.

    That is the loss of latent diffusion's autoencoders (arXiv:2112.10752, and its published code) over the
    number of values of an image, CHW: errors are means over values, KL is the sum over z in nats, and the published
    weight of 1e-6 is the same here. The mean over images comes last.

    The discriminator D judges patches, and learns by the hinge loss (relu(1 - D(x)) + relu(1 + D(y))) / 2 in a phase of
    its own. lambda, |gradient of the other errors| / |gradient of D(y)| at the decoder's last layer, keeps it from
    drowning the others; it is computed for each micro-batch.

    Args:
        reconstruction: the error of y: `l1`, |x - y|, or `l2`, its square.
        kl_weight: w_kl.
        perceptual: (x, y) -> a distance (B,), such as `Perceptual`; None: no such term.
        perceptual_weight: w_p.
        discriminator: images -> what it thinks of patches, positive for real ones; None: no such term.
        adversarial_weight: w_adv.
        adversarial_from: the step from which the discriminator learns and is heard.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        reconstruction: str = "l1",
        kl_weight: float = 1e-6,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_from: int = 0,
    ):
        super().__init__()
        if reconstruction not in ("l1", "l2"):
            raise ValueError(f"objective.reconstruction={reconstruction}: choose one of l1, l2")
        weights = {"kl": kl_weight, "perceptual": perceptual_weight, "adversarial": adversarial_weight}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"objective.{name}_weight={value} must not be negative: 0 is none")
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.adversarial_from = adversarial_from

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The discriminator."""
        return {} if self.discriminator is None else {"discriminator": self.discriminator}

    def check(self, denoiser: Any) -> None:
        """Refuse what is no autoencoder."""
        if not hasattr(denoiser.network, "encode"):
            raise ValueError(
                f"objective=autoencoding is for autoencoders, which {type(denoiser.network).__name__} is not: choose "
                "model=autoencoder_digits or another one"
            )

    def phases(self, denoiser: Any, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase for the autoencoder, and one for the discriminator."""
        x, network = batch.x0, denoiser.network
        posterior = network.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + (logvar / 2).exp() * batch.draw.normal("posterior", mean.shape[1:])
        y = network.decode(z).sample.float()
        error = (x - y).abs() if self.reconstruction == "l1" else (x - y).square()
        errors = error.mean()
        if self.perceptual is not None:
            errors = errors + self.perceptual_weight * self.perceptual(x, y).mean()
        kl = (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1) / 2  # (B,)
        loss = errors + self.kl_weight * kl.mean() / x[0].numel()
        if self.discriminator is None or step < self.adversarial_from:
            yield "denoiser", loss
            return
        deceit = -self.discriminator(y).float().mean()
        # That of latent diffusion is of sums over an image, where these are means.
        balance = _balance(errors * x[0].numel(), deceit, network.decoder.conv_out.weight) / x[0].numel()
        yield "denoiser", loss + self.adversarial_weight * balance * deceit
        real, made = self.discriminator(x).float(), self.discriminator(y.detach()).float()
        yield "discriminator", (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


def _balance(errors: Tensor, deceit: Tensor, weight: Tensor) -> Tensor:
    """How much more the errors move a weight than the deceit does, at most 10,000 times."""
    ours, theirs = (torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (errors, deceit))
    return (ours / (theirs + 1e-4)).clamp(max=1e4).detach()
