"""Published checkpoints, in our convention: foreign ones are converted here and nowhere else.

What `conf/init` names takes a path and returns a state dict with our names; `fitted` makes it one of a given network.
"""

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.model.layers import sincos_positions, sinusoid

WITHIN = ("ema", "model_ema1", "model", "state_dict")  # what a checkpoint calls its weights, averages first
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = SINGLE.replace(".safetensors", INDEX_SUFFIX)
TABLE = "y_embedder.embedding_table.weight"
LABELS = {TABLE: 1, "label_emb.weight": 0}  # and how many rows are for no class
EXACT = 1e-6  # of a layer's greatest output: less than float32 shows
# Embedders that most weights do not have: of where a step lands, and of the scale of guidance.
UNHEEDED = ("gap_embedder.", "scale_embedder.")
OUTPUTS = tuple(f"{part}.{leaf}" for part in ("final_layer.linear", "out.2") for leaf in ("weight", "bias"))
# Our names, and those of diffusers' DiTTransformer2DModel: of the network, of each block, and what all blocks repeat.
WHOLE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}
REPEATED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file or a folder, on the CPU and by the names they have there.

    Of a checkpoint that holds several, the averaged ones; without what DDP, `torch.compile` and JiT's sampler put
    before the names.

    Args:
        path: a `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` file, or a folder of diffusers: a model's, or a
            pipeline's with its `transformer` or `unet`.

    Raises:
        ValueError: if there is none, it is damaged, or holds anything that could run code.
    """
    path = Path(path)
    file = _model_file(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no such file or folder; download the weights there, or correct the path")
    if file.suffix not in SUFFIXES and not file.name.endswith(INDEX_SUFFIX):
        raise ValueError(f"{path}: expected one of {', '.join(SUFFIXES)}, or a folder of diffusers")
    try:
        found = _loaded(file)
    except Exception as error:  # torch raises many kinds
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            way_out = "if you trust it, torch.load(..., weights_only=False) it once and save its state dict alone"
            raise ValueError(f"{path} holds pickled objects, which could run code: {way_out}") from error
        reason = re.split(r"\. |Re-running|\n", f"{type(error).__name__}: {error}")[0][:150]
        raise ValueError(f"{file} cannot be read as weights, get it anew ({reason})") from error
    if isinstance(found, Mapping):
        found = next((found[name] for name in WITHIN if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} holds no state dict, nor one as {', '.join(WITHIN)}: save the network's state_dict()")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} is no state dict, {name} is a {type(value).__name__}: save state_dict() alone")
    prefixes = re.compile(r"^(module\.|_orig_mod\.|net\.)+|(?<=\.)_orig_mod\.")
    return {prefixes.sub("", name): value for name, value in found.items()}


def published(path: str | Path) -> dict[str, Tensor]:
    """DiT (arXiv:2212.09748), and ADM (arXiv:2105.05233) in the new order of attention: as they are.

    Raises:
        ValueError: as `read`.
    """
    return read(path)


def adm_legacy(path: str | Path, head_channels: int | None = 64, num_heads: int | None = None) -> dict[str, Tensor]:
    """ADM (arXiv:2105.05233) in the legacy order of attention, as all published but the 64 px one.

    Args:
        path: see `read`.
        head_channels: channels of a head.
        num_heads: heads, instead, as in the 128 px model.

    Raises:
        ValueError: as `read`, or if heads do not divide a width.
    """
    return new_attention_order(read(path), None if num_heads else head_channels, num_heads)


def diffusers_dit(path: str | Path) -> dict[str, Tensor]:
    """The DiTTransformer2DModel of a diffusers folder, with the table of positions that its configuration stands for.

    Raises:
        ValueError: as `read` and `dit_from_diffusers`, or if there is no `config.json`.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: give the model's folder, whose config.json tells the size of its input")
    config = _model_file(path).parent / "config.json"
    try:
        sample_size = int(json.loads(config.read_text())["sample_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} must tell sample_size: give a folder that diffusers saved") from error
    return dit_from_diffusers(read(path), sample_size)


def sit(path: str | Path) -> dict[str, Tensor]:
    """SiT (arXiv:2401.08740) and LightningDiT (arXiv:2501.01423), for noise=flow and prediction=flow.

    They have the data at t = 1 and predict v = x0 - eps. Converted exactly: F(x, t) = -v(x, 1 - t), the sign in the
    output layer, the time in the first layer of its embedder. SiT's unused second half of the channels stays.

    Raises:
        ValueError: as `read`, or if it is another network.
    """
    state = _time_reversed(read(path))
    _, channels, patch_size, _ = _part(state, "x_embedder.proj.weight").shape
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = _part(state, name).unflatten(0, (patch_size**2, -1))  # (p q, C or 2C, ...)
        state[name] = torch.cat([-rows[:, :channels], rows[:, channels:]], dim=1).flatten(0, 1)
    return state


def jit(path: str | Path) -> dict[str, Tensor]:
    """JiT (arXiv:2511.13720), for noise=flow and prediction=x0: it has the data at t = 1, F(x, t) = JiT(x, 1 - t).

    That of 256 px: the 512 px one was trained with noise of standard deviation 2, which noise=flow does not have.

    Raises:
        ValueError: as `read`, or if it is another network.
    """
    return _time_reversed(read(path))


def new_attention_order(
    state: Mapping[str, Tensor], head_channels: int | None = None, num_heads: int | None = None
) -> dict[str, Tensor]:
    """The weights of a published ADM (arXiv:2105.05233) whose attention has heads first, in our order.

    There, output channels of qkv count (head, q k v, channel), here (q k v, head, channel). All published ones are to
    be converted but the 64 px one, which has our order already (`--use_new_attention_order True`).

    Args:
        state: a state dict, which stays as it is.
        head_channels: channels of a head.
        num_heads: heads, where head_channels is None, as in the 128 px model and the 64 to 256 px upsampler.

    Raises:
        ValueError: unless one of head_channels and num_heads is given, and divides all widths.
    """
    if (head_channels is None) == (num_heads is None):
        raise ValueError(f"head_channels={head_channels} and num_heads={num_heads}: give one of the two")
    new = dict(state)
    for name, value in state.items():
        if name.endswith((".qkv.weight", ".qkv.bias")):
            width = len(value) // 3
            size = head_channels or num_heads
            assert size is not None
            if width % size:
                given = f"head_channels={head_channels}" if head_channels else f"num_heads={num_heads}"
                raise ValueError(f"{given} does not divide the width {width} of {name}: read the checkpoint's flags")
            heads = num_heads or width // size
            new[name] = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return new


def dit_from_diffusers(state: Mapping[str, Tensor], sample_size: int | None = None) -> dict[str, Tensor]:
    """The weights of diffusers' DiTTransformer2DModel, as our DiT's.

    Args:
        state: its state dict.
        sample_size: height and width of its input, of which it computes its table of positions. None: without the
            table, which `fitted` makes at the network's size.

    Raises:
        ValueError: if it is another model, or its blocks do not have the same embedders of time and label.
    """
    new: dict[str, Tensor] = {}
    state = dict(state)
    table = state.pop("pos_embed.pos_embed", None)  # old versions kept it
    names = _names(state)
    _check_names(state, [name for theirs in names.values() for name in theirs], "diffusers' DiTTransformer2DModel")
    for ours, theirs in names.items():
        values = [state[name] for name in theirs]
        if ours.startswith("blocks."):
            new[ours] = torch.cat(values)
            continue
        new[ours] = values[0]
        for name, value in zip(theirs, values, strict=True):
            if not torch.equal(value, values[0]):
                raise ValueError(f"{name} differs from {theirs[0]}: our DiT has one {ours} for all blocks")
    if table is None and sample_size is not None:
        width, _, patch_size, _ = new["x_embedder.proj.weight"].shape
        table = sincos_positions(width, sample_size // patch_size).to(new["x_embedder.proj.weight"].dtype)
    return new if table is None else new | {"pos_embed": table}


def dit_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of our DiT, as of diffusers' DiTTransformer2DModel, which loads them strictly.

    Note that its frequencies of time are exponents over 127, where published and ours are over 128: unless it was
    trained with `closed_frequencies`, or they were converted to them by the function of this name, a network answers
    a little differently there.

    Raises:
        ValueError: if the network has what that has not, or lacks what it has: switches of our DiT, no labels, another
            table of positions.
    """
    state = dict(state)
    table = state.pop("pos_embed", None)
    names = _names(state)
    _check_names(state, list(names), "a plain DiT with labels (diffusers has no other)")
    if table is not None:
        fixed = sincos_positions(table.shape[-1], _side(table))
        if not torch.allclose(table.float(), fixed, atol=1e-5 if table.dtype == torch.float32 else 1e-2):
            raise ValueError("pos_embed is not the fixed table, the only one that DiTTransformer2DModel has")
    new: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        # Copies, since safetensors refuses what shares memory.
        values = state[ours].chunk(len(theirs)) if ours.startswith("blocks.") else [state[ours]] * len(theirs)
        new |= {name: value.clone() for name, value in zip(theirs, values, strict=True)}
    return new


def padded_labels(state: Mapping[str, Tensor], none: int) -> dict[str, Tensor]:
    """The weights of our DiT with a table of labels in which `none`, and all before it that is no class, means none."""
    table = _part(state, TABLE)  # (classes + 1, D)
    return dict(state) | {TABLE: torch.cat([table[:-1], table[-1:].expand(none + 2 - len(table), -1)])}


def unpadded_labels(state: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """The opposite of `padded_labels`."""
    table = _part(state, TABLE)
    return dict(state) | {TABLE: torch.cat([table[:num_classes], table[-1:]])}


def closed_frequencies(state: Mapping[str, Tensor], told: Tensor) -> dict[str, Tensor]:
    """The weights of our DiT for the frequencies of time of `closed_frequencies`, which are those of diffusers.

    The first layer of the embedder is fitted anew, the least change that says the same of what it is told. That is
    exact where times are few, or from a short interval, as those of flow: there the frequencies say the same.

    Args:
        state: a state dict, which stays as it is.
        told: what the network is told of the times at which it will be asked, (N,).

    Raises:
        ValueError: if the two differ there.
    """
    name = "t_embedder.mlp.0.weight"
    weight = _part(state, name).double()  # (D, cosines and sines)
    ours, theirs = (sinusoid(told.double(), weight.shape[1], closed=closed) for closed in (False, True))  # (N, ...)
    u, scale, v = torch.linalg.svd(theirs, full_matrices=False)
    kept = scale > 1e-9 * scale[0]
    missing = (ours - theirs) @ weight.T  # (N, D)
    new = weight + ((v[kept].T / scale[kept]) @ (u[:, kept].T @ missing)).T
    off = (theirs @ new.T - ours @ weight.T).abs().max() / (ours @ weight.T).abs().max().clamp(min=1e-12)
    if off > EXACT:
        raise ValueError(
            f"the frequencies of time of diffusers cannot say what ours do at {len(told)} times of sampling (they miss "
            f"it by {100 * off:.2g} %): take fewer steps, or train with model.closed_frequencies=true"
        )
    return dict(state) | {name: new.to(state[name].dtype)}


def interpolated(pos_embed: Tensor, side: int) -> Tensor:
    """A table of positions at another resolution, bicubic: (1, n^2, D) -> (1, side^2, D).

    Raises:
        ValueError: if it is not of a square.
    """
    old = _side(pos_embed)
    if old == side:
        return pos_embed
    image = pos_embed.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, n, n)
    image = F.interpolate(image, (side, side), mode="bicubic")  # (1, D, side, side)
    return image.flatten(2).transpose(1, 2).to(pos_embed.dtype)


def fitted(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights as a network needs them, for `load_state_dict`.

    A table of positions of another resolution is interpolated, one that is not there is the fixed one; a learned
    variance is dropped where the network has none; a network that is told where it lands, or the scale of guidance,
    does not heed it at first.

    Args:
        state: a state dict with our names, which stays as it is.
        network: a DiT or UNet, on any device, meta included.

    Raises:
        ValueError: if classes, names or shapes differ, naming both sides, or a number is not finite.
    """
    new, needed = dict(state), network.state_dict()
    for name, value in new.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name} in the weights is not finite floating point numbers: get them anew")
    for name, extra in LABELS.items():
        if name in new and name in needed and len(new[name]) != len(needed[name]):
            has, classes = len(new[name]) - extra, len(needed[name]) - extra
            raise ValueError(f"the weights have {has} classes, but the network num_classes={classes}: set it to {has}")
    if "pos_embed" in needed:
        _, tokens, width = needed["pos_embed"].shape
        new.setdefault("pos_embed", sincos_positions(width, round(tokens**0.5)))
        if new["pos_embed"].shape[::2] == (1, width):
            new["pos_embed"] = interpolated(new["pos_embed"], round(tokens**0.5))
    for name, value in needed.items():
        if name.startswith(UNHEEDED) and name not in new:
            new[name] = _unheeded(name, value)
    learn_sigma, channels = getattr(network, "learn_sigma", None), getattr(network, "out_channels", 0)
    for name in OUTPUTS:
        if learn_sigma is None or name not in new or name not in needed:
            continue
        if learn_sigma and 2 * len(new[name]) == len(needed[name]):
            switch = "but the network learn_sigma=true: set it to false"
            raise ValueError(f"the weights have no learned variance ({name} {_shape(new[name])}), {switch}")
        if not learn_sigma and len(new[name]) == 2 * len(needed[name]):
            new[name] = new[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)  # DiT's are (p, q, c)
    _check_names(new, needed, "the network")
    differ = [name for name in needed if new[name].shape != needed[name].shape]
    if differ:
        shapes = [f"{n}: {_shape(new[n])} in the weights, {_shape(needed[n])} in the network" for n in differ]
        raise ValueError(f"the weights do not fit the network: {_first(shapes, '; ')}; correct the model's sizes")
    return new


def _model_file(path: Path) -> Path:
    """The weights in the folder of a diffusers model, or of a pipeline with one."""
    for folder in (path, path / "transformer", path / "unet"):
        for file in (folder / INDEX, folder / SINGLE, folder / "diffusion_pytorch_model.bin"):
            if file.is_file():
                return file
    raise ValueError(f"{path}: no folder of a diffusers model (config.json and {SINGLE}), nor of a pipeline with one")


def _loaded(file: Path) -> object:
    if file.suffix not in (".safetensors", ".json"):
        with torch.serialization.safe_globals([Namespace]):  # published training scripts save their arguments as one
            # The files of old versions are no archives and cannot be mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    from safetensors.torch import load_file

    files = {file}
    if file.suffix == ".json":
        files = {file.parent / shard for shard in json.loads(file.read_text())["weight_map"].values()}
    return {name: value for file in files for name, value in load_file(file).items()}


def _part(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the weights have no {name}, they are of another network: choose another option of init")
    return state[name]


def _unheeded(name: str, like: Tensor) -> Tensor:
    """A tensor of a new embedder, whose second layer is zero, and whose first must not be."""
    if not name.endswith(".mlp.0.weight"):
        return torch.zeros(like.shape)
    return 0.02 * torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def _time_reversed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Told t, it does what it did at 1 - t.

    cos w (1 - t) = cos w cos wt + sin w sin wt and sin w (1 - t) = sin w cos wt - cos w sin wt are linear in what it is
    told, so that the first layer takes them. Buffers of rotary positions are left out: our networks compute them.
    """
    name = "t_embedder.mlp.0.weight"
    weight = _part(state, name)  # (D, cosines and sines)
    cos, sin = sinusoid(torch.ones(1), weight.shape[1]).double().chunk(2, dim=1)
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    new = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    kept = {n: v for n, v in state.items() if not n.startswith(("feat_rope.", "feat_rope_incontext."))}
    return kept | {name: new.to(weight.dtype)}


def _names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Our names, and the one or several of diffusers, for as many blocks as either has."""
    found = (re.match(r"(?:transformer_)?blocks\.(\d+)\.", name) for name in state)
    depth = len({match[1] for match in found if match})
    parts = {ours: [theirs] for ours, theirs in WHOLE.items()}
    for ours, repeated in REPEATED.items():
        parts[ours] = [f"transformer_blocks.{i}.norm1.emb.{repeated}" for i in range(depth)]
    for i in range(depth):
        parts |= {f"blocks.{i}.{ours}": [f"transformer_blocks.{i}.{name}" for name in BLOCK[ours]] for ours in BLOCK}
    leaves = {ours: ("weight",) if ours.endswith("table") else ("weight", "bias") for ours in parts}
    return {f"{ours}.{leaf}": [f"{name}.{leaf}" for name in parts[ours]] for ours in parts for leaf in leaves[ours]}


def _check_names(state: Mapping[str, Tensor], needed: Mapping[str, Tensor] | list[str], whose: str) -> None:
    """Names of the one that the other has not, with shapes where they are known."""
    shapes = needed if isinstance(needed, Mapping) else {}
    lacks = [f"{name} {_shape(shapes[name])}" if name in shapes else name for name in needed if name not in state]
    extra = [f"{name} {_shape(state[name])}" for name in state if name not in needed]
    if lacks or extra:
        found = [f"{whose} has {_first(lacks)}, which the weights lack"] if lacks else []
        found += [f"the weights have {_first(extra)}, which {whose} lacks"] if extra else []
        raise ValueError(f"{'; '.join(found)}: choose the model and the options that the weights were trained with")


def _first(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + more


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _side(pos_embed: Tensor) -> int:
    side = round(pos_embed.shape[1] ** 0.5)
    if side**2 != pos_embed.shape[1]:
        raise ValueError(f"pos_embed {_shape(pos_embed)} has {pos_embed.shape[1]} tokens, which are no square")
    return side
