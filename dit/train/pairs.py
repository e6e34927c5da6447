"""From a run to shards of pairs: noise, and what the run makes of it."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from dit.condition.condition import Condition
from dit.data import index
from dit.data.order import permutation
from dit.data.sample import FIELDS, LATENT, collate
from dit.data.shards import BadSample, Shards
from dit.data.store import DataError
from dit.data.writer import write_shard
from dit.noise.draw import Draw
from dit.noise.prediction import Estimate
from dit.sampler.pipeline import Pipeline
from dit.train.made import claim, clean, committed, name_of, npy, whole

LEAST_SHARDS = 16  # so that lanes have shards of their own
ORDER = 7  # the purpose of random numbers, other than those of the order of training

Told = Callable[[int], Mapping[str, bytes]]  # the number of a pair -> the files of what the network is told, by field


class Pairs:
    """How pairs are made: what their manifest will say, and the work on one shard of them.

    Pair i is `.noise.npy`, eps (c, h, w), standard normal and keyed by (seed, i); `.latent.npy`, (1, c, h, w), the x0
    to which the sampler leads from it, as a VAE's moments are written, neither scaled nor shifted; and what the network
    was told. The noise of x_t at t_max is sigma eps on every schedule, so that a student may be on any other.

    Args:
        pipeline: the run, with sampler, grid and guidance.
        told: what the network is told of a pair.
        out: the folder of the shards.
        about: what the manifest says of latent space and run.
        num_images: how many pairs.
        samples_per_shard: fewer, if there would not be 16 shards.
        seed: of the noise.
        dtype: of what is written.
        batch_size: how many are sampled at once.
        by: how messages name the run.

    Raises:
        ValueError: if the sampler draws fresh noise, or out holds other shards.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        told: Told,
        out: Path,
        about: Mapping[str, Any],
        *,
        num_images: int,
        samples_per_shard: int = 1000,
        seed: int = 0,
        dtype: str = "float16",
        batch_size: int = 500,
        by: str = "",
    ):
        check_deterministic(pipeline)
        self.pipeline, self.told, self.out, self.by = pipeline, told, out, by
        self.seed, self.dtype, self.batch_size = seed, dtype, batch_size
        self.num_samples = num_images
        self.samples_per_shard = min(samples_per_shard, max(1, num_images // LEAST_SHARDS))
        self.num_shards = -(-num_images // self.samples_per_shard)
        self.about = {**about, "seed": seed}
        sizes = {"num_images": num_images, "samples_per_shard": samples_per_shard, "batch_size": batch_size}
        claim(out, {**self.about, **sizes})

    def one(self, number: int) -> None:
        """Make the shard of a number, unless it is there."""
        if not whole(self.out, number, len(self._numbers(number))):
            clean(self.out, number)
            write_shard(self.out / name_of(number), self._samples(number))

    def commit(self) -> index.Index | None:
        """Write the manifest if all shards are there; None if some are not yet."""
        if not all(whole(self.out, number, len(self._numbers(number))) for number in range(self.num_shards)):
            return None
        return committed(self.out, self.about)

    def _numbers(self, number: int) -> range:
        """The pairs of a shard."""
        first = number * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.num_samples))

    def _samples(self, number: int) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """The files of the pairs of a shard."""
        latent, numbers = self.pipeline.latent, self._numbers(number)
        for first in range(0, len(numbers), self.batch_size):
            some = numbers[first : first + self.batch_size]
            files = [self.told(i) for i in some]
            asked = collate([{name: FIELDS[name][1](data) for name, data in each.items()} for each in files])
            eps = Draw(self.seed, 0, some, len(some), self.pipeline.device).normal("noise of a pair", latent.shape)
            eps = eps.to(getattr(torch, self.dtype)).float()  # what is written is what led there
            [z] = self.pipeline.latents(asked, len(some), seed=self.seed, batch_size=len(some), noise=eps)
            moments = (z / latent.scale + latent.shift)[:, None].cpu().numpy()
            for i, each, noise, moment in zip(some, files, eps.cpu().numpy(), moments, strict=True):
                told = {FIELDS[name][0]: data for name, data in each.items()}
                made = {FIELDS["noise"][0]: npy(noise, self.dtype), LATENT: npy(moment, self.dtype)}
                yield f"{i:08d}", told | made


def in_turn(num_classes: int) -> Told:
    """The classes in turn."""
    return lambda i: {"label": b"%d" % (i % num_classes)}


def of_data(shards: Shards, condition: Condition, seed: int) -> Told:
    """What the samples of some data say, in an order of the seed, again and again.

    Raises:
        ValueError: if the condition reads images, which pairs do not have.
    """
    if "image" in condition.fields:
        raise ValueError("the condition reads images, which pairs do not have: take a run that is told something else")
    wanted = {name: (FIELDS[name][0],) for name in condition.fields}
    firsts = list(accumulate((shard.samples for shard in shards.all), initial=0))
    order = permutation([ORDER, seed], shards.total) if wanted else None

    def told(i: int) -> Mapping[str, bytes]:
        if order is None:
            return {}
        sample = int(order[i % len(order)])
        shard = bisect_right(firsts, sample) - 1
        try:
            return shards.files(shard, sample - firsts[shard], wanted)
        except BadSample as error:
            raise DataError(f"{shards.where(shard, sample - firsts[shard])}: {error}") from error

    return told


def check_deterministic(pipeline: Pipeline) -> None:
    """See that the noise alone says where the sampler leads.

    Raises:
        ValueError: if it draws more, with the way out.
    """
    generator = torch.Generator()
    before = generator.get_state()
    x = torch.zeros(1, 1)
    schedule, times = pipeline.denoiser.schedule, pipeline.times
    pipeline.sampler(lambda x, t, s=None: Estimate(x, x, x), schedule, x, times, generator=generator)
    if not torch.equal(before, generator.get_state()):
        raise ValueError(
            "the sampler draws fresh noise, so that the noise of a pair does not say where it leads: take sampler=heun "
            "with sampler.churn=0, or another one with sampler.eta=0"
        )


def check_pairs(about: Mapping[str, Any], told: Mapping[str, int], scale: float, path: str) -> None:
    """See whether pairs are of a run that was told what a student is, and guided as it says.

    Args:
        about: what their manifest says.
        told: the sizes of the student's condition.
        scale: of the guidance that the student will have for good.
        path: the folder, for the message.

    Raises:
        ValueError: if not.
    """
    if (pairs := about["pairs"])["told"] != dict(told):
        raise ValueError(
            f"data.path={path} has pairs of run={pairs['run']}, which is told {pairs['told']}, but this run is told "
            f"{dict(told)}: take the condition of the teacher, or pairs of another one"
        )
    if pairs["scale"] != scale:
        raise ValueError(
            f"data.path={path} has pairs with guidance of scale {pairs['scale']:g}, which a student of them has for "
            f"good, but objective.scale={scale:g}: take objective.scale={pairs['scale']:g}"
        )
