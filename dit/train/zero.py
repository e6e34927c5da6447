"""ZeRO by DeepSpeed."""

import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from dit.train import checkpoint
from dit.train.strategy import Strategy, check_state, trained
from dit.train.world import World

# In numbers, not bytes:
BUCKET = 200_000_000  # of gradients that are summed at a time; DeepSpeed makes room for all of them
PERSISTENT = 100_000  # smaller parameters are never partitioned in stage 3
LIVE = 1_000_000_000  # gathered parameters that stage 3 keeps, in case they are needed again
AHEAD = 50_000_000  # and fetches before they are


class Zero(Strategy):
    """Divides among devices the optimizer's state (stage 1), the gradients (2) and the parameters too (3).

    arXiv:1910.02054, by DeepSpeed, which is an optional dependency. Parameters are kept, and gradients summed, in
    float32. Checkpoints are the neutral ones of the other strategies: DeepSpeed's own are pickles, and bound to their
    number of devices; ours are gathered parameter by parameter, and every device reads whole tensors of them.
    """

    needs_group = True

    def __init__(self, options: DictConfig, world: World, device: torch.device):
        super().__init__(options, world, device)
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import deepspeed

        deepspeed.utils.logging.logger.setLevel(logging.ERROR)
        self._deepspeed = deepspeed
        self.stage = int(options.strategy[-1])

    @classmethod
    def check(cls, options: DictConfig, denoiser: Any, objective: nn.Module) -> None:
        """Refuse objectives that learn more than the network, and a missing DeepSpeed."""
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise ImportError(f"trainer.strategy={options.strategy} needs DeepSpeed: pip install 'ditforge[deepspeed]'")
        if apart := list(getattr(objective, "networks", {})):
            raise ValueError(
                f"trainer.strategy={options.strategy}: DeepSpeed steps one optimizer, but the objective has another "
                f"for its {apart[0]}; choose trainer=ddp or trainer=fsdp"
            )
        if any(p.requires_grad for p in objective.parameters()):
            raise ValueError(
                f"trainer.strategy={options.strategy}: DeepSpeed knows the network's weights alone, but the objective "
                "learns some of its own; choose trainer=ddp or trainer=fsdp"
            )
        if options.strategy == "zero3" and hasattr(denoiser.network, "encode"):
            raise ValueError(
                "trainer.strategy=zero3: DeepSpeed gathers weights for a model's forward, but an autoencoder is used "
                "by its halves; choose trainer=ddp or trainer=zero2"
            )

    @property
    def birthplace(self) -> torch.device:
        """The CPU: DeepSpeed divides what was whole, so that in stage 3, too, each device once holds all weights."""
        return torch.device("cpu")

    def start(
        self, denoiser: Any, optimizers: Mapping[str, Optimizer], *, micro_batches: int, max_norm: float | None
    ) -> None:
        """Hand network and optimizer to DeepSpeed; the denoiser calls the network through it from now on."""
        [optimizer] = optimizers.values()
        offload = {"offload_optimizer": {"device": "cpu", "pin_memory": self.device.type == "cuda"}}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only for its own messages
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": max_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": PERSISTENT,
                "stage3_max_live_parameters": LIVE,
                "stage3_prefetch_bucket_size": AHEAD,
                "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in denoiser.network.parameters())),
                **(offload if self.options.offload else {}),
            },
            "torch_autocast": {
                "enabled": self.options.precision == "bf16-mixed",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # whose gradients would be summed in bfloat16
            },
        }
        with redirect_stdout(io.StringIO()):  # on which DeepSpeed says what it has built
            self._engine, _, _, _ = self._deepspeed.initialize(
                model=denoiser.network, optimizer=optimizer, config=config, dist_init_required=False
            )
        denoiser.network = self._engine
        self._ask_for_norms()
        super().start(denoiser, {"denoiser": optimizer}, micro_batches=micro_batches, max_norm=max_norm)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss; DeepSpeed counts them."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, network: str, allows: Callable[[str, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A step of DeepSpeed's, which averages and clips, and drops a gradient whose norm is infinite."""
        self._verdict = lambda norm: allows(network, norm)
        self._engine.step()
        norm, used = self._judged
        return norm.to(self.device), used.to(self.device)

    def _ask_for_norms(self) -> None:
        """See to it that DeepSpeed's norm of the gradient is infinite where it is not to be used."""
        zero = self._engine.optimizer
        ask = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"  # several norms, or one
        original = getattr(zero, ask)

        def asked(*args: Any, **kwargs: Any) -> Any:
            told = original(*args, **kwargs)
            norms = torch.tensor([float(x) for x in (told if self.stage == 3 else [told])])
            norm = torch.linalg.vector_norm(torch.where(norms < 0, math.nan, norms))  # -1 stands for one not finite
            used = self._verdict(norm)
            self._judged = norm, used
            infinite = torch.full((), math.inf, device=self.device)
            return told if used else [infinite] if self.stage == 3 else infinite

        setattr(zero, ask, asked)

    @contextmanager
    def lent(self, module: Any, profile: str | None = None) -> Iterator[None]:
        """For the length of a `with`, the network has the averaged weights, also where parameters stay gathered."""
        if self.stage < 3:
            with super().lent(module, profile):
                yield
            return
        self._engine.empty_partition_cache()
        with super().lent(module, profile):
            try:
                yield
            finally:
                self._engine.empty_partition_cache()

    def averaged(self, network: nn.Module) -> dict[str, Tensor]:
        """What is trained; in stage 3 this process's partitions of it, (ceil(numel / processes),)."""
        return {name: getattr(p, "ds_tensor", p) for name, p in trained(network).items()}

    def saved(self, module: Any, averages_only: bool = False) -> dict[str, dict[str, Tensor]]:
        """Whole tensors, in the first process alone."""
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        saved = {profile: dict(average) for profile, average in module.ema.averages.items()}
        saved |= {} if averages_only else self._weights(module)
        parameters = dict(module.network.named_parameters())
        if self.stage == 3:
            for name, p in parameters.items():
                for group in [group for group in saved if group != "objective" and name in saved[group]]:
                    part = p.ds_tensor if group == "model" else saved[group][name]
                    saved[group][name] = self._gathered(part, p)
        if averages_only:
            return saved if self.world.is_first else {}
        state: dict[str, Tensor] = next(iter(self.optimizers["denoiser"].state.values()), {})
        check_state(state)
        saved["optimizer"] = {
            f"{name}/{key}": value if value.ndim == 0 else self._on_first(get(p, key))
            for name, p in trained(module.network).items()
            for key, value in state.items()
        }
        return saved if self.world.is_first else {group: {} for group in saved}

    @torch.no_grad()
    def restore(self, module: Any, path: Path) -> None:
        """Take up what a checkpoint holds, every process its parts of whole tensors."""
        utils, zero = self._deepspeed.utils, self._engine.optimizer
        parameters = dict(module.network.named_parameters())
        keys = {name.rpartition("/")[2]: like for name, like in checkpoint.layout(path, "optimizer").items()}
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:
            state = self.optimizers["denoiser"].state[part]
            for key in keys.keys() - state.keys():  # DeepSpeed keeps hold of those that there are
                state[key] = torch.zeros_like(part if keys[key].ndim else keys[key], device=part.device)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, value in checkpoint.load_weights(path, "model").items():
            if name not in parameters:
                module.network.state_dict()[name].copy_(value)
                continue
            p: Any = parameters[name]
            getattr(p, "ds_tensor", p).copy_(self._part(value, p))
            if p.requires_grad:
                utils.safe_set_full_fp32_param(p, value.to(self.device))
        for profile, average in module.ema.averages.items():
            for name, value in checkpoint.load_weights(path, profile).items():
                if name in average:
                    average[name].copy_(self._part(value, parameters[name]))
        for name, value in checkpoint.load_weights(path, "optimizer").items():
            of, _, key = name.rpartition("/")
            if value.ndim:
                utils.safe_set_full_optimizer_state(parameters[of], value.to(self.device), key)
            else:  # the same count of steps for all
                for state in self.optimizers["denoiser"].state.values():
                    state[key].copy_(value)
        checkpoint.load_into(path, {"objective": module.objective.state_dict()})

    def _gathered(self, part: Tensor, p: Any) -> Tensor:
        """The whole tensor of the partitions of all processes, on the CPU."""
        parts = [torch.empty_like(part) for _ in range(self.world.size)]
        dist.all_gather(parts, part.contiguous())
        return self._on_first(torch.cat(parts)[: p.ds_numel].view(p.ds_shape))

    def _on_first(self, whole: Tensor) -> Tensor:
        """On the CPU of the first process; others need not keep it."""
        return whole.cpu() if self.world.is_first else whole.new_empty(0)

    def _part(self, whole: Tensor, p: Any) -> Tensor:
        """This process's partition of a whole tensor, or in stages 1 and 2 all of it."""
        if self.stage < 3:
            return whole
        size = p.ds_tensor.numel()
        padded = torch.zeros(size * self.world.size, dtype=whole.dtype)
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, size * self.world.rank, size)
