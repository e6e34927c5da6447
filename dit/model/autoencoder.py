"""A variational autoencoder: that of diffusers, whose parameter names and files are the published ones."""

from collections.abc import Sequence
from typing import Any


def autoencoder(
    in_channels: int,
    input_size: int,
    latent_channels: int,
    channels: Sequence[int],
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    attention: bool = True,
) -> Any:
    """An `AutoencoderKL`: (B, C, H, W) <-> a posterior over z (B, latent_channels, H / stride, W / stride).

    Args:
        in_channels: of the images, C.
        input_size: height and width of the images it is trained on.
        latent_channels: of z.
        channels: widths, one a level, each of half the height: stride = 2^(levels - 1).
        layers_per_block: residual blocks a level, and one more in the decoder.
        norm_num_groups: groups of the normalizations; they divide each of channels.
        attention: at the least height.

    Raises:
        ImportError: if diffusers is missing.
        ValueError: if the sizes do not go together.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("an autoencoder needs diffusers: pip install 'ditforge[diffusers]'") from error
    stride = 2 ** (len(channels) - 1)
    if not channels or input_size % stride:
        raise ValueError(
            f"model.channels={list(channels)} halve the height of {input_size} pixels {len(channels) - 1} times, which "
            "does not go: take fewer"
        )
    if any(width % norm_num_groups for width in channels):
        raise ValueError(f"model.norm_num_groups={norm_num_groups} must divide each of model.channels={list(channels)}")
    return AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        latent_channels=latent_channels,
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=attention,
        sample_size=input_size,
    )
