"""How a run is spread over devices: beside the model, which is plain code for a single one.

What is asked of a strategy is the same for all: make the network ready, take the gradient of a loss, take a step, and
say in neutral form, of full names and global sizes, what there is to average and to save. So a checkpoint of one
strategy is loaded by any other. The order in which a network is made ready is: tensor parallel, float8, activation
checkpointing, compile, shard, and only then numbers, so that no device ever holds more than its share.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dit.train import checkpoint, float8
from dit.train.execution import arrange
from dit.train.world import World

BUCKET_BYTES = 2**25


class Strategy:
    """One device, or several that each have the whole network and average their gradients (data parallel, DDP).

    Args:
        options: the node `trainer` of the configuration.
        world: the processes.
        device: of this process.
    """

    needs_group = False  # of processes, though there be only one

    def __init__(self, options: DictConfig, world: World, device: torch.device):
        self.options = options
        self.world = world
        self.device = device

    @classmethod
    def check(cls, options: DictConfig, denoiser: Any, objective: nn.Module) -> None:
        """Refuse what cannot be trained so, before anything is made.

        Args:
            options: the node `trainer`.
            denoiser: on the meta device.
            objective: with its `networks`.

        Raises:
            ValueError: with the reason and the way out.
        """

    @property
    def birthplace(self) -> torch.device:
        """Where the first weights are made."""
        return self.device

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this process sees."""
        return self.world.rank // self.options.tensor_parallel_size

    @property
    def data_size(self) -> int:
        """In how many parts a global batch is divided among processes."""
        return self.world.size // self.options.tensor_parallel_size

    def begin(self, denoiser: Any, init: Mapping[str, Tensor] | None, seed: int) -> nn.Module:
        """Make a denoiser's network ready, and give it its first weights: `init`, or else drawn from the seed.

        Args:
            denoiser: on the meta device, or with weights where its network cannot draw them afterwards.
            init: full tensors by name.
            seed: of the draws; they are the same under all strategies.

        Returns:
            The network, whose names are those of checkpoints.
        """
        network: nn.Module = denoiser.network
        self.divide(network)
        self.arrange(network, self.options)
        self.shard(network)
        if any(p.is_meta for p in network.parameters()):
            network.to_empty(device=self.birthplace)
            self.draw(network, seed)
        if init is not None:
            there = network.state_dict()
            assert init.keys() == there.keys()
            for name, value in init.items():
                self.put(there[name], value, name)
        return network

    @torch.no_grad()
    def draw(self, network: Any, seed: int) -> None:
        """Draw the first weights."""
        torch.manual_seed(seed)
        with _Whole():
            network.reset_parameters()

    @staticmethod
    def arrange(network: nn.Module, options: DictConfig) -> None:
        """Set how the network is executed on its device."""
        if options.float8 != "none":
            float8.convert(network, emulate=options.float8 == "emulate")
        arrange(
            network,
            checkpointing=options.activation_checkpointing,
            compile=options.compile,
            channels_last=options.channels_last,
        )

    def divide(self, network: nn.Module) -> None:
        """Divide the work within the network's units; here nothing is."""

    def shard(self, network: nn.Module) -> None:
        """Divide the weights; here nothing is."""

    @torch.no_grad()
    def put(self, tensor: Tensor, whole: Tensor, name: str) -> None:
        """Copy a full tensor, which all processes have, into this process's part of it."""
        fill(tensor, whole)

    def start(
        self, denoiser: Any, optimizers: Mapping[str, Optimizer], *, micro_batches: int, max_norm: float | None
    ) -> None:
        """Take note of the optimizers, when all parameters are where they belong.

        Args:
            denoiser: whose network `begin` gave.
            optimizers: by the names of their networks, `denoiser` the first.
            micro_batches: how many `backward` come before a step.
            max_norm: gradients are clipped to it; None leaves them.
        """
        self.optimizers = dict(optimizers)
        self.max_norm = max_norm

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss."""
        loss.backward()

    def step(self, network: str, allows: Callable[[str, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Average the gradients over processes, clip them, step one network's optimizer, and drop all gradients.

        Args:
            network: whose optimizer.
            allows: (network, norm) -> whether the gradient is used, (), see `Guard.allows`.

        Returns:
            The norm of the gradient before clipping, (), and whether it was used, ().
        """
        optimizer = self.optimizers[network]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._average([p.grad for p in parameters if not isinstance(p, DTensor)])
        norm = clip(parameters, self.max_norm)
        used = allows(network, norm)
        if used.is_cuda and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~used).float()  # type: ignore[attr-defined]  # told on the device, as GradScaler does
            optimizer.step()
        elif used:
            optimizer.step()
        for other in self.optimizers.values():
            other.zero_grad()
        return norm, used

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Over the processes that see other parts of the batch, in place."""
        if self.data_size == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=self._data_group())
            flat /= self.data_size
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def _data_group(self) -> Any:
        """Of the processes that see other parts of the batch; None is all."""
        return None

    def averaged(self, network: nn.Module) -> dict[str, Tensor]:
        """What a moving average follows: this process's parts of the parameters that are trained, by name."""
        return trained(network)

    @contextmanager
    def lent(self, module: Any, profile: str | None = None) -> Iterator[None]:
        """For the length of a `with`, the module's network has averaged weights, by default of the first profile."""
        with module.ema.applied(profile):
            yield

    def saved(self, module: Any, averages_only: bool = False) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by group and name, in neutral form: plain tensors, or DTensors.

        The groups are `model`, each profile of the moving average, `optimizer` or `optimizer-<network>` with names
        `<parameter>/<what>`, and `objective`.

        Args:
            module: a `DiffusionModule`.
            averages_only: leave all others out.

        Raises:
            ValueError: if an optimizer keeps what is no tensor.
        """
        return self._neutral(module.ema.averages if averages_only else self._held(module))

    @torch.no_grad()
    def restore(self, module: Any, path: Path) -> None:
        """Take up what a checkpoint holds.

        Args:
            module: a `DiffusionModule`, as it begins.
            path: of the checkpoint, whatever strategy saved it.
        """
        for network, optimizer in self.optimizers.items():
            self._allocate(optimizer, self._names(module, network), checkpoint.layout(path, group_of(network)))
        held = self._held(module)
        read = self._neutral(held)
        checkpoint.load_into(path, read)
        for group, values in held.items():
            for name, value in values.items():
                if read[group][name] is not value:
                    self.put(value, read[group][name], name)

    def _neutral(self, held: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """All of them so."""
        return {group: {name: self.neutral(name, value) for name, value in held[group].items()} for group in held}

    def neutral(self, name: str, value: Tensor) -> Tensor:
        """A tensor as checkpoints hold it: itself, unless its layout is our own."""
        return value

    def _held(self, module: Any) -> dict[str, dict[str, Tensor]]:
        """The state of a module as it is."""
        held = self._weights(module)
        for network, optimizer in self.optimizers.items():
            names = self._names(module, network)
            state = {f"{names[p]}/{key}": value for p, kept in optimizer.state.items() for key, value in kept.items()}
            check_state(state)
            held[group_of(network)] = state
        return held

    @staticmethod
    def _weights(module: Any) -> dict[str, dict[str, Tensor]]:
        """All but the optimizers'."""
        held = {"model": dict(module.network.state_dict()), "objective": dict(module.objective.state_dict())}
        return held | {profile: dict(average) for profile, average in module.ema.averages.items()}

    @staticmethod
    def _names(module: Any, network: str) -> dict[Tensor, str]:
        """Of the parameters of one network's optimizer."""
        if network != "denoiser":
            return {p: name for name, p in module.objective.networks[network].named_parameters()}
        names = {p: f"objective.{name}" for name, p in module.objective.named_parameters()}
        return names | {p: name for name, p in module.network.named_parameters()}

    @staticmethod
    def _allocate(optimizer: Optimizer, names: Mapping[Tensor, str], layout: Mapping[str, Tensor]) -> None:
        """Make room for a state of this layout, divided as the parameters are."""
        parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for name, like in layout.items():
            of, _, key = name.rpartition("/")
            p = parameters[of]
            if like.shape == p.shape and key != "step":
                optimizer.state[p][key] = torch.zeros_like(p, dtype=like.dtype, requires_grad=False)
            else:  # counts of steps are where torch makes them
                device = p.device if key != "step" or on_device else torch.device("cpu")
                optimizer.state[p][key] = torch.zeros_like(like, device=device)


