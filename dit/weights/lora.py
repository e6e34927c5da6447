"""Low-rank additions to frozen weights (LoRA, arXiv:2106.09685)."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from torch import Tensor, nn

from dit.weights.convert import UNHEEDED

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NAME = "default"  # peft's, of the only adapter


def adapted(network: nn.Module, rank: int, targets: Sequence[str]) -> nn.Module:
    """A network of which y = W x becomes y = W x + B A x in some layers, A and B alone trained; changed in place.

    A (rank, in) is drawn and B (out, rank) is zero, so that it begins as it was. The paper's factor alpha / rank is 1:
    how fast they learn is said by the learning rate. The embedders of where a step lands and of guidance, if there are
    some, are trained, too.

    Args:
        network: on any device, meta included.
        rank: of B A.
        targets: the layers, by the ends of their names, like attn.qkv.

    Raises:
        ValueError: if rank is less than 1, or there is no such layer.
        ImportError: if peft is missing, an optional dependency.
    """
    if rank < 1:
        raise ValueError(f"adapter.rank={rank} must be at least 1")
    there = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    found = [name for name in there if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not found:
        ends = sorted({".".join(name.split(".")[-2:]) for name in there})
        raise ValueError(
            f"adapter.targets=[{','.join(targets)}]: {type(network).__name__} has no such layer; choose the ends of "
            f"names, of {', '.join(ends)}"
        )
    if find_spec("peft") is None:
        raise ImportError("adapter=lora needs peft: pip install 'ditforge[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=found), network, NAME)
    for name, p in network.named_parameters():
        p.requires_grad_(".lora_" in name or name.startswith(UNHEEDED))  # empty ones say nothing
    return network


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapted network as those of a plain one, W + B A; those of a plain one as they are.

    Args:
        state: a state dict, which stays as it is.
    """
    new = {}
    for name, value in state.items():
        layer, frozen, leaf = name.partition(".base_layer.")
        if frozen and leaf == "weight":
            a, b = (state[f"{layer}.lora_{factor}.{NAME}.weight"].flatten(1) for factor in "AB")
            value = value + (b @ a).view_as(value)
        if ".lora_" not in name:
            new[f"{layer}.{leaf}" if frozen else name] = value
    return new
