"""What a run trains, a denoiser or an autoencoder, as its configuration says; read without torch."""

from typing import Any

AUTOENCODING = "dit.objective.autoencoding.Autoencoding"
DENOISING = ("noise", "prediction", "times", "grid", "sampler", "guidance")  # what an autoencoder knows nothing of


def autoencodes(cfg: Any) -> bool:
    """Whether a configuration is that of an autoencoder.

    Raises:
        ValueError: if it is neither, or both.
    """
    none = [group for group in DENOISING if not cfg.get(group)]
    if cfg.objective.get("_target_") != AUTOENCODING:
        if none:
            raise ValueError(f"{none[0]}=none is for objective=autoencoding alone, as in experiment=digits_vae")
        return False
    if some := [group for group in DENOISING if group not in none]:
        raise ValueError(
            f"objective=autoencoding trains an autoencoder, which knows no {some[0]}: choose {some[0]}=none, as "
            "experiment=digits_vae does"
        )
    if cfg.get("weight"):
        raise ValueError(
            "objective=autoencoding weighs no times, so that weight= does nothing: leave it out, as "
            "experiment=digits_vae does"
        )
    if (cfg.get("adapter") or {}).get("_target_"):
        raise ValueError("adapter= is for denoisers; objective=autoencoding trains all of its network: adapter=none")
    return True


def check_denoiser(cfg: Any) -> None:
    """See that a configuration is that of a denoiser.

    Raises:
        ValueError: if it is that of an autoencoder.
    """
    if autoencodes(cfg):
        raise ValueError(
            f"run={cfg.run} is an autoencoder, which knows no noise and draws nothing of its own: train in its latent "
            f"space, with latent=digits_vae latent.name={cfg.runs_dir}/{cfg.run}/vae"
        )
