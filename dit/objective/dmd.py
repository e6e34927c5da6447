"""Distribution matching: what a student draws goes where its teacher finds it likelier than its critic does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.noise.denoiser import Denoiser
from dit.noise.grid import pairs
from dit.noise.matched import on_path
from dit.noise.schedule import Schedule
from dit.noise.step import point
from dit.objective.denoising import Denoising
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, baked, check_start, needed

FEATURES = ("critic", "teacher")


class DistributionMatching(Objective):
    """w_m |x - sg(x - g)|^2 / 2 + w_a softplus(-D(x_t)), g = (D_fake(x_t) - D_real(x_t)) / mean |x - D_real(x_t)|.

    x is what the student draws, its x0 at the last of some steps of `sampler/consistency.py`, taken without a gradient;
    x_t is the same with new noise. D_real is the x0 of the teacher, D_fake that of a critic, which learns to denoise
    what the student draws: g is then the gradient of KL(drawn | real) at t. That is DMD2 (arXiv:2405.14867). The critic
    learns at each step, the student at each `every`-th.

    With a head, logits of features in the middle of a network tell drawn samples from real ones, each with noise: the
    discriminator D, which learns by softplus(D(x_t)) + softplus(-D(x0_t)) together with the critic. Of the teacher's
    features and with w_m = 0 that is LADD (arXiv:2403.12015).

    Args:
        teacher: D_real, guided or not.
        critic: D_fake, which begins as the teacher; None: none, for w_m = 0.
        grid: (schedule, num_steps) -> times, those at which the student will be sampled.
        num_steps: of the sampler; all processes draw x after as many of them.
        times: the density of t, of which the middle 96 % are used, (schedule, u) -> t, both (B,).
        weight: of the critic's error of x0, (schedule, t) -> (B,).
        every: so many steps of the critic for one of the student.
        critic_rate: the critic's learning rate over the student's.
        matching_weight: w_m.
        head: features (B, N, D) or (B, D, h, w) -> logits; None: no discriminator.
        features: of which network, `critic` or `teacher`.
        adversarial_weight: w_a.
        head_weight: of the discriminator's loss.

    Raises:
        ValueError: if a value is out of range, or there is no teacher, or no critic where one is needed.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        grid: Callable[..., Tensor],
        num_steps: int,
        times: Callable[[Schedule, Tensor], Tensor],
        weight: Callable[[Schedule, Tensor], Tensor],
        critic: Denoiser | None = None,
        every: int = 5,
        critic_rate: float = 1.0,
        matching_weight: float = 1.0,
        head: nn.Module | None = None,
        features: str = "critic",
        adversarial_weight: float = 3e-3,
        head_weight: float = 1e-2,
    ):
        super().__init__()
        if every < 1:
            raise ValueError(f"objective.every={every} must be at least 1")
        weights = {"critic_rate": critic_rate, "matching_weight": matching_weight}
        weights |= {"adversarial_weight": adversarial_weight, "head_weight": head_weight}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"objective.{name}={value} must not be negative: 0 is none")
        if features not in FEATURES:
            raise ValueError(f"objective.features={features}: choose one of {', '.join(FEATURES)}")
        if not (matching_weight or (head is not None and adversarial_weight)):
            raise ValueError("objective.matching_weight=0, and no head is heard: the student would learn nothing")
        if critic is None and (matching_weight or (head is not None and features == "critic")):
            raise ValueError(
                "objective.critic is missing: what the student draws is compared with what a critic has seen of it; "
                "take objective/critic=run, which begins as the teacher, or objective=ladd, which has none"
            )
        self.teacher = needed(teacher, "dmd")
        self.grid = grid
        self.num_steps = num_steps
        self.times = times
        self.every = every
        self.critic_rate = critic_rate
        self.matching_weight = matching_weight
        self.features = features
        self.adversarial_weight = adversarial_weight
        self.head_weight = head_weight
        self.denoising = Denoising(self._middle, weight)
        learned = {"score": critic, "head": head}
        self.critic = nn.ModuleDict({name: part for name, part in learned.items() if part is not None})

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The critic, with its head."""
        return {"critic": self.critic}

    @property
    def rates(self) -> Mapping[str, float]:
        """That of the critic."""
        return {"critic": self.critic_rate}

    def few_step(self, step: int | None = None) -> FewStep:
        """In as many steps as it was drawn in while it learned."""
        return FewStep("dmd", "consistency", [self.num_steps], baked(self.teacher))

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a student whose x0 cannot be had at t_max, times that do not decrease, a critic that cannot learn."""
        check_start(denoiser)
        pairs(self.grid(denoiser.schedule, num_steps=self.num_steps))
        if "score" in self.critic:
            self.denoising.check(self._score(denoiser.schedule))

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase for the denoiser, at each `every`-th step, and one for the critic."""
        learns = (step + 1) % self.every == 0
        with nullcontext() if learns else torch.no_grad():
            x = self.drawn(denoiser, batch)  # (B, C, H, W)
        if learns:
            yield "denoiser", self._matching(denoiser.schedule, x, batch) + self._deceit(denoiser.schedule, x, batch)
        x, loss = x.detach(), torch.zeros((), device=x.device)
        if "score" in self.critic:
            [(_, loss)] = self.denoising.phases(self._score(denoiser.schedule), batch._replace(x0=x), step)
        if "head" in self.critic:
            t, eps = self._noise(denoiser.schedule, "head", batch)
            real, made = (self._logits(denoiser.schedule, x0, t, eps, batch) for x0 in (batch.x0, x))
            loss = loss + self.head_weight * (F.softplus(-real) + F.softplus(made)).mean()
        yield "critic", loss

    def drawn(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """What the student draws: its x0 after some of the sampler's steps, as many in all processes.

        So far as its distribution at these times is its own, it learns what it will be asked (backward simulation).
        """
        schedule, draw, shape = denoiser.schedule, batch.draw, batch.x0.shape[1:]
        times = self.grid(schedule, num_steps=self.num_steps)
        rung = draw.generator("rung").initial_seed() % self.num_steps  # of which no device need be asked
        x_t = schedule(times[0]).sigma * draw.normal("x", shape).to(batch.x0)
        with torch.no_grad():
            for i, (t, s) in enumerate(islice(pairs(times), rung)):
                x_t = point(schedule, s, denoiser(x_t, t, **batch.cond).x0, draw.normal(f"z{i}", shape).to(x_t))
        x0: Tensor = denoiser(x_t, times[rung], **batch.cond).x0
        return x0

    def _matching(self, schedule: Schedule, x: Tensor, batch: Batch) -> Tensor:
        """Of the real and the fake score."""
        if not self.matching_weight:
            return x.new_zeros(())
        t, eps = self._noise(schedule, "match", batch)
        x_t = point(schedule, t, x.detach(), eps)
        with torch.no_grad():
            critic = self._score(schedule)
            real = self.teacher.on(schedule)(x_t, t, **batch.cond).x0
            fake = critic(x_t, t.clamp(max=critic.schedule.t_max), **batch.cond).x0
            size = (x - real).abs().flatten(1).mean(dim=1).clamp_min(1e-5)  # (B,)
            target = x - (fake - real) / size.reshape(-1, *[1] * (x.ndim - 1))
        return self.matching_weight * (x - target).square().mean() / 2

    def _deceit(self, schedule: Schedule, x: Tensor, batch: Batch) -> Tensor:
        """Of the discriminator, which is to take x for real."""
        if "head" not in self.critic:
            return x.new_zeros(())
        t, eps = self._noise(schedule, "deceive", batch)
        with _frozen(self.critic):
            return self.adversarial_weight * F.softplus(-self._logits(schedule, x, t, eps, batch)).mean()

    def _logits(self, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, batch: Batch) -> Tensor:
        """What the discriminator says of x0, with noise."""
        trunk = self._score(schedule) if self.features == "critic" else on_path(self.teacher.denoiser, schedule)
        if next(trunk.parameters(), x0).device != x0.device:  # moving looks at each parameter, at each call
            trunk.to(x0.device)
        with _middle_of(trunk.network) as kept:
            trunk(point(schedule, t, x0, eps), t.clamp(max=trunk.schedule.t_max), **batch.cond)
        logits: Tensor = self.critic["head"](*kept)
        return logits.float()

    def _score(self, schedule: Schedule) -> Denoiser:
        """The critic as a denoiser of the student's schedule."""
        critic: Any = self.critic["score"].eval()  # without dropout, like the teacher
        return on_path(critic, schedule)

    def _noise(self, schedule: Schedule, purpose: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """New times (B,) and noise (B, C, H, W)."""
        t = self._middle(schedule, batch.draw.uniform(f"{purpose} t"))
        return t, batch.draw.normal(f"{purpose} eps", batch.x0.shape[1:]).to(batch.x0)

    def _middle(self, schedule: Schedule, u: Tensor) -> Tensor:
        """Times between the 2 % and the 98 % quantile."""
        return self.times(schedule, 0.02 + 0.96 * u)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """For the length of a `with`, what is computed has no gradient with respect to the module's parameters."""
    learned = [p for p in module.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


@contextmanager
def _middle_of(network: Any) -> Iterator[list[Tensor]]:
    """For the length of a `with`, what the unit in the middle of a network says is kept."""
    units = [module for module in network.modules() if isinstance(module, network.units)]
    kept: list[Tensor] = []
    hook = units[len(units) // 2].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        yield kept
    finally:
        hook.remove()