def check_state(state: Mapping[str, Any]) -> None:
    """See that an optimizer's state can be saved.

    Raises:
        ValueError: if it has what is no tensor.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the optimizer keeps {name}={value!r}, which is no tensor and cannot be saved: choose another one, "
                "like torch.optim.AdamW"
            )


def trained(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def by_layout(parameters: Sequence[Tensor]) -> list[dict[str, list[Tensor]]]:
    """Those to be trained, as groups for an optimizer, which cannot take DTensors of different meshes together."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.requires_grad:
            groups[p.device_mesh if isinstance(p, DTensor) else None].append(p)
    return [{"params": group} for group in groups.values()]


def group_of(network: str) -> str:
    """What checkpoints call the state of a network's optimizer."""
    return "optimizer" if network == "denoiser" else f"optimizer-{network}"


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of a full tensor, laid out as another: divided among the mesh's last dimension first.

    That is how sharding over tensor parallel divides (`_StridedShard`), and with one dimension there is no order.
    """
    mesh, coordinate = like.device_mesh, like.device_mesh.get_coordinate()
    assert coordinate is not None
    for i in reversed(range(mesh.ndim)):
        if (dim := getattr(like.placements[i], "dim", None)) is not None:
            parts = whole.chunk(mesh.size(i), dim)
            at = coordinate[i]
            whole = parts[at] if at < len(parts) else whole.narrow(dim, 0, 0)
    return whole


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy this process's part of a full tensor."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(local_part(whole, tensor))
    else:
        tensor.copy_(whole)


def clip(parameters: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients down to a norm, None leaves them; their norm before, over all processes that share them, ().

    DTensors of different meshes, and plain tensors, are counted apart, as no operation takes them together.
    """
    kinds = [group["params"] for group in by_layout(parameters)]
    norms = []
    for same in kinds:
        norm = torch.nn.utils.get_total_norm([p.grad for p in same if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for same in kinds:
            torch.nn.utils.clip_grads_with_norm_(same, max_norm, norm)
    return norm


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one type each, large enough to be worth a message."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (bucket[0].dtype != gradient.dtype or sum(g.nbytes for g in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


class _Whole(TorchFunctionMode):
    """Draws into tensors as if they were whole and on the CPU: one at a time, of which each process keeps its part.

    So the numbers are the same on all kinds and numbers of devices.
    """

    FUNCTIONS = (Tensor.normal_, Tensor.uniform_, Tensor.copy_)  # and all of torch.nn.init

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        changes = getattr(func, "__module__", None) == "torch.nn.init" or func in self.FUNCTIONS
        elsewhere = isinstance(target, DTensor) or (isinstance(target, Tensor) and target.device.type != "cpu")
        if not (changes and elsewhere):
            return func(*args, **kwargs)
        whole = torch.empty(target.shape, dtype=target.dtype, device="cpu")
        if args:
            func(whole, *args[1:], **kwargs)
        else:
            func(**{**kwargs, "tensor": whole})
        fill(target, whole)
        return target
