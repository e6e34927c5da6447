"""Metrics of a model: those of a distribution see the same samples, which all processes draw together."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dit.metric import statistics
from dit.metric.distribution import Distribution
from dit.metric.subject import Samples, Subject, check, check_given, rows
from dit.noise.draw import Draw
from dit.train.build import PIXELS, build
from dit.train.look import Group, Look
from dit.train.reference import ROWS, of_statistics, of_training_images
from dit.train.world import World
from dit.weights.manifest import fingerprint

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
        self.data, self.world, self.cache = data, world, cache
        self.rank, self.size = rank, size
        metrics = {name: build(node) for name, node in nodes.items()}
        self.others = {name: metric for name, metric in metrics.items() if not isinstance(metric, Distribution)}
        groups: dict[str, Group] = {}
        for name, metric in metrics.items():
            if isinstance(metric, Distribution):
                key = json.dumps(OmegaConf.to_container(nodes[name]["extractor"], resolve=True), sort_keys=True)
                if key not in groups:
                    groups[key] = Group(Look(metric.extractor(), device))
                groups[key].add(name, metric)
        self._groups = list(groups.values())
        self.statistics = statistics.read(Path(reference)) if reference else None
        self.reference = reference

    @property
    def extractors(self) -> dict[str, dict[str, str]]:
        """By metric, what tells its extractor from others."""
        return {name: group.look.about for group in self._groups for name in group.metrics}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what is drawn."""
        decoder = self.data.decoder
        return decoder.image_size, decoder.image_size, decoder.channels

    @cached_property
    def about_reference(self) -> dict[str, Any]:
        """What tells the reference from others, and the images that other metrics read."""
        about: dict[str, Any] = {}
        if self.statistics:
            about["file_sha256"] = fingerprint(Path(str(self.reference)))["sha256"]
        if self.others or not self.statistics:
            about |= {"training_images": self.data.fingerprint_of_images("train"), "rows": ROWS}
        if self.others and self.data.held_out:
            about["held_out_images"] = self.data.fingerprint_of_images("held_out")
        return about

    def check(self, subject: Subject, numbers: Sequence[int]) -> None:
        """See beforehand whether all can judge a model, by each of some numbers of samples.

        Raises:
            ValueError: if not, with the way out.
        """
        for metric in self.others.values():
            check(metric, subject)
        there = self.data.count("train") if self.data.there else None
        for group in self._groups:
            if self.statistics:
                self._check_reference(group, self.statistics)
                group.reference = group.reference or of_statistics(
                    group, self.statistics, f"reference={self.reference}"
                )
                there = None if self.statistics.images is None else len(self.statistics.images)
            least = min([*numbers, *([] if there is None else [min(there, ROWS)])])
            for distribution in group.metrics.values():
                distribution.check(least)

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
            batch_size: in parts of so many, num_images at most; samples do not depend on the number of processes.
            seed: of random labels.
            labels: the classes `in_turn`, or `random`, as published figures often have them.
            drawn: keeps what was drawn.
        """
        figures: dict[str, float] = {}
        batch_size = min(batch_size, num_images)
        if self._groups:
            for group in self._groups:  # before anything is drawn
                group.reference = group.reference or of_training_images(
                    group, self.data, self.world, self.rank, self.size, self.cache
                )
            seen = [group.begin() for group in self._groups]
            told = self._told(subject, -(-num_images // batch_size) * batch_size, labels, seed)
            for number, images in self._samples(subject, told, num_images, batch_size, drawn):
                for group, one in zip(self._groups, seen, strict=True):
                    one.add(number, group.look(images[: num_images - number * batch_size]))
            for group, one in zip(self._groups, seen, strict=True):
                if self.world.size > 1:
                    one.share(self.world, self.size)
                figures |= group.figures(one)
        if self.others:
            train, held_out = self.data.read("train"), self.data.read("held_out")
            for metric in self.others.values():
                figures |= metric(subject, train, held_out, num_images=num_images)
        return figures

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
    ) -> Iterator[tuple[int, Tensor]]:
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

    def _check_reference(self, group: Group, had: statistics.Statistics) -> None:
        """See whether a reference file is of what the extractor sees.

        Raises:
            ValueError: if not.
        """
        where = f"reference={self.reference}"
        ours, channels, name = self.data.decoder.image_size, self.data.decoder.channels, group.look.about["name"]
        sizes = {had.about.get("image_size", ours)} if had.images is None else set(had.images.shape[1:3])
        if wrong := sizes - {ours}:
            raise ValueError(
                f"{where} is of images of {wrong.pop()} pixels, but the run draws {ours}: give one of that size"
            )
        if had.images is not None and had.images.shape[3] not in (channels, 3 if channels == 1 else channels):
            raise ValueError(
                f"{where} is of images of {had.images.shape[3]} channels, but the run draws {channels}: give one of "
                "such images"
            )
        if (known := had.about.get("extractor")) and known != group.look.about:
            raise ValueError(
                f"{where} was seen by {known.get('name')}, but the metric looks by {name}: make one with the same "
                "extractor, or choose extractor= as there"
            )
        if group.reference_rows and had.images is None:
            reading = ", ".join(sorted(name for name, metric in group.metrics.items() if metric.reference_rows))
            raise ValueError(
                f"{where} has statistics alone, but metric={reading} reads images: give a file with "
                "arr_0, too, or leave reference=null, for the run's training images"
            )


def check_metrics(nodes: DictConfig | None, fields: Any, latent: Any) -> None:
    """See whether metrics are given what they read, before data and weights are.

    Raises:
        ValueError: if not, with the way out.
    """
    for node in (nodes or {}).values():
        check_given(build(node), fields, latent._target_ == PIXELS)
