"""A class-conditional DiT as a pipeline of diffusers' own parts, which `DiTPipeline.from_pretrained` loads."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.latent.latent import Latent
from dit.noise.flow import Flow
from dit.noise.schedule import Schedule
from dit.weights.convert import closed_frequencies, dit_to_diffusers, padded_labels
from dit.weights.scheduler import NotStockError, Scheduler

MODEL, LABEL = "dit.model.dit.DiT", "dit.condition.label.Label"
AUTOENCODER, GUIDANCE = "dit.latent.autoencoder.Autoencoder", "dit.sampler.guidance.ClassifierFree"
MOST_CLASSES = 1000  # DiTPipeline's label for no class
NONE = {"interval": None, "rescale": 0, "clip": None, "dynamic_clip": None, "channels": None}


def check(cfg: Mapping[str, Any]) -> None:
    """See, without building anything, whether the parts of a run are such as diffusers has.

    Raises:
        NotStockError: if not, naming the first that is not.
    """
    model, condition, guidance = cfg["model"], cfg["condition"], cfg["guidance"]
    if model["_target_"] != MODEL or model.get("rope") or model["mlp_ratio"] != 4:
        raise NotStockError("DiTTransformer2DModel is a plain DiT with an mlp_ratio of 4, and without rope")
    if condition["_target_"] != LABEL or condition["num_classes"] > MOST_CLASSES:
        raise NotStockError(f"DiTPipeline is told one of at most {MOST_CLASSES} classes, and nothing else")
    if cfg["latent"]["_target_"] != AUTOENCODER:
        raise NotStockError("DiTPipeline draws in the latent space of an AutoencoderKL, not pixels")
    if guidance["_target_"] != GUIDANCE or any(guidance.get(key, none) != none for key, none in NONE.items()):
        raise NotStockError("DiTPipeline guides by the scale of guidance=classifier_free alone")
    if guidance.get("scale", 1) < 1:
        raise NotStockError("DiTPipeline guides with scales of more than 1 alone")


def save(
    folder: Path,
    cfg: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    latent: Latent,
    schedule: Schedule,
    scheduler: Scheduler,
    times: Tensor,
    most_bytes: int,
) -> None:
    """Write the pipeline's folder; our network may be told other labels than 1,000 for no class, and other frequencies.

    Args:
        folder: where to.
        cfg: of the run, checked.
        weights: those of the network.
        latent: with the VAE.
        schedule: of the run.
        scheduler: that takes its steps.
        times: at which the network will be asked; on flow it is right at any.
        most_bytes: of a file.

    Raises:
        NotStockError: if the network or the VAE is not one that diffusers has, or cannot be told the times.
    """
    import diffusers

    vae = _without_shift(latent)
    model = cfg["model"]
    try:
        if not model.get("closed_frequencies"):
            told = torch.linspace(0, 1, 257) if isinstance(schedule, Flow) else schedule.time_input(times)
            weights = closed_frequencies(weights, told)
        theirs = dit_to_diffusers(padded_labels(weights, MOST_CLASSES))
    except ValueError as error:
        raise NotStockError(str(error)) from error
    channels = latent.shape[0]
    transformer: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=model["num_heads"],
        attention_head_dim=model["hidden_size"] // model["num_heads"],
        in_channels=channels,
        out_channels=channels * (2 if model["learn_sigma"] else 1),
        num_layers=model["depth"],
        sample_size=latent.shape[1],
        patch_size=model["patch_size"],
        num_embeds_ada_norm=MOST_CLASSES,
        norm_eps=1e-6,
    )
    transformer.load_state_dict(theirs)
    if (dtype := next(iter(weights.values())).dtype) != torch.float32:
        transformer.to(dtype)
    made = getattr(diffusers, scheduler.name)(**scheduler.options)
    pipeline: Any = diffusers.DiTPipeline(transformer, vae, made)
    pipeline.save_pretrained(folder, max_shard_size=most_bytes)


@torch.no_grad()
def _without_shift(latent: Latent) -> Any:
    """The VAE of a latent space, whose shift, of which DiTPipeline knows nothing, is in biases of its own.

    Raises:
        NotStockError: if it is another kind, or has no layers of one pixel next to the latents.
    """
    import diffusers

    frozen = getattr(latent, "vae", None)
    if not isinstance(frozen, diffusers.AutoencoderKL):
        raise NotStockError(f"DiTPipeline wants an AutoencoderKL, not {type(frozen).__name__}")
    vae: Any = copy.deepcopy(frozen)
    if latent.shift:
        before, after = vae.quant_conv, vae.post_quant_conv
        if before is None or after is None:
            raise NotStockError(f"DiTPipeline does not shift latents, but the shift of these is {latent.shift:g}")
        before.bias[: latent.shape[0]] -= latent.shift
        after.bias += latent.shift * after.weight.sum(dim=(1, 2, 3))
    vae.register_to_config(scaling_factor=latent.scale, shift_factor=None)
    return vae
