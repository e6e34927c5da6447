"""From labels and a seed to pictures."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit.condition.condition import Condition
from dit.latent.latent import Latent
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule


class Pipeline:
    """Seeded noise, a guided denoiser, a sampler on its grid of times, the latent's decoder.

    Picture i starts from noise keyed by (seed, i), whatever the batch size.

    Args:
        denoiser: the denoiser.
        condition: from what is asked for to `cond`.
        latent: decodes what was sampled.
        guidance: (denoiser, null) -> guided denoiser.
        sampler: `sample(denoise, schedule, x, times, generator=...)`.
        grid: schedule -> times, (N + 1,).
        within: makes the context in which it is sampled, such as autocast's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        latent: Latent,
        guidance: Callable[..., Callable[..., Estimate]],
        sampler: Callable[..., Tensor],
        grid: Callable[[Schedule], Tensor],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.denoiser = denoiser
        self.condition = condition
        self.latent = latent
        self.guidance = guidance
        self.sampler = sampler
        self.times = grid(denoiser.schedule)
        self.within = within

    @torch.no_grad()
    def __call__(
        self,
        asked: Mapping[str, Any],
        num_images: int,
        *,
        seed: int = 0,
        batch_size: int = 256,
        noise: Tensor | None = None,
        avoid: Mapping[str, Any] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Draw pictures.

        Args:
            asked: the condition's fields, each of num_images entries, such as {"label": [0, 1, 2]}, or one for all.
            num_images: how many, N.
            seed: of the noise.
            batch_size: how many at a time; where the sampler draws fresh noise (eta > 0), the pictures depend on it.
            noise: to begin with, (N, C, H, W), standard normal; None: that of the seed.
            avoid: fields like those of asked, of one entry: what guidance leads away from; None: from nothing told.
            start: the number of the first, of those of the seed.

        Returns:
            (N, C, H, W) uint8, on the CPU.
        """
        drawn = self.latents(asked, num_images, seed=seed, batch_size=batch_size, noise=noise, avoid=avoid, start=start)
        return torch.cat([to_uint8(self.latent.decode(z)) for z in drawn]).cpu()

    @torch.no_grad()
    def latents(
        self,
        asked: Mapping[str, Any],
        num_images: int,
        *,
        seed: int = 0,
        batch_size: int = 256,
        noise: Tensor | None = None,
        avoid: Mapping[str, Any] | None = None,
        start: int = 0,
    ) -> Iterator[Tensor]:
        """What the pictures are decoded from, a batch at a time; the arguments are those of a call."""
        device = self.device
        schedule = self.denoiser.schedule
        null = self.condition.null
        if avoid is not None:
            other = self.condition.part(avoid, Draw(seed, 0, [0], 1, device), self.latent.encode)
            null = partial(_instead, null, other)
        guided = self.guidance(self.denoiser, null)
        for first in range(0, num_images, batch_size):
            rows = slice(first, min(first + batch_size, num_images))
            lanes = range(start + rows.start, start + rows.stop)
            draw = Draw(seed, 0, lanes, len(lanes), device)
            part = {name: _rows(value, rows) for name, value in asked.items()}
            cond = self.condition(part, draw, self.latent.encode)
            x = draw.normal("x", self.latent.shape) if noise is None else noise[rows]
            x = schedule(self.times[0]).sigma * x
            with self.within():
                z = self.sampler(
                    lambda x_t, t, s=None, cond=cond: guided(x_t, t, s, **cond),
                    schedule,
                    x,
                    self.times,
                    generator=draw.generator("z", lane=lanes.start),
                )
            yield z

    def noise(self, seed: int, num_images: int) -> Tensor:
        """The noise (N, C, H, W) with which the first pictures of a seed begin."""
        return Draw(seed, 0, range(num_images), num_images, self.device).normal("x", self.latent.shape)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device


def _rows(value: Any, rows: slice) -> Any:
    """Those rows of a field that has one for each image; a number is for all."""
    return value if isinstance(value, int | float) else value[rows]


def _instead(
    null: Callable[..., dict[str, Tensor]], other: Mapping[str, Tensor], cond: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is said instead, for as many rows; nothing besides."""
    return {**null(cond), **{name: value.expand_as(cond[name]) for name, value in other.items() if name in cond}}


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to nearest."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
