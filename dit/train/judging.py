"""Metrics of a model: those of a distribution see the same samples, which all processes draw together."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit.metric import statistics
from dit.metric.distribution import Distribution
from dit.metric.extractor import Extractor
from dit.metric.moments import Moments
from dit.metric.seen import Seen
from dit.metric.subject import Samples, Subject, check, check_given, rows
from dit.noise.draw import Draw
from dit.train.build import PIXELS, build
from dit.train.world import World
from dit.weights.identity import sha256

REFERENCE_ROWS = 10_000  # images of the reference whose features themselves are kept; published figures have as many
LABELS = ("in_turn", "random")

Drawn = Callable[[int, Callable[[], Tensor]], Tensor]  # the number of a part, how it is drawn -> its images


class Judging:
    """The metrics of a configuration, with their extractors, and what these see in the reference.

    Args:
        nodes: by name, the configuration of a metric.
        data: of the run.
        world: the processes.
        device: where extractors are.
        cache: a folder for what is seen in the training images.
        reference: a file of statistics or samples of ADM's form; None: the training images.
        rank: of the processes that draw, which of them this is.
        size: how many of them there are.

    Raises:
        ValueError: if an extractor cannot be had, a metric reads what it does not see, or the reference will not do.
        ImportError: if an optional dependency is missing.
    """

    def __init__(
        self,
        nodes: Mapping[str, Any],
        data: Any,
        *,
        world: World,
        device: torch.device,
        cache: Path,
        reference: str | None = None,
        rank: int = 0,
        size: int = 1,
    ):
        self.data, self.world, self.device, self.cache = data, world, device, cache
        self.rank, self.size = rank, size
        metrics = {name: build(node) for name, node in nodes.items()}
        self.others = {name: metric for name, metric in metrics.items() if not isinstance(metric, Distribution)}
        self._groups: dict[str, _Group] = {}
        for name, metric in metrics.items():
            if isinstance(metric, Distribution):
                key = json.dumps(OmegaConf.to_container(nodes[name]["extractor"], resolve=True), sort_keys=True)
                if key not in self._groups:
                    self._groups[key] = _Group(Look(metric.extractor(), device))
                self._groups[key].add(name, metric)
        self.statistics = statistics.read(Path(reference)) if reference else None
        self.reference = reference

    @property
    def extractors(self) -> dict[str, dict[str, str]]:
        """By metric, what tells its extractor from others."""
        return {name: group.look.about for group in self._groups.values() for name in group.metrics}

    def check(self, subject: Subject, numbers: Sequence[int]) -> None:
        """See beforehand whether all can judge a model, by each of some numbers of samples.

        Raises:
            ValueError: if not, with the way out.
        """
        for metric in self.others.values():
            check(metric, subject)
        for group in self._groups.values():
            self._check_reference(group)
            for distribution in group.metrics.values():
                for number in numbers:
                    distribution.check(number)

    def __call__(
        self,
        subject: Subject,
        num_images: int,
        batch_size: int,
        *,
        seed: int = 0,
        labels: str = "in_turn",
        drawn: Drawn = lambda number, draw: draw(),
    ) -> dict[str, float]:
        """The figures of a model, by all processes.

        Args:
            subject: the model.
            num_images: how many samples.
            batch_size: in parts of so many; the samples do not depend on the number of processes.
            seed: of random labels.
            labels: the classes `in_turn`, or `random`, as published figures often have them.
            drawn: keeps what was drawn.
        """
        figures: dict[str, float] = {}
        if self._groups:
            for group in self._groups.values():  # before anything is drawn
                self._see_reference(group)
            seen = {key: group.begin() for key, group in self._groups.items()}
            told = self._told(subject, -(-num_images // batch_size) * batch_size, labels, seed)
            for number, images in self._samples(subject, told, num_images, batch_size, drawn):
                for key, group in self._groups.items():
                    seen[key].add(number, group.look(images[: num_images - number * batch_size]))
            for key, group in self._groups.items():
                self._share(seen[key])
                assert group.reference
                figures |= group.figures(seen[key], group.reference)
        if self.others:
            train, held_out = self.data.read("train"), self.data.read("held_out")
            for metric in self.others.values():
                figures |= metric(subject, train, held_out, num_images=num_images)
        return figures

    def _share(self, seen: Seen) -> None:
        """Have what all processes have seen."""
        if self.size > 1:
            seen.share(self.world.sum if self.size == self.world.size else self._sum, self.world.gathered)

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over the processes that draw; others, of tensor parallelism, draw the same."""
        return self.world.sum(tensor) * self.size / self.world.size

    def _told(self, subject: Subject, most: int, labels: str, seed: int) -> Callable[[range], Samples]:
        """What the network is told of samples of some numbers, the same however many there are."""
        if subject.restores or not set(subject.fields) <= {"label"}:
            held_out = self.data.read("held_out", most=most)
            there = len(held_out["image"])
            return lambda numbers: rows(held_out, torch.tensor([number % there for number in numbers]))
        classes = subject.num_classes or 1
        if labels == "random":
            return lambda numbers: {"label": (Draw(seed, 0, numbers, len(numbers)).uniform("labels") * classes).long()}
        return lambda numbers: {"label": torch.arange(numbers.start, numbers.stop) % classes}

    def _samples(
        self, subject: Subject, told: Callable[[range], Samples], num_images: int, batch_size: int, drawn: Drawn
    ) -> Any:
        """This process's parts of the samples, all of one size, with their numbers.

        All processes call the network equally often, as each may have but a share of the weights.
        """
        num_parts = -(-num_images // batch_size)
        for first in range(0, num_parts, self.size):
            number = first + self.rank
            extra = number >= num_parts
            start = (first if extra else number) * batch_size
            draw = partial(subject.draw, told(range(start, start + batch_size)), start)
            if extra:
                draw()
            else:
                yield number, drawn(number, draw)

    def _see_reference(self, group: "_Group") -> None:
        """Look at the reference, once."""
        if group.reference:
            return
        if self.statistics:
            self._check_reference(group)
            group.reference = group.of_statistics(self.statistics)
            return
        about = {"data": self.data.fingerprint(), "images": str(getattr(self.data, "images", None)), **group.look.about}
        about |= {"moments": sorted(group.moments), "rows": sorted(group.rows)}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        file = self.cache / f"reference-{name}.safetensors"
        if self.world.once(file.exists):
            group.reference = _loaded(file, group)
            return
        seen, size = group.begin(), 256
        for number, samples in self.data.parts("train", size, self.rank, self.size):
            few = number * size < REFERENCE_ROWS
            seen.add(number, group.look(samples["image"]), with_rows=few)
        self._share(seen)
        if self.world.is_first:
            self.cache.mkdir(parents=True, exist_ok=True)
            _store(file, seen, group)
        group.reference = seen

    def _check_reference(self, group: "_Group") -> None:
        """See whether a reference file is of what the extractor sees.

        Raises:
            ValueError: if not.
        """
        if not (had := self.statistics):
            return
        where = f"reference={self.reference}"
        size = had.images.shape[1] if had.images is not None else had.about.get("image_size")
        ours = self.data.decoder.image_size
        if size not in (None, ours):
            raise ValueError(f"{where} is of images of {size} pixels, but the run draws {ours}: give one of that size")
        if (known := had.about.get("extractor")) and known != group.look.about:
            raise ValueError(
                f"{where} was seen by {known['name']}, but the metric looks by {group.look.about['name']}: make one "
                "with the same extractor, or choose extractor= as there"
            )
        if group.rows and had.images is None:
            raise ValueError(
                f"{where} has statistics alone, but {', '.join(sorted(group.metrics))} reads images: give a file with "
                "arr_0, too, or leave reference=null, for the run's training images"
            )


class Look:
    """An extractor at work.

    Args:
        extractor: on the CPU.
        device: where it is to work.
    """

    def __init__(self, extractor: Extractor, device: torch.device):
        self.about = {"name": extractor.name, "sha256": sha256(extractor), "resize": extractor.resize}
        self.extractor, self.device = extractor.eval().to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """What it sees in uint8 images (N, C, H, W), by layer (N, D)."""
        found: dict[str, Tensor] = self.extractor(images.to(self.device))
        return found


class _Group:
    """The metrics that look by the same extractor."""

    def __init__(self, look: Look):
        self.look = look
        self.metrics: dict[str, Distribution] = {}
        self.moments: set[str] = set()
        self.rows: set[str] = set()
        self.reference: Seen | None = None

    def add(self, name: str, metric: Distribution) -> None:
        """Take in a metric.

        Raises:
            ValueError: if the extractor does not see what it reads.
        """
        for layer in (*metric.moments, *metric.rows):
            if layer not in self.look.extractor.layers:
                raise ValueError(
                    f"metric={name} reads {layer}, which the extractor {self.look.about['name']} does not see: choose "
                    "extractor=inception"
                )
        self.metrics[name] = metric
        self.moments |= set(metric.moments)
        self.rows |= set(metric.rows)

    def begin(self) -> Seen:
        """Nothing seen yet."""
        return Seen(sorted(self.moments), sorted(self.rows))

    def figures(self, samples: Seen, reference: Seen) -> dict[str, float]:
        """Of each metric, by its name unless it has several."""
        figures: dict[str, float] = {}
        for name, metric in self.metrics.items():
            found = metric.figure(samples, reference)
            figures |= found if isinstance(found, dict) else {name: found}
        return figures

    def of_statistics(self, had: statistics.Statistics) -> Seen:
        """What a file says was seen, and what is seen in its images.

        Raises:
            ValueError: if its statistics are of other features.
        """
        seen = self.begin()
        if had.images is not None:
            for number, part in enumerate(torch.from_numpy(had.images).permute(0, 3, 1, 2).split(256)):
                seen.add(number, self.look(part))
        for layer in self.moments:
            if layer in had.moments:
                if layer in seen.moments and len(had.moments[layer].mean) != len(seen.moments[layer].mean):
                    raise ValueError(
                        f"the reference has statistics of {len(had.moments[layer].mean)} features, but the extractor "
                        f"{self.look.about['name']} sees {len(seen.moments[layer].mean)}: choose the one it is of"
                    )
                seen.moments[layer] = had.moments[layer]
            elif layer not in seen.moments:
                raise ValueError(f"the reference has no statistics of {layer} features, nor images (arr_0)")
        return seen


def check_metrics(nodes: DictConfig | None, fields: Any, latent: Any) -> None:
    """See whether metrics are given what they read, before data and weights are.

    Raises:
        ValueError: if not, with the way out.
    """
    for node in (nodes or {}).values():
        check_given(build(node), fields, latent._target_ == PIXELS)


def _store(file: Path, seen: Seen, group: _Group) -> None:
    tensors = {f"rows.{layer}": seen.rows(layer).contiguous() for layer in group.rows}
    for layer, found in seen.moments.items():
        tensors |= {f"mean.{layer}": found.mean.cpu(), f"scatter.{layer}": found.scatter.cpu()}
    numbers = {layer: str(found.number) for layer, found in seen.moments.items()}
    partial_file = file.with_suffix(".tmp")
    save_file(tensors, partial_file, numbers)
    partial_file.rename(file)


def _loaded(file: Path, group: _Group) -> Seen:
    seen = group.begin()
    with safe_open(file, "pt") as stored:
        numbers = stored.metadata() or {}
        seen.restore(
            {
                layer: Moments(
                    int(numbers[layer]), stored.get_tensor(f"mean.{layer}"), stored.get_tensor(f"scatter.{layer}")
                )
                for layer in group.moments
            },
            {layer: stored.get_tensor(f"rows.{layer}") for layer in group.rows},
        )
    return seen
