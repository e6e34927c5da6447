"""The training step, as a LightningModule."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from dit.condition.condition import Condition
from dit.latent.latent import Latent
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.objective.objective import Batch, Objective
from dit.train.guard import Guard
from dit.train.strategy import Strategy, by_layout
from dit.train.transfer import Transfer
from dit.weights.ema import EMA


class DiffusionModule(LightningModule):
    """One optimizer step for each phase of the objective, on one global batch an item of the data.

    The optimizers are stepped by hand, and `step` is our own count of finished steps: Lightning's counts every
    optimizer.

    Args:
        denoiser: makes the denoiser, on the meta device where its network can draw its weights afterwards.
        strategy: how the run is spread over devices.
        objective: what the network should have said.
        condition: from a batch to `cond`, and its dropout.
        latent: images <-> what the network sees.
        optimizer: parameters -> optimizer.
        learning_rate: step -> factor on the optimizer's lr.
        ema: parameters by name -> their moving averages.
        seed: of all random numbers.
        lanes: the lanes among which a global batch is divided for its random numbers.
        num_micro_batches: gradient accumulation: a process's part of the batch passes the network in so many parts.
        init: weights to begin with, full tensors by name; None draws them.
        max_grad_norm: the gradient is scaled down to this norm; None leaves it.
        guard: says which gradients may be used; None: all that are finite.
    """

    def __init__(
        self,
        denoiser: Callable[[], Denoiser],
        strategy: Strategy,
        objective: Objective,
        condition: Condition,
        latent: Latent,
        optimizer: Callable[[Any], Optimizer],
        learning_rate: Callable[[int], float],
        ema: Callable[..., EMA],
        *,
        seed: int = 0,
        lanes: int = 1,
        num_micro_batches: int = 1,
        max_grad_norm: float | None = None,
        guard: Guard | None = None,
        init: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.strategy = strategy
        self.objective = objective
        self.latent = latent
        self.condition = condition
        self.seed = seed
        self.lanes = lanes
        self.num_micro_batches = num_micro_batches
        self.max_grad_norm = max_grad_norm
        self.guard = guard or Guard(spike_deviations=None)
        self.learning_rate = learning_rate
        self.step = 0
        self.lr = 0.0  # of the last step
        self.denoiser: Denoiser
        self.network: nn.Module  # of the denoiser, which may call it through a wrapper
        self.ema: EMA
        self._make_denoiser, self._make_optimizer, self._make_ema, self._init = denoiser, optimizer, ema, init

    def configure_model(self) -> None:
        """Make the network, its numbers drawn from the seed."""
        if not hasattr(self, "denoiser"):
            torch.manual_seed(self.seed)
            self.denoiser = self._make_denoiser()
            self.network = self.strategy.begin(self.denoiser, self._init, self.seed)
            self._init = None  # it may be large

    def configure_optimizers(self) -> None:
        """Lightning is given none: they are stepped by hand, and made where the weights then are."""

    def on_fit_start(self) -> None:
        """Make the optimizers and the average.

        There is an optimizer for the denoiser and what the objective learns with it, and one for each network of the
        objective's own.
        """
        apart = {name: list(network.parameters()) for name, network in self.objective.networks.items()}
        others = {p for parameters in apart.values() for p in parameters}
        together = itertools.chain(self.denoiser.parameters(), self.objective.parameters())
        groups = {"denoiser": [p for p in together if p not in others], **apart}
        self.strategy.start(
            self.denoiser,
            {name: self._make_optimizer(by_layout(group)) for name, group in groups.items()},
            micro_batches=self.num_micro_batches,
            max_norm=self.max_grad_norm,
        )
        self.ema = self._make_ema(self.strategy.averaged(self.network))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch, if it is on its way already; else as Lightning does it."""
        if isinstance(batch, Transfer):
            return batch.batch()
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """All phases of one step.

        Each ends with an optimizer step on its network; whatever gradients there are then are dropped.

        Args:
            batch: this process's part of the global batch: `key` (B,), `image` (B, C, H, W), uint8, or `latent`
                (B, K, c, h, w), its moments, the fields of the condition, tensors or arrays, and of pairs `noise`.
            batch_idx: unused; `step` counts.

        Returns:
            `loss`, the sum over phases of the mean over this process's micro-batches; `grad_norm` of the first phase,
            the denoiser's where it has one, before clipping, over all processes; `applied`, whether all gradients were
            used. All ().
        """
        for network, optimizer in self.strategy.optimizers.items():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                lr = group["initial_lr"] * self.learning_rate(self.step)
                group["lr"] = lr * self.objective.rates.get(network, 1.0)
                self.lr = lr
        total = torch.zeros((), device=self.device)
        steps = {}
        for network, loss in self._backward(list(self._micro_batches(batch))):
            steps[network] = self.strategy.step(network, self.guard.allows)
            total = total + loss
        self.step += 1
        if "denoiser" in steps:  # whose steps alone count for the average
            self.ema.update(self.step // self.objective.every, steps["denoiser"][1])
        grad_norm, _ = next(iter(steps.values()))
        return {
            "loss": total,
            "grad_norm": grad_norm,
            "applied": torch.stack([used for _, used in steps.values()]).all(),
        }

    def _backward(self, micro_batches: list[Batch]) -> Iterator[tuple[str, Tensor]]:
        """Yield (network, mean loss) of each phase when its gradient is complete; one graph at a time is alive."""
        running = [(batch.draw, self.objective.phases(self.denoiser, batch, self.step)) for batch in micro_batches]
        while True:
            total = torch.zeros((), device=self.device)
            for draw, phases in running:
                draw.seed_layers()
                if (phase := next(phases, None)) is None:
                    return
                network, loss = phase
                # A loss that is not finite makes a gradient that is not, which all processes see; else this is a 1.
                self.strategy.backward(loss * (1 + 0 * loss.detach()) / len(running))
                total = total + loss.detach() / len(running)
            yield network, total

    def _micro_batches(self, batch: Mapping[str, Any]) -> Iterator[Batch]:
        """The parts of a process's batch, each of whole lanes."""
        mine = torch.arange(self.lanes).chunk(self.strategy.data_size)[self.strategy.data_rank]
        lanes = mine.chunk(self.num_micro_batches)
        rows = torch.arange(len(batch["key"])).chunk(self.num_micro_batches)
        for part, micro in zip(rows, lanes, strict=True):
            draw = Draw(self.seed, self.step, micro.tolist(), len(part), self.device, self.lanes)
            told = {name: value[part[0] : part[-1] + 1] for name, value in batch.items()}
            if "latent" in told:
                z = draw.apply("latent", self.latent.draw, told["latent"])
            else:
                z = draw.apply("latent", self.latent.encode, told["image"].float() / 127.5 - 1)
            cond = self.condition(self.condition.asked(told, draw), draw, self.latent.encode)
            eps = told["noise"].to(z) if "noise" in told else None
            yield Batch(z, self.condition.augment(cond, draw), draw, self._lent, eps)

    def _lent(self, profile: str | None) -> AbstractContextManager[None]:
        """For the length of a `with`, the network has the weights of an average; None: its own."""
        return nullcontext() if profile is None else self.strategy.lent(self, profile)
