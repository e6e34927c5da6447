"""dit sample: draw images with the weights of a run, or edit a picture."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from dit.command.compose import ConfigError, user_errors
from dit.command.existing import check_picture, check_run, check_writable, execution, load, offer
from dit.train import saved
from dit.train.kind import check_denoiser

if TYPE_CHECKING:
    from torch import Tensor

    from dit.condition.condition import Condition
    from dit.sampler.pipeline import Pipeline
    from dit.train.loaded import Loaded

prepare = offer
VERBATIM = ("prompt", "negative_prompt")  # keys whose values are text, whatever they hold


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    with user_errors():
        check_denoiser(saved.config(Path(cfg.runs_dir) / cfg.run))
    shares = ("strength", "variation", "noise_level")
    check_run(cfg, {"num_images": 1, "resample": 1, "interpolate_to": 0, **dict.fromkeys(shares, 0.0)})
    if cfg.out is not None:
        check_picture(cfg.out)
    for key in shares:
        if cfg[key] is not None and cfg[key] > 1:
            raise ConfigError(f"{key}={cfg[key]} must lie in [0, 1]")
    prompts = list(cfg.prompt) if isinstance(cfg.prompt, ListConfig) else [cfg.prompt]
    for key, values in {"prompt": prompts, "negative_prompt": [cfg.negative_prompt]}.items():
        if not all(isinstance(value, str) or (value is None and len(values) == 1) for value in values):
            raise ConfigError(f"{key}={cfg[key]}: give a caption" + (", or a list of them" if key == "prompt" else ""))
    for key in ("image", "mask"):
        if cfg[key] is not None and not isinstance(cfg[key], str):
            raise ConfigError(f"{key}={cfg[key]} must be the path of a picture")
    if cfg.out is not None and cfg.image is not None and Path(cfg.out).resolve() == Path(cfg.image).resolve():
        raise ConfigError(f"out={cfg.out} would overwrite image={cfg.image}: choose another name")
    for key in ("mask", "outpaint", "strength"):
        if cfg[key] is not None and cfg.image is None:
            raise ConfigError(f"{key}={cfg[key]} is about a picture: give image=<path>")
    if cfg.mask is not None and cfg.outpaint is not None:
        raise ConfigError("give mask=<path> or outpaint=[left,top,right,bottom], not both")
    if cfg.resample > 1 and cfg.mask is None and cfg.outpaint is None:
        raise ConfigError(f"resample={cfg.resample} is for mask=<path> and outpaint=[left,top,right,bottom]")
    if cfg.variation is not None and cfg.interpolate_to is not None:
        raise ConfigError("give variation=<share> or interpolate_to=<seed>, not both")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a picture of its own."""
    if cfg.out is None:
        cfg.out = str(Path(cfg.runs_dir) / cfg.run / "samples" / f"{suffix}.png")


def main(cfg: DictConfig) -> int:
    """Draw, write one picture, and say where it is; the exit code."""
    from dit.data.image import encode_png, grid

    with user_errors():
        run = load(cfg).arranged(**execution(cfg))
        condition = run.parts.condition
        pipeline = run.pipeline()
        picture = _picture(cfg, run) if cfg.image is not None else None
        labels, prompts = _labels(cfg.labels, condition.sizes.get("num_classes", 0)), _prompts(cfg.prompt)
        asked = {
            **_in_turn("labels", "label", labels, cfg, condition),
            **_in_turn("prompt", "caption", prompts, cfg, condition),
            **_pictures(cfg, condition, picture),
        }
        avoid = _avoided(cfg, condition)
        keep = _edit(cfg, run, pipeline, *picture) if picture and not _enlarges(condition) else lambda images: images
        out = Path(cfg.out) if cfg.out else Path(cfg.runs_dir) / cfg.run / "samples" / f"seed-{cfg.seed}.png"
        check_writable(out)
    draw = partial(pipeline, asked, cfg.num_images, seed=cfg.seed, batch_size=cfg.batch_size, avoid=avoid)
    with user_errors():  # what is asked for is looked at batch by batch
        images = keep(draw(noise=_noise(cfg, pipeline)))
    kinds = max(len(labels), len(prompts))
    columns = min(kinds, 20) if kinds > 1 else 10
    out.write_bytes(encode_png(grid(images, min(columns, cfg.num_images))))
    print(f"{cfg.num_images} images of step {run.step}: {out}")
    return 0


def _in_turn(key: str, ask: str, values: list[Any], cfg: DictConfig, condition: "Condition") -> dict[str, list[Any]]:
    """A field of what is asked for, its values in turn; none if the network is not told it."""
    if ask in condition.asks:
        return {ask: [values[i % len(values)] for i in range(cfg.num_images)]}
    if cfg[key] is not None:
        told = f"told {' and '.join(condition.asks)}, but no {ask}" if condition.asks else "unconditional"
        raise ValueError(f"{key}={cfg[key]}: run={cfg.run} is {told}; leave {key} out")
    return {}


def _prompts(prompt: Any) -> list[str]:
    """The captions to draw, in turn; without any, nothing is told."""
    prompts = list(prompt) if isinstance(prompt, ListConfig) else ["" if prompt is None else prompt]
    if not prompts:
        raise ValueError("prompt=[]: give a caption, like prompt='a seven', or several, prompt=['a one','a two']")
    return [str(text) for text in prompts]


def _avoided(cfg: DictConfig, condition: "Condition") -> dict[str, list[str]] | None:
    """What guidance leads away from, if not from nothing told."""
    if cfg.negative_prompt is None:
        return None
    if "caption" not in condition.asks:
        raise ValueError(f"negative_prompt={cfg.negative_prompt}: run={cfg.run} is told no caption; leave it out")
    if not cfg.guidance._target_.endswith("ClassifierFree"):
        raise ValueError(f"negative_prompt={cfg.negative_prompt} works by guidance=classifier_free alone")
    if cfg.guidance.get("scale", 1) == 1:
        raise ValueError(f"negative_prompt={cfg.negative_prompt} works by guidance: give guidance.scale=3 or so")
    return {"caption": [str(cfg.negative_prompt)]}


