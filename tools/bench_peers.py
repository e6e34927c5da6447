"""What benches of training measure beside ours: diffusers' DiT, and one as the published code has it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit.model.dit import DiT
from dit.model.layers import Mlp, modulate
from dit.weights.convert import dit_to_diffusers

PEERS = ("diffusers", "published")


def check(network: Any, peers: Sequence[str]) -> None:
    """See that a network can be measured, and that others have the same.

    Raises:
        ValueError: if not.
    """
    if not isinstance(network, DiT):
        raise ValueError(f"{type(network).__name__}: DiTs are what is measured here, take model=dit_s_2")
    block: Any = network.blocks[0]
    plain = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
    if peers and not (isinstance(block.mlp, Mlp) and {name for name, _ in block.named_children()} == plain):
        raise ValueError("--against: others have the published DiT alone, take model=dit_s_2, or leave it out")


def diffusers_network(ours: Any) -> Any:
    """Its `DiTTransformer2DModel`, with the weights of ours."""
    from diffusers import DiTTransformer2DModel

    attention = ours.blocks[0].attn
    network: Any = DiTTransformer2DModel(
        num_attention_heads=attention.num_heads,
        attention_head_dim=attention.proj.in_features // attention.num_heads,
        in_channels=ours.x_embedder.proj.in_channels,
        out_channels=ours.out_channels,
        num_layers=len(ours.blocks),
        sample_size=round(ours.pos_embed.shape[1] ** 0.5) * ours.patch_size,
        patch_size=ours.patch_size,
        num_embeds_ada_norm=ours.y_embedder.embedding_table.num_embeddings - 1,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        norm_eps=1e-6,
    )
    network.load_state_dict(dit_to_diffusers(ours.state_dict()))
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as published
    return network.train()


def diffusers_average(network: nn.Module) -> Callable[[], None]:
    """One update by its `EMAModel` as it is by default, called as its training examples do."""
    from diffusers.training_utils import EMAModel

    average = EMAModel(network.parameters())
    return lambda: average.step(network.parameters())


class PublishedBlock(nn.Module):
    """A block of timm's attention and MLP, like that of the published code, with the parameter names of ours."""

    def __init__(self, ours: Any):
        from timm.layers import Attention
        from timm.layers import Mlp as TimmMlp

        super().__init__()
        gelu: Any = partial(nn.GELU, approximate="tanh")
        width = ours.attn.proj.in_features
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, ours.attn.num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = TimmMlp(width, ours.mlp.fc1.out_features, act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, *_: None) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


def published_network(ours: Any) -> Any:
    """The network of blocks and patches as published, with the weights of ours; the rest is ours."""
    from timm.layers import PatchEmbed

    network = copy.deepcopy(ours)
    conv = ours.x_embedder.proj
    network.x_embedder = PatchEmbed(None, ours.patch_size, conv.in_channels, conv.out_channels)
    network.blocks = nn.ModuleList(PublishedBlock(block) for block in network.blocks)
    network.load_state_dict(ours.state_dict())
    return network


def published_average(network: nn.Module, decay: float = 0.9999) -> Callable[[], None]:
    """One update, parameter by parameter."""
    averages = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update() -> None:
        for name, p in network.named_parameters():
            averages[name].mul_(decay).add_(p.data, alpha=1 - decay)

    return update


@contextmanager
def tf32() -> Iterator[None]:
    """For the length of a `with`, a GPU's products in float32 may be by TF32, as the published recipe allows."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
