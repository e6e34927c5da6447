"""A network as a program, for who has not this library: torch.export's .pt2, and ONNX."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

MOST_WITHIN = 1_900_000_000  # bytes of an ONNX file, whose format ends at 2 GB


def traced(
    network: nn.Module, x: Tensor, time: Tensor, cond: Mapping[str, Tensor], batch_size: int | None = None
) -> torch.export.ExportedProgram:
    """The call of a network, network(x, time, **cond), without Python.

    Args:
        network: on the CPU.
        x: an example, (2, C, H, W).
        time: the same, (2,).
        cond: what else it is told, the same.
        batch_size: the only one that it takes; None: any.
    """
    inputs = {"x": x, "time": time, **cond}
    shapes: dict[str, dict[int, torch.export.Dim]] | None = None
    if batch_size is None:
        rows = torch.export.Dim("batch")
        shapes = {name: {0: rows} for name in inputs}
    else:
        inputs = {name: value[:1].repeat(batch_size, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    x, time, told = inputs.pop("x"), inputs.pop("time"), inputs
    return torch.export.export(network.eval(), (x, time), told, dynamic_shapes=shapes)


def save_pt2(path: Path, program: torch.export.ExportedProgram) -> None:
    """A .pt2 file, which `torch.export.load(path).module()` makes a module again."""
    program.example_inputs = None  # would be pickled
    torch.export.save(program, path)


def save_onnx(path: Path, program: torch.export.ExportedProgram) -> None:
    """An .onnx file.

    Raises:
        ImportError: if onnx or onnxscript is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("format=onnx needs onnx and onnxscript: pip install 'ditforge[onnx]'") from error
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    torch.onnx.export(program, (), path, dynamo=True, external_data=size > MOST_WITHIN, verbose=False)