def _enlarges(condition: "Condition") -> bool:
    return "low_resolution" in condition.asks


def _pictures(
    cfg: DictConfig, condition: "Condition", picture: "tuple[Tensor, Tensor | None] | None"
) -> dict[str, Any]:
    """The pictures that a network is told, the same for all images."""
    if cfg.noise_level is not None and not _enlarges(condition):
        raise ValueError(f"noise_level={cfg.noise_level} is for a super-resolution model, which run={cfg.run} is not")
    if _enlarges(condition):
        for key in ("mask", "outpaint", "strength"):
            if cfg[key] is not None:
                raise ValueError(f"{key}={cfg[key]}: run={cfg.run} enlarges image=<path>, and edits none")
        if picture is None:
            raise ValueError(f"run={cfg.run} enlarges pictures: give image=<path>")
        low = picture[0].expand(cfg.num_images, -1, -1, -1)
        return {"low_resolution": low} | ({} if cfg.noise_level is None else {"noise_level": float(cfg.noise_level)})
    if "mask" in condition.asks:
        pixels, mask = picture or (None, None)
        if pixels is None or mask is None:
            raise ValueError(f"run={cfg.run} draws in a hole: give image=<path>, and mask=<path> or outpaint=<margins>")
        return {"image": pixels.expand(cfg.num_images, -1, -1, -1), "mask": mask.expand(cfg.num_images, -1, -1)}
    return {}


def _labels(labels: Any, num_classes: int) -> list[int]:
    """The classes to draw, in turn."""
    if num_classes == 0 or labels is None:
        return list(range(min(num_classes, 10)))
    labels = [labels] if isinstance(labels, int) else list(labels)
    if not labels or not all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        raise ValueError(f"labels={labels}: give whole numbers from 0 to {num_classes - 1}, like labels=[0,1]")
    return labels


def _edit(cfg: DictConfig, run: "Loaded", pipeline: "Pipeline", pixels: "Tensor", mask: "Tensor | None") -> Any:
    """Let the pipeline edit a picture; what keeps its pixels in the images drawn."""
    import torch

    from dit.sampler.editing import edited, shrunk

    strength = cfg.strength if cfg.strength is not None else 0.6 if mask is None else 1.0
    generator = torch.Generator(run.device).manual_seed(cfg.seed)
    x0 = run.latent.encode(pixels[None].to(run.device).float() / 127.5 - 1, generator)[0]
    cells = None if mask is None else shrunk(mask, x0.shape[-1]).to(run.device)
    pipeline.sampler = edited(pipeline.sampler, x0, strength=strength, mask=cells, resample=cfg.resample)
    return lambda images: images if mask is None else torch.where(mask, images, pixels)


def _picture(cfg: DictConfig, run: "Loaded") -> "tuple[Tensor, Tensor | None]":
    """The pixels (C, H, W) to edit, and where to redraw them (H, W), None: everywhere; or the pixels to enlarge."""
    from PIL import Image

    from dit.data.image import decode, decode_mask, outpainted

    def read(key: str) -> bytes:
        try:
            with Image.open(cfg[key]) as file:
                sizes.append(file.size)
                file.load()
            return Path(cfg[key]).read_bytes()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{key}={cfg[key]} cannot be read as an image: {error}") from error

    size, channels = run.parts.cfg.data.image_size, run.parts.cfg.data.channels
    sizes: list[tuple[int, int]] = []
    image = read("image")
    if _enlarges(run.parts.condition):
        width, height = sizes[0]
        if width != height:
            raise ValueError(f"image={cfg.image} has {width} x {height} pixels: this run enlarges squares")
        return decode(image, width, channels), None
    if cfg.outpaint is not None:
        margins: Any = list(cfg.outpaint) if isinstance(cfg.outpaint, ListConfig) else cfg.outpaint
        whole = isinstance(margins, list) and len(margins) == 4 and all(isinstance(m, int) and m >= 0 for m in margins)
        if not whole or not sum(margins) > 0 or margins[0] + margins[2] >= size or margins[1] + margins[3] >= size:
            raise ValueError(
                f"outpaint={margins}: give four margins in pixels, [left,top,right,bottom], that leave room for the "
                f"picture in {size} x {size}, like outpaint=[{size // 4},0,{size // 4},0]"
            )
        return outpainted(image, size, channels, margins)
    if cfg.mask is None:
        return decode(image, size, channels), None
    mask = read("mask")
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"mask={cfg.mask} has {sizes[1]} pixels, but image={cfg.image} has {sizes[0]}: they must agree"
        )
    redraw = decode_mask(mask, size)
    if not redraw.any():
        raise ValueError(f"nothing in mask={cfg.mask} is white, so that there is nothing to redraw")
    return decode(image, size, channels), redraw


def _noise(cfg: DictConfig, pipeline: "Pipeline") -> "Tensor | None":
    """The noise to begin with, (N, C, H, W); None: that of the seed."""
    import torch

    from dit.sampler.editing import mixed

    n = cfg.num_images
    first = pipeline.noise(cfg.seed, 1)
    if cfg.interpolate_to is not None:
        share = torch.linspace(0, 1, n, device=first.device).reshape(n, *[1] * (first.ndim - 1))
        return mixed(first, pipeline.noise(cfg.interpolate_to, 1), share)
    if cfg.variation is not None:
        return mixed(first, pipeline.noise(cfg.seed, n + 1)[1:], float(cfg.variation))
    return None
