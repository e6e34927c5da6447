"""The model card of an export."""

import json
from collections.abc import Mapping
from typing import Any

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


def card(about: Mapping[str, Any], facts: Mapping[str, Any], *, use: str, licence: str | None, grid: bool) -> str:
    """Markdown, with the front matter that hubs read.

    Args:
        about: what config.json says.
        facts: by their names, how it was trained and is drawn, of what JSON can say; what is empty is left out.
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
    rows = {name: value for name, value in facts.items() if value not in (None, "", {}, []) and name != "run"}
    rows["licence"] = licence or "not stated: ask who trained it"
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_said(value)} |" for name, value in rows.items() if not _nested(value)]
    for name, value in rows.items():
        if _nested(value):
            lines += ["", f"## {name.capitalize()}", "", "```json", json.dumps(value, indent=1), "```"]
    return "\n".join(
        [*lines, "", "The whole configuration is in `config.json`, sha256 of all files in `manifest.json`.", ""]
    )


def _said(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _nested(value: Any) -> bool:
    return isinstance(value, dict)
