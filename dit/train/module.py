"""The training step, as a LightningModule."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from dit.condition.condition import Condition
from dit.latent.latent import Latent
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.objective.objective import Batch, Objective
from dit.weights.ema import EMA


class DiffusionModule(LightningModule):
    """One optimizer step for each phase of the objective, on one global batch an item of the data.

    The optimizers are stepped by hand, and `step` is our own count of finished steps: Lightning's counts every
    optimizer.

    Args:
        denoiser: makes the network, in `configure_model`.
        objective: what the network should have said.
        condition: from a batch to `cond`, and its dropout.
        latent: images <-> what the network sees.
        optimizer: parameters -> optimizer.
        learning_rate: step -> factor on the optimizer's lr.
        ema: parameters by name -> their moving averages.
        seed: of all random numbers.
        lanes: the lanes among which a global batch is divided for its random numbers.
        num_micro_batches: gradient accumulation: a global batch passes the network in so many parts.
        max_grad_norm: the gradient is scaled down to this norm; None leaves it.
    """

    def __init__(
        self,
        denoiser: Callable[[], Denoiser],
        objective: Objective,
        condition: Condition,
        latent: Latent,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        learning_rate: Callable[[int], float],
        ema: Callable[..., EMA],
        *,
        seed: int = 0,
        lanes: int = 1,
        num_micro_batches: int = 1,
        max_grad_norm: float | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.objective = objective
        self.latent = latent
        self.condition = condition
        self.seed = seed
        self.lanes = lanes
        self.num_micro_batches = num_micro_batches
        self.max_grad_norm = max_grad_norm
        self.learning_rate = learning_rate
        self.step = 0
        self.denoiser: Denoiser
        self.ema: EMA
        self._make_denoiser, self._make_optimizer, self._make_ema = denoiser, optimizer, ema

    def configure_model(self) -> None:
        """Make the network, its numbers drawn from the seed."""
        if not hasattr(self, "denoiser"):
            torch.manual_seed(self.seed)
            self.denoiser = self._make_denoiser()

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimizer for the denoiser and what the objective learns with it, and one for each network of its own."""
        apart = {name: list(network.parameters()) for name, network in self.objective.networks.items()}
        others = {p for parameters in apart.values() for p in parameters}
        together = itertools.chain(self.denoiser.parameters(), self.objective.parameters())
        groups = [[p for p in together if p not in others], *apart.values()]
        return [self._make_optimizer([p for p in group if p.requires_grad]) for group in groups]

    @property
    def named_optimizers(self) -> dict[str, Any]:
        """By the names of their networks, each wrapped by Lightning; its `optimizer` is the one that has the state."""
        made = self.optimizers()  # one, or a list of several
        return dict(
            zip(["denoiser", *self.objective.networks], made if isinstance(made, list) else [made], strict=True)
        )

    def on_fit_start(self) -> None:
        """Begin the average, where the weights now are."""
        self.ema = self._make_ema(dict(self.denoiser.network.named_parameters()))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """All phases of one step.

        Each ends with an optimizer step on its network; whatever gradients there are then are dropped.

        Args:
            batch: `key` (B,), `image` (B, C, H, W), uint8, or `latent` (B, K, c, h, w), its moments, and the fields of
                the condition, tensors or arrays.
            batch_idx: unused; `step` counts.

        Returns:
            `loss`, the sum over phases of the mean over micro-batches, and `grad_norm` of the denoiser before clipping.
        """
        optimizers = self.named_optimizers
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * self.learning_rate(self.step)
        total = torch.zeros((), device=self.device)
        grad_norms = {}
        for network, loss in self._backward(list(self._micro_batches(batch))):
            grad_norms[network] = torch.nn.utils.clip_grad_norm_(
                [p for group in optimizers[network].param_groups for p in group["params"]],
                float("inf") if self.max_grad_norm is None else self.max_grad_norm,
            )
            optimizers[network].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            total = total + loss
        self.step += 1
        self.ema.update(self.step)
        return {"loss": total, "grad_norm": grad_norms["denoiser"]}

    def _backward(self, micro_batches: list[Batch]) -> Iterator[tuple[str, Tensor]]:
        """Yield (network, mean loss) of each phase when its gradient is complete; one graph at a time is alive."""
        running = [(batch.draw, self.objective.phases(self.denoiser, batch, self.step)) for batch in micro_batches]
        while True:
            total = torch.zeros((), device=self.device)
            for draw, phases in running:
                torch.manual_seed(draw.generator("layers", draw.lanes[0]).initial_seed())  # for dropout
                if (phase := next(phases, None)) is None:
                    return
                network, loss = phase
                self.manual_backward(loss / len(running))
                total = total + loss.detach() / len(running)
            yield network, total

    def _micro_batches(self, batch: Mapping[str, Any]) -> Iterator[Batch]:
        """The parts of a global batch, each of whole lanes."""
        lanes = torch.arange(self.lanes).chunk(self.num_micro_batches)
        rows = torch.arange(len(batch["key"])).chunk(self.num_micro_batches)
        for part, micro in zip(rows, lanes, strict=True):
            draw = Draw(self.seed, self.step, micro.tolist(), len(part), self.device, self.lanes)
            told = {name: value[part[0] : part[-1] + 1] for name, value in batch.items()}
            if "latent" in told:
                z = draw.apply("latent", self.latent.draw, told["latent"])
            else:
                z = draw.apply("latent", self.latent.encode, told["image"].float() / 127.5 - 1)
            cond = self.condition(self.condition.asked(told, draw), draw, self.latent.encode)
            yield Batch(z, self.condition.augment(cond, draw), draw)
