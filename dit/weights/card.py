"""The model card of an export."""

from collections.abc import Mapping, Sequence
from typing import Any

ANCESTRAL = {0: " (DDIM, Euler)", 1: " (DDPM, Euler ancestral)"}  # what a step is called, by its eta
EMPTY: tuple[Any, ...] = (None, "", {}, [])
USE = {
    "native": """import dit  # pip install ditforge

model = dit.load("<this folder>")
images = model.sample({asked}seed=0)  # uint8 (N, C, H, W)""",
    "stock": """from diffusers import DiTPipeline

pipeline = DiTPipeline.from_pretrained("<this folder>")
images = pipeline({labels}, guidance_scale={scale:g}, num_inference_steps={steps}).images""",
    "pipeline": """from diffusers import DiffusionPipeline  # with dit: pip install ditforge diffusers

pipeline = DiffusionPipeline.from_pretrained("<this folder>", trust_remote_code=True)  # pipeline.py, of this folder
images = pipeline({told}seed=0).images""",
    "pt2": """import torch

network = torch.export.load("network.pt2").module()
f = network({inputs})""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("network.onnx")
[f] = session.run(None, {{{feeds}}})""",
}


def card(
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    use: str,
    licence: str | None,
    grid: bool,
) -> str:
    """Markdown, with the front matter that hubs read.

    Args:
        about: what config.json says.
        facts: by their names, how it was trained and is drawn; what is empty is left out.
        tables: by their headings, rows of cells by their columns.
        use: one of USE, filled in.
        licence: of the weights; None: not stated.
        grid: there is a picture of samples.
    """
    head = {"license": licence or "unknown", "library_name": "dit" if about["format"] != "diffusers" else "diffusers"}
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "tags: [diffusion]", "---", ""]
    lines += [f"# {facts['run']}", ""]
    if grid:
        lines += ["![Samples](samples.png)", ""]
    lines += [f"{about['parameters']:,} parameters, {about['precision']}, written by `dit export`.", ""]
    lines += ["```python", use, "```", ""]
    rows = {name: value for name, value in facts.items() if value not in EMPTY and name != "run"}
    rows["licence"] = licence or "not stated: ask who trained it"
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_said(value)} |" for name, value in rows.items()]
    for heading, cells in tables.items():
        lines += ["", f"## {heading}", "", *_table(cells)]
    ending = (
        "The whole configuration, and all that each figure depends on, is in `config.json`, sha256 of all files in "
    )
    return "\n".join([*lines, "", ending + "`manifest.json`.", ""])


def sampler_name(node: Mapping[str, Any]) -> str:
    """A sampler as the field calls it."""
    name = str(node.get("_target_", "")).split(".")[-2]
    if name != "ancestral":
        return name
    eta = node.get("eta", 0)
    return f"ancestral with eta {eta:g}" + ANCESTRAL.get(eta, "")


def brief(node: Any) -> str:
    """A node of a configuration in a few words: what it names, and its options."""
    if not isinstance(node, Mapping):
        return _said(node)
    name = str(node.get("_target_", "")).rpartition(".")[2]
    options = {
        key: value for key, value in node.items() if not key.startswith("_") and key != "runs_dir" and value is not None
    }
    if name == "sample":
        name = sampler_name(node)
        if name.startswith("ancestral"):
            options.pop("eta", None)  # is in its name
    said = [
        f"{key}={f'({brief(value)})' if isinstance(value, Mapping) else _said(value)}" for key, value in options.items()
    ]
    return " ".join([*([name] if name else []), *said])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table, with each column of which some row has something."""
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) not in EMPTY for row in rows)
    ]
    lines = [columns, ["---"] * len(columns), *([_said(row.get(name, "")) for name in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _said(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
