"""What `dit export` writes of a run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dit.noise.flow import Flow
from dit.train import checkpoint, saved
from dit.train.build import PIXELS, Parts, build
from dit.train.judged import drawn_by, evaluations, is_evaluation
from dit.train.previews import contents, previews
from dit.weights import export, program, stock
from dit.weights.card import USE, brief, card, sampler_name
from dit.weights.identity import sha256
from dit.weights.scheduler import NotStockError
from dit.weights.scheduler import stock as stock_scheduler

COMMON = (1, 2, 4, 8)  # steps of a student that takes any number
ASKED = {
    "label": "label=[0, 1, 2]",
    "caption": 'caption=["..."]',
    "low_resolution": "low_resolution=small",
    "image": "image=image",
    "mask": "mask=mask",
}


class Exporting:
    """The weights of a run, in one of the formats.

    Args:
        folder: of the run.
        had: its configuration.
        weights: by the network's names, on the CPU, as they are to be written.
        about: what config.json is to say, with format, precision, step and parameters, and `identities`.
        few_step: how a student is drawn; None: it is none.
        licence: of the weights; None: not stated.
        most_bytes: of a file of weights.
    """

    def __init__(
        self,
        folder: Path,
        had: DictConfig,
        weights: Mapping[str, Tensor],
        about: Mapping[str, Any],
        few_step: Mapping[str, Any] | None = None,
        *,
        licence: str | None = None,
        most_bytes: int = export.MOST_BYTES,
    ):
        self.folder = folder
        self.had = had
        self.weights = weights
        self.few_step = few_step
        self.licence = licence
        self.most_bytes = most_bytes
        self.exact: str | None = None  # of a stock pipeline, in which numbers of steps
        self.config: Any = OmegaConf.to_container(had, resolve=True)
        self.about = {**about, "data": self._data(about)}

    def write(self, to: Path, batch_size: int | None = None) -> None:
        """Fill a folder.

        Args:
            to: the folder.
            batch_size: of a program, the only one it takes; None: any.

        Raises:
            ValueError: if it cannot be had in this format.
            ImportError: if what writes it is missing.
        """
        kind = self.about["format"]
        if kind == "diffusers":
            use = self._pipeline(to)
        elif kind == "native":
            export.save(to, self.weights, self.most_bytes)
            self._take_vae(to)
            use = USE["native"].format(asked="".join(f"{each}, " for each in self._asked()))
        else:
            use = self._program(to, batch_size)
        measured = self._measured()
        export.describe(to, {**self.about, "config": self.config, "evaluations": measured}, self.few_step)
        if grid := self._grid():
            (to / export.GRID).write_bytes(grid)
        tables: dict[str, list[dict[str, Any]]] = {}
        for record in measured:
            judges = ", ".join(record["settings"].get("metric") or {})
            tables.setdefault(f"Evaluations by {judges}", []).append(self._row(record))
        text = card(self.about, self._facts(), tables, use=use, licence=self.licence, grid=grid is not None)
        (to / export.CARD).write_text(text)

    def _pipeline(self, to: Path) -> str:
        """A folder of diffusers, of its own parts where they do what ours do; how it is used."""
        try:
            stock.check(self.config)
            parts = Parts(self.had)
            times = torch.cat([parts.grid(parts.schedule, num_steps=n)[:-1] for n in self._steps()]).unique()
            scheduler = stock_scheduler(self.config, parts.schedule, self._steps())
            latent = parts.latent()
            stock.save(to, self.config, self.weights, latent, parts.schedule, scheduler, times, self.most_bytes)
        except NotStockError as error:
            print(f"with pipeline.py beside the weights, as diffusers has not all parts: {error}")
            return self._own_pipeline(to)
        self.exact = f"{_listed(self._steps())} steps"
        print(f"a stock DiTPipeline with {scheduler.name}, exact in {self.exact}")
        if not self.config["model"].get("closed_frequencies") and not isinstance(parts.schedule, Flow):
            self.exact += ", as the network's frequencies of time are not diffusers'"
        self.config["model"]["closed_frequencies"] = True
        self.config["latent"] |= {"name": export.VAE, "subfolder": None, "scale": None, "shift": None}
        scale, steps = self.config["guidance"].get("scale", 1.0), self.config["sampler"]["num_steps"]
        return USE["stock"].format(labels="[0, 1, 2]", scale=scale, steps=steps)

    def _own_pipeline(self, to: Path) -> str:
        """The same with a pipeline of ours."""
        from diffusers import __version__

        export.save(to, self.weights, self.most_bytes)
        self._take_vae(to)
        index = {"_class_name": ["pipeline", "DitPipeline"], "_diffusers_version": __version__}
        (to / export.PIPELINE).write_text(json.dumps(index, indent=1) + "\n")
        shutil.copyfile(Path(stock.__file__).with_name(export.CODE), to / export.CODE)
        told = "".join(f"{each}, ".replace("label=", "class_labels=") for each in self._asked())
        return USE["pipeline"].format(told=told)

    def _program(self, to: Path, batch_size: int | None) -> str:
        """The network's call as a program; how it is used."""
        parts = Parts(self.had)
        network = parts.denoiser().network
        network.load_state_dict(dict(self.weights))
        dtype = next(iter(self.weights.values())).dtype
        size = self.config["latent"]["size"]
        x = torch.zeros(2, self.config["latent"]["channels"], size, size, dtype=dtype)
        cond = _example(network, parts.condition.sizes, x)
        made = program.traced(network.to(dtype), x, torch.zeros(2), cond, batch_size)
        names = ["x", "time", *cond]
        if self.about["format"] == "pt2":
            program.save_pt2(to / export.PROGRAM, made)
            return USE["pt2"].format(inputs=", ".join(["x", "time", *(f"{name}={name}" for name in cond)]))
        program.save_onnx(to / export.ONNX, made)
        return USE["onnx"].format(feeds=", ".join(f'"{name}": {name}' for name in names))

    def _take_vae(self, to: Path) -> None:
        """Copy a VAE that is a folder, and no name of a hub, so that the export is whole."""
        latent = self.config["latent"]
        name = latent.get("name")
        if name and Path(name).is_dir():
            shutil.copytree(Path(name) / (latent.get("subfolder") or ""), to / export.VAE)
            latent |= {"name": export.VAE, "subfolder": None}

    def _steps(self) -> list[int]:
        """The numbers of steps in which it is drawn."""
        own = self.config["sampler"]["num_steps"]
        if self.few_step is None:
            return [own]
        return list(self.few_step["steps"] or sorted({*COMMON, own}))

    def _asked(self) -> list[str]:
        condition: Any = build(self.had.condition)
        return [ASKED[ask] for ask in condition.asks]

    def _grid(self) -> bytes | None:
        """A picture of these weights: the newest of the run that is not newer, or that of an export."""
        drawn = []
        if saved.exported(self.folder):
            drawn = list(self.folder.glob(export.GRID))
        elif self.about.get("weights") == saved.averages(self.had)[0]:  # with which previews are drawn
            drawn = [path for step, path in previews(self.folder).items() if step <= self.about["step"]]
        return next(filter(None, map(contents, reversed(drawn))), None)

    def _data(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """What it has learned from: where that was, and the fingerprint of its shards."""
        if exported := saved.exported(self.folder):
            return exported.get("data")
        paths = [p for p in checkpoint.committed(self.folder / "checkpoints") if checkpoint.step_of(p) >= about["step"]]
        path = self.config["data"].get("path")
        return {"path": path, "fingerprint": checkpoint.data_of(paths[0]) if paths else None}

    def _facts(self) -> dict[str, Any]:
        """How it was trained, and how it is drawn, in short."""
        cfg, data = self.config, self.about["data"] or {}
        teacher = (cfg["objective"].get("teacher") or {}) if isinstance(cfg["objective"], dict) else {}
        facts = {
            "run": cfg["run"],
            "weights": self._weights() + (", rounded to bfloat16" if self.about.get("rounded_from") else ""),
            "published as": self.about.get("published"),
            "trained for": f"{self.about['step']:,} steps of {cfg['trainer']['batch_size']} images",
            "data": _data_said(data),
            "classes": cfg["condition"].get("num_classes"),
            "objective": _short(cfg["objective"]),
            "teacher": teacher.get("run") or (teacher.get("init") or {}).get("path"),
            "teacher's guidance": teacher.get("scale"),
            "noise": _short(cfg["noise"]),
            "prediction": _short(cfg["prediction"]),
            "this pipeline is exact in": self.exact,
            "latent space": "pixels" if cfg["latent"]["_target_"] == PIXELS else cfg["latent"].get("name"),
        }
        if self.about.get("published"):
            facts |= dict.fromkeys(("weights", "trained for", "data"))
        if not cfg["sampler"]:
            return facts
        steps, scale = cfg["sampler"]["num_steps"], cfg["guidance"].get("scale", 1.0)
        twice = _short(cfg["sampler"], -2) == "heun"
        asked = (2 * steps - 1 if twice else steps) * (1 if scale == 1 or _short(cfg["guidance"]) == "Told" else 2)
        facts |= {
            "sampler": f"{sampler_name(cfg['sampler'])}, {steps} steps, grid {_short(cfg['grid'])}",
            "function evaluations": asked,
            "guidance": f"{_short(cfg['guidance'])} of scale {scale:g}",
        }
        if self.few_step:
            facts["a student of"] = self.few_step["method"]
            facts["drawn in"] = f"{_listed(self._steps())} steps" if self.few_step["steps"] else "any number of steps"
            facts["guidance that it has for good"] = str(self.few_step["guidance"])
        return facts

    def _weights(self) -> str:
        """What these weights are, in words."""
        return self.about.get("weights") or f"an average of std {self.about['ema_std']:g}"

    def _measured(self) -> list[dict[str, Any]]:
        """What was measured of these weights, and before they were rounded, with all it depends on."""
        known = [*self.about.get("sha256", []), *self.about.get("rounded_from", [])]
        whose = {"step": self.about["step"], "weights": self.about.get("weights"), "sha256": None}  # see `judged`
        found = [*saved.exported(self.folder).get("evaluations", [])]  # of what is exported again
        found = [*filter(is_evaluation, found), *evaluations(self.folder / "evaluation.jsonl")]
        return [
            record
            for record in found
            if record["settings"].get("sha256") in known
            or whose.items() <= {"sha256": None, **record["settings"]}.items()
        ]

    def _row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """An evaluation as a row of the card."""
        had = record["settings"]
        extractors = [f"{one['name']} ({one['sha256'][:8]})" for one in had["extractors"].values()]
        rounded = self.about.get("rounded_from") and had["sha256"] not in self.about["sha256"]
        return {
            **drawn_by(had),
            "weights": self._weights() + (", before rounding" if rounded else ""),
            "samples": had["num_samples"],
            "extractor": ", ".join(dict.fromkeys(extractors)),
            "reference": brief(had["reference"]),
            **{name: had[name] for name in ("labels", "precision")},
            **record["figures"],
        }


def identities(
    weights: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    adapted: Mapping[str, Tensor] | None,
    exported: Mapping[str, Any],
) -> dict[str, list[str]]:
    """What evaluations call the weights of an export: their `sha256`, and those that they were `rounded_from`.

    Args:
        weights: of a run, or of what is exported again.
        written: the same, in the precision of the export.
        adapted: with an adapter that is not merged, as training judges them; None: there is none.
        exported: what that says of itself which is exported again.
    """
    had = [_sha256(each) for each in (weights, adapted) if each is not None] + exported.get("sha256", [])
    before = exported.get("rounded_from", [])
    now = _sha256(written)
    if now == had[0]:
        return {"sha256": list(dict.fromkeys(had)), "rounded_from": before}
    return {"sha256": [now], "rounded_from": list(dict.fromkeys([*had, *before]))}


def _sha256(weights: Mapping[str, Tensor]) -> str:
    """That of the denoiser which has them; it computes in float32."""
    return sha256({f"network.{name}": t.float() if t.is_floating_point() else t for name, t in weights.items()})


def _example(network: nn.Module, sizes: Mapping[str, int], x: Tensor) -> dict[str, Tensor]:
    """What a network is told besides, of two rows."""
    told = {}
    if "num_classes" in sizes:
        told["label"] = torch.zeros(2, dtype=torch.long)
    if "image_channels" in sizes:
        told["image"] = torch.zeros(2, sizes["image_channels"], *x.shape[2:], dtype=x.dtype)
    for name, wanted in {"gap": "lands", "scale": "guided"}.items():
        if getattr(network, wanted, False):
            told[name] = torch.zeros(2)
    return told


def _short(node: Mapping[str, Any], part: int = -1) -> str:
    name: str = node.get("_target_", "none").split(".")[part]
    return name


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _data_said(data: Mapping[str, Any]) -> str:
    paths = data.get("path") or []
    names = ", ".join("/".join(Path(path).parts[-2:]) for path in ([paths] if isinstance(paths, str) else paths))
    return f"{names}, of fingerprint {data['fingerprint']}" if data.get("fingerprint") else names
