"""What `dit.load` gives."""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.sampler.pipeline import Pipeline, to_uint8
from dit.train import saved, trained
from dit.train.kind import check_denoiser
from dit.train.loaded import PRECISIONS, load

# What kind of number each is, its least, and one that is usual.
NUMBERS: dict[str, tuple[type, int, float]] = {
    "num_images": (Integral, 1, 16),
    "seed": (Integral, 0, 0),
    "num_steps": (Integral, 1, 50),
    "guidance": (Real, 0, 2.0),
    "batch_size": (Integral, 1, 256),
    "noise_level": (Real, 0, 0.1),
}
PICTURES = {"low_resolution": 3, "image": 3, "mask": 2}  # dimensions of one


class Model:
    """An export, or a run, that draws as it was configured, unless told otherwise.

    Args:
        path: its folder.
        compile: the network by torch.compile.
        cuda_graphs: on a GPU, replay its forwards.
        precision: `float32`, or `bfloat16`.

    Raises:
        ValueError: if there is none, it is an autoencoder, it holds a program and no weights, or it cannot be compiled.
        DamagedError: if a file of it is missing, or not what was written.
        CheckpointError: if it is a run whose checkpoints are all damaged.
    """

    def __init__(
        self, path: str | Path, *, compile: bool = False, cuda_graphs: bool = False, precision: str = "float32"
    ):
        execution: dict[str, Any] = {"compile": compile, "cuda_graphs": cuda_graphs}
        for name, value in execution.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: give True or False")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.folder = Path(path)
        self.config = saved.config(self.folder)
        check_denoiser(self.config)
        weights = saved.exported(self.folder).get("weights", "ema")
        loaded = load(self.folder, trained.newest(self.folder), {}, weights)
        self._loaded = loaded.arranged(**execution, precision=precision)

    def to(self, device: str | torch.device) -> "Model":
        """Move it to a device."""
        device = torch.device(device)
        self._loaded.denoiser.to(device)
        self._loaded.latent.to(device)
        return self

    @torch.no_grad()
    def sample(self, num_images: int | None = None, **options: Any) -> Tensor:
        """Draw pictures, uint8 (N, C, H, W), on the CPU.

        Args:
            num_images: N; None: as many as there are values in what is asked for, or one.
            **options: what is asked for, like label=[0, 1, 2] or caption=["a seven"], a value for each image, in any
                sequence or array, or one for all, and:
                seed: of the noise, which is that of the picture's number and the seed, 0.
                num_steps: of the sampler; None: as it was configured.
                guidance: the scale; None: the same.
                batch_size: at a time, 256.
                noise_level: of what is enlarged; None: of one without noise.
                noise: standard normal, (N, C, H, W), of any floating point, to begin with; None: that of the seed.

        Raises:
            ValueError: if it cannot be drawn so.
        """
        decode = self._loaded.latent.decode
        return torch.cat([to_uint8(self._finite(decode(z), options)).cpu() for z in self._drawn(num_images, options)])

    def latents(self, num_images: int | None = None, **options: Any) -> Tensor:
        """What the pictures are decoded from, (N, c, h, w); as `sample`."""
        return torch.cat([self._finite(z, options) for z in self._drawn(num_images, options)])

    def _drawn(self, num_images: int | None, options: dict[str, Any]) -> Iterator[Tensor]:
        """Latents, a batch at a time."""
        pipeline, number, told = self._asked(num_images, **options)
        drawn: Iterator[Tensor] = pipeline.latents(told.pop("asked"), number, **told)
        return drawn

    def _finite(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        """What was drawn.

        Raises:
            ValueError: if it is no picture.
        """
        if x.isfinite().all():
            return x
        had = {"num_steps": self.config.sampler.num_steps, "guidance": (self.config.guidance or {}).get("scale", 1.0)}
        how = ", ".join(
            f"{name}={value if (told := options.get(name)) is None else told}" for name, value in had.items()
        )
        raise ValueError(f"what is drawn with {how} is not finite: give a smaller guidance=, or another num_steps=")

    def _asked(
        self,
        num_images: int | None,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 256,
        noise: Tensor | None = None,
        **asked: Any,
    ) -> tuple[Pipeline, int, dict[str, Any]]:
        """What draws, how many, and how."""
        level = {name: asked.pop(name) for name in ["noise_level"] if name in asked}  # one for all
        chosen = {"num_images": num_images, "num_steps": num_steps, "guidance": guidance, **level}
        given = {name: value for name, value in chosen.items() if value is not None}
        for name, value in {**given, "seed": seed, "batch_size": batch_size}.items():
            _check_number(name, value)
        asked = {name: _plain(name, value) for name, value in asked.items()}
        loaded, parts = self._loaded, self._loaded.parts
        if num_steps is not None or guidance is not None:
            parts = self._otherwise(num_steps, guidance)
        if missing := set(parts.condition.asks) - asked.keys():
            raise ValueError(f"{missing.pop()} is what this is told: give it, a value for each image or one for all")
        takes = {*parts.condition.asks, *(["noise_level"] if "low_resolution" in parts.condition.asks else [])}
        if unknown := {*asked, *level} - takes:
            told = " and ".join(parts.condition.asks) or "nothing"
            raise ValueError(f"{unknown.pop()}: this is told {told}, leave it out")
        if empty := [name for name, value in asked.items() if _several(name, value) and not len(value)]:
            raise ValueError(f"{empty[0]}=[] asks for nothing: give a value for each image or one for all")
        lengths = {len(value) for name, value in asked.items() if _several(name, value)}
        if num_images is not None:
            lengths |= {num_images}
        if len(lengths) > 1:
            raise ValueError(f"different numbers of images are asked for: {', '.join(map(str, sorted(lengths)))}")
        number = lengths.pop() if lengths else 1
        fields = {name: _for_each(name, value, number) for name, value in asked.items()} | level
        if noise is not None:
            noise = _checked_noise(noise, (number, *loaded.latent.shape), next(loaded.denoiser.parameters()).device)
        options = {"asked": fields, "seed": seed, "batch_size": batch_size, "noise": noise}
        return loaded._replace(parts=parts).pipeline(), number, options

    def _otherwise(self, num_steps: int | None, guidance: float | None) -> Any:
        """The parts with another number of steps, or another scale."""
        sampler, guided = self.config.sampler.copy(), self.config.guidance.copy()
        if num_steps is not None:
            sampler.num_steps = int(num_steps)
        if guidance is not None:
            guided.scale = float(guidance)
        return self._loaded.otherwise({"sampler": sampler, "guidance": guided}).parts


def _check_number(name: str, value: Any) -> None:
    """See that a number is one, and large enough.

    Raises:
        ValueError: if not, with one that is.
    """
    kind, least, usual = NUMBERS[name]
    if not (isinstance(value, kind) and not isinstance(value, bool) and least <= value < math.inf):  # type: ignore[operator]
        said = "a whole number" if kind is Integral else "a number"
        raise ValueError(f"{name}={value!r}: give {said} of at least {least}, like {name}={usual}")


def _checked_noise(noise: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise, if it is such as pictures begin with, float32 and on this device.

    Raises:
        ValueError: if it has another shape, or is not finite.
    """
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or tuple(noise.shape) != shape:
        had = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else repr(noise)
        raise ValueError(f"noise={had}: give torch.randn{shape}, (N, C, H, W), or leave it out for that of the seed")
    noise = noise.to(device, torch.float32)
    if not noise.isfinite().all():
        raise ValueError(f"noise= is not finite everywhere: give torch.randn{shape}, or leave it out")
    return noise


def _plain(name: str, value: Any) -> Any:
    """An array of pictures as a tensor, any other array or sequence as a list; what is neither as it is."""
    if isinstance(value, Tensor | str | bytes):
        return value
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return torch.tensor(array) if name in PICTURES and array.dtype != object else array.tolist()
    return list(value) if isinstance(value, Sequence) else value


def _several(name: str, value: Any) -> bool:
    """Whether it has a value for each image."""
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > PICTURES.get(name, 0))


def _for_each(name: str, value: Any, number: int) -> Any:
    """A value for each image; on the CPU, where it is looked at."""
    if isinstance(value, Tensor):
        value = value.cpu()
        return value if _several(name, value) else value.expand(number, *value.shape)
    return value if _several(name, value) else [value] * number
