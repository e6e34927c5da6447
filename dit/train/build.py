"""From a composed configuration to objects: the only place that calls `instantiate`."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dit.latent.latent import Latent
from dit.metric.subject import Samples, Subject
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule
from dit.sampler.pipeline import Pipeline
from dit.train.kind import autoencodes

PIXELS = "dit.latent.pixels.Pixels"
SAME = [("model.in_channels", "latent.channels"), ("model.input_size", "latent.size")]


class Parts:
    """The objects that a configuration describes; the schedule is built once, networks and VAEs only when asked for.

    Args:
        cfg: of what draws images, with its noise, times, prediction, model, condition, latent, data, sampler, grid and
            guidance.

    Raises:
        ValueError: if a value is out of range, or two do not fit together.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.schedule: Schedule = build(cfg.noise)
        self.prediction = build(cfg.prediction)
        self.condition = build(cfg.condition)
        self.model = build(cfg.model)
        self.adapter = build(cfg.adapter) if OmegaConf.select(cfg, "adapter._target_") else None
        self._sampler = build({name: value for name, value in cfg.sampler.items() if name != "num_steps"})
        self._guidance = build(cfg.guidance)
        self._check_sizes()
        denoiser = self.denoiser("meta")  # what does not fit fails here, before anything large is made
        if hasattr(denoiser.network, "encode"):
            raise ValueError(
                "model is an autoencoder, which does not denoise: take objective=autoencoding, or another one"
            )
        self._guidance(denoiser, self.condition.null)
        times = self.grid(self.schedule)
        learned = torch.zeros(1, 1) if getattr(denoiser.network, "learn_sigma", False) else None
        self._sampler(lambda x, t, s=None: Estimate(x, x, learned), self.schedule, torch.zeros(1, 1), times[-3:])
        self._check_drawn()
        self._check_told()

    def _check_sizes(self) -> None:
        """See that data, latent space and network are of one size.

        Raises:
            ValueError: if they are not.
        """
        cfg = self.cfg
        paired = "noise" in cfg.data.get("fields", [])  # which may be of pixels
        if cfg.data.get("encoded") and cfg.latent._target_ == PIXELS and not paired:
            raise ValueError(
                "data.encoded=true, but latent=pixels: take the latent= that encoded them, or data of images"
            )
        stride = cfg.latent.get("stride", 1)
        if cfg.latent.size * stride != cfg.data.image_size:
            size = f"latent.size={cfg.latent.size} is not data.image_size={cfg.data.image_size}"
            raise ValueError(size + (f" over latent.stride={stride}" if stride > 1 else ""))
        sees = "latent.in_channels" if "in_channels" in cfg.latent else "latent.channels"
        for ours, theirs in [*SAME, (sees, "data.channels")]:
            if (mine := OmegaConf.select(cfg, ours)) != (other := OmegaConf.select(cfg, theirs)):
                raise ValueError(f"{ours}={mine} differs from {theirs}={other}")

    def _check_drawn(self) -> None:
        """See that what is trained can be sampled so.

        Raises:
            ValueError: if not.
        """
        cfg = self.cfg
        if cfg.sampler.get("variance") == "learned" and not cfg.objective.get("bound_weight"):
            raise ValueError("sampler.variance=learned, but it is not learned: train with objective.bound_weight=1")
        if (cfg.guidance.get("channels") or 0) > cfg.latent.channels:
            raise ValueError(f"guidance.channels={cfg.guidance.channels}, but latent.channels={cfg.latent.channels}")
        for key in ("clip", "dynamic_clip"):
            if (value := cfg.guidance.get(key)) is not None and cfg.latent._target_ != PIXELS:
                raise ValueError(
                    f"guidance.{key}={value} is for pixels, but latent.name={cfg.latent.get('name')}: take "
                    f"guidance.{key}=null"
                )
        steps, most = cfg.sampler.num_steps, self.schedule.num_steps
        if most and steps > most and cfg.times._target_ == "dit.noise.times.discrete":
            raise ValueError(
                f"sampler.num_steps={steps} is more than noise.num_steps={most}, and times=discrete trains at no other "
                f"times: take at most {most}, or train with times=uniform"
            )

    def _check_told(self) -> None:
        """See that the data have what the condition reads.

        Raises:
            ValueError: if not.
        """
        cfg = self.cfg
        ours, theirs = self.condition.sizes.get("num_classes"), cfg.data.num_classes
        if ours not in (None, theirs):
            raise ValueError(f"condition.num_classes={ours} differs from data.num_classes={theirs}")
        there = ["latent" if cfg.data.get("encoded") else "image", *cfg.data.get("fields", ["label"])]
        missing = [field for field in self.condition.fields if field not in there]
        if "image" in missing:
            raise ValueError(
                "the condition reads the image, but data.encoded=true has latents alone: take data of images"
            )
        if missing:
            fields = ",".join([*there[1:], *missing])
            raise ValueError(f"the condition reads {missing[0]}, which data.fields leaves out: data.fields=[{fields}]")

    def denoiser(self, device: str = "cpu") -> Denoiser:
        """A new, untrained network, given its meaning."""
        with torch.device(device):
            network = self._network()
        return Denoiser(network, self.schedule, self.prediction)

    def learner(self, device: str = "cpu") -> Denoiser:
        """The same as it is trained: with its adapter, if any."""
        denoiser = self.denoiser(device)
        if self.adapter:
            with torch.device(device):
                self.adapter(denoiser.network)
        return denoiser

    def _network(self) -> nn.Module:
        """The network, built to be told what the condition says."""
        told = inspect.signature(self.model).parameters
        if unknown := self.condition.sizes.keys() - told.keys():
            raise ValueError(
                f"the condition gives the network {unknown.pop()}, of which {self.cfg.model._target_} knows nothing: "
                "choose another model, or another condition"
            )
        network: nn.Module = self.model(**self.condition.sizes)
        return network

    def latent(self) -> Latent:
        """The latent space, with its VAE, if any, loaded."""
        latent: Latent = build(self.cfg.latent)
        return latent

    @property
    def restores(self) -> bool:
        """Whether the network is told a picture of what it draws."""
        return "image_channels" in self.condition.sizes

    @property
    def grid(self) -> Callable[..., Tensor]:
        """Schedule -> times, (num_steps + 1,), in as many steps as configured, if num_steps is not given."""
        return partial(build(self.cfg.grid), num_steps=self.cfg.sampler.num_steps)

    def subject(
        self,
        denoiser: Denoiser,
        latent: Latent,
        *,
        seed: int,
        batch_size: int,
        num_steps: int | None = None,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Subject:
        """What metrics judge: a denoiser as it is sampled, each call within a context; num_steps as in `pipeline`."""

        def asked(samples: Samples, start: int = 0) -> tuple[Mapping[str, Any], Draw]:
            number = len(next(iter(samples.values())))
            keyed = Draw(seed, 0, range(start, start + number), number, next(denoiser.parameters()).device)
            return self.condition.asked(samples, keyed), keyed

        def told(samples: Samples) -> dict[str, Tensor]:
            return self.condition(*asked(samples), latent.encode)

        def draw(samples: Samples, start: int = 0) -> Tensor:
            with within():
                fields, keyed = asked(samples, start)
                return self.pipeline(denoiser, latent, num_steps)(
                    fields, len(keyed.lanes), seed=seed, batch_size=batch_size, start=start
                )

        def denoise(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Estimate:
            device = next(denoiser.parameters()).device
            with within():
                estimate = denoiser(x_t.to(device), t.to(device), **cond)
            return type(estimate)(*(None if field is None else field.to(x_t.device) for field in estimate))

        num_classes = self.condition.sizes.get("num_classes")
        return Subject(
            told, draw, denoise, self.schedule, latent.shape, self.restores, self.condition.fields, num_classes
        )

    def export(self, denoiser: Denoiser, data: Any, folder: Path) -> None:
        """Write to a run's folder, at its end, what others need of it; nothing."""

    def pipeline(
        self,
        denoiser: Denoiser,
        latent: Latent,
        num_steps: int | None = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Pipeline:
        """From what is asked for to pictures, with the configured sampler, grid and guidance, in the steps, too."""
        grid = self.grid if num_steps is None else partial(self.grid, num_steps=num_steps)
        return Pipeline(denoiser, self.condition, latent, self._guidance, self._sampler, grid, within)


def parts_of(cfg: DictConfig) -> Any:
    """The parts of what a configuration trains: `Parts`, or `AutoencoderParts`, of which a run asks the same.

    Raises:
        ValueError: if a value is out of range, or two do not fit together.
    """
    from dit.train.autoencoder import AutoencoderParts  # which builds its parts with the help of this file

    return AutoencoderParts(cfg) if autoencodes(cfg) else Parts(cfg)


def build(node: Any, **kwargs: Any) -> Any:
    """The object of a node with `_target_`.

    Raises:
        ValueError: the constructor's own, where it rejects a value; or naming the node, where an argument has the wrong
            name or type.
        ImportError: the constructor's own, where an optional dependency is missing.
    """
    try:
        return instantiate(node, **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | ImportError):
            raise error.__cause__ from None
        raise ValueError(str(error)) from error
