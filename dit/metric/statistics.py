"""Files of reference statistics and of samples, in the form of ADM's evaluation (`.npz`)."""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dit.metric.moments import Moments

LAYERS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
SAMPLES = "arr_0"
UNKNOWN_NUMBER = 2**31  # of the images of published statistics, which do not say it; it cancels


class Statistics(NamedTuple):
    """What a file holds."""

    moments: dict[str, Moments]  # by layer
    images: np.ndarray | None  # uint8 (N, H, W, C)
    about: dict[str, Any]  # what was noted beside it; nothing of foreign ones


def write(path: Path, moments: Mapping[str, Moments], images: np.ndarray | None, about: Mapping[str, Any]) -> None:
    """Statistics `mu` (D,), `sigma` (D, D), float64, and `mu_s`, `sigma_s` of the spatial ones; images as `arr_0`.

    What they were made of is noted in `<path>.json`, as the form has no place for it.

    Args:
        path: of the `.npz`, uncompressed.
        moments: by layer, `pool` and `spatial`.
        images: uint8 (N, H, W, C), or None.
        about: what JSON can say.
    """
    arrays: dict[str, Any] = {}
    for layer, found in moments.items():
        mean, covariance = LAYERS[layer]
        arrays |= {mean: found.mean.cpu().numpy(), covariance: found.covariance.cpu().numpy()}
    if images is not None:
        arrays[SAMPLES] = images
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)
    _noted(path).write_text(json.dumps(dict(about), indent=1) + "\n")


def read(path: Path) -> Statistics:
    """Statistics and images of such a file.

    Raises:
        ValueError: if it is missing, damaged, or neither.
    """
    if not path.is_file():
        raise ValueError(f"reference={path}: there is no such file; make it by dit evaluate reference={path} data=...")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*sum(LAYERS.values(), ()), SAMPLES) if name in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:150].partition(" when allow_pickle")[0]
        raise ValueError(f"reference={path} is no .npz that can be read, get it anew ({reason})") from error
    about = _about(path)
    total = about.get("number", UNKNOWN_NUMBER)
    moments = {}
    for layer, (mean, covariance) in LAYERS.items():
        if {mean, covariance} <= arrays.keys():
            mu, sigma = arrays[mean], arrays[covariance]
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not _is_covariance(mu, sigma):
                raise ValueError(
                    f"reference={path}: {mean} {mu.dtype} {mu.shape} and {covariance} {sigma.dtype} {sigma.shape} are "
                    "no mean and covariance; get it anew"
                )
            scatter = torch.from_numpy(sigma.astype(np.float64)) * (total - 1)
            moments[layer] = Moments(total, torch.from_numpy(mu.astype(np.float64)), scatter)
    images = arrays.get(SAMPLES)
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4):
        raise ValueError(f"reference={path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (N, H, W, C)")
    if images is not None and len(images) < 2:
        raise ValueError(f"reference={path}: arr_0 has {len(images)} images, and statistics need 2 at least")
    if not moments and images is None:
        raise ValueError(
            f"reference={path} has neither mu and sigma nor arr_0: give statistics or samples of ADM's form"
        )
    return Statistics(moments, images, about)


def _is_covariance(mu: np.ndarray, sigma: np.ndarray) -> bool:
    """Whether they can be a mean and a covariance: real, finite, symmetric, s_ij^2 <= s_ii s_jj."""
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return False
    variances, slack = sigma.diagonal(), 1e-3 * np.abs(sigma).max()  # that of float32
    within = np.abs(sigma) <= np.sqrt(np.outer(variances.clip(0), variances.clip(0))) + slack
    return bool((variances >= -slack).all() and within.all() and np.abs(sigma - sigma.T).max() <= slack)


def _about(path: Path) -> dict[str, Any]:
    """What was noted beside a file; nothing where nothing was.

    Raises:
        ValueError: if it is damaged.
    """
    if not _noted(path).exists():
        return {}
    try:
        about: dict[str, Any] = dict(json.loads(_noted(path).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{_noted(path)} is damaged ({error}): make {path} anew, or delete this note of it") from error
    for key, kind in {"number": int, "image_size": int, "extractor": dict}.items():
        if not isinstance(about.get(key, kind()), kind) or (key == "number" and about.get(key, 2) < 2):
            raise ValueError(f"{_noted(path)} is damaged ({key} is {about[key]!r}): make {path} anew")
    return about


def _noted(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
