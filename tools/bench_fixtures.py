"""What benches make up, where there is neither a hub nor ImageNet: weights, a VAE, and shards of latents."""

import io
import itertools
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dit.command import encode
from dit.command.compose import compose
from dit.data.writer import write_shards

CHANNELS, STRIDE = 4, 8  # of Stable Diffusion's VAE


def trained(network: Any) -> Any:
    """A network as it is after some training, where nothing is zero."""
    torch.manual_seed(0)
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    return network


def vae(folder: Path, channels: int = CHANNELS, stride: int = STRIDE) -> None:
    """A small random VAE."""
    import diffusers

    number = stride.bit_length()  # of blocks, each but the last of which halves
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * number, "up_block_types": ("UpDecoderBlock2D",) * number}
    sizes: dict[str, Any] = {"block_out_channels": (8,) * number, "norm_num_groups": 4, "layers_per_block": 1}
    torch.manual_seed(0)
    made: Any = diffusers.AutoencoderKL(**blocks, **sizes, latent_channels=channels, sample_size=256)
    made.save_pretrained(folder)


def latents(
    folder: Path, number: int, shards: int, size: int = 256, channels: int = CHANNELS, stride: int = STRIDE
) -> Path:
    """Shards of latents of random pictures and of their mirror images, as `dit encode` leaves them, and `vae` beside.

    Args:
        folder: is given `latents` and `vae`.
        number: of samples.
        shards: among which they are divided, at most.
        size: of the pictures.
        channels: of the latents.
        stride: pixels to one of a latent.
    """
    rng, files = np.random.default_rng(0), []
    for _ in range(16):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    pictures = ({"jpg": picture, "cls": b"1"} for picture in itertools.islice(itertools.cycle(files), number))
    write_shards(folder / "images", pictures, -(-number // shards))
    vae(folder / "vae", channels, stride)
    words = ["data=shards", f"data.path={folder}/images", f"data.image_size={size}", "data.num_classes=1000"]
    words += ["latent=sd_vae", f"latent.name={folder}/vae", f"latent.channels={channels}", f"latent.stride={stride}"]
    cfg: Any = compose("encode", [*words, f"out={folder}/latents"])
    with redirect_stdout(io.StringIO()):
        assert encode.main(cfg) == 0
    return folder / "latents"
