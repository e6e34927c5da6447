"""Matrix products of compiled code by oneDNN, on CPUs for which MKL is not tuned."""

import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

SMALLEST = 64  # rows, and features in and out: below it takes longer to begin than is gained

_library = torch.library.Library("dit", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X weight^T + bias: (N, in), (out, in), (out,) -> (N, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_library.impl("linear", _linear, "CPU")


@torch.library.register_fake("dit::linear", lib=_library)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


class Products(CustomGraphPass):
    """Has oneDNN do the products of activations and weights in a compiled graph, forward and backward.

    The compiler calls it after derivatives are taken, and tensors are those of one device, so that nothing else need
    know of it. Products are float32 on an AMD CPU; all others, and gradients of weights, in which MKL is as fast, stay.
    Measured: tools/benchmarks/train.md.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        aten = torch.ops.aten
        for node in [*graph.nodes]:
            if node.target is aten.addmm.default and not node.kwargs:
                bias, x, matrix = node.args
            elif node.target is aten.mm.default:
                bias, (x, matrix) = None, node.args
            else:
                continue
            if not _pays(x.meta["val"], matrix.meta["val"], None if bias is None else bias.meta["val"]):
                continue
            with graph.inserting_before(node):
                weight = graph.call_function(aten.permute.default, (matrix, [1, 0]))
                weight.meta["val"] = matrix.meta["val"].mT
                product = graph.call_function(torch.ops.dit.linear.default, (x, weight, bias))
            product.meta.update(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)

    def uuid(self) -> str:
        """What the compiler's cache knows it by."""
        return hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode() + bytes([_amd()])).hexdigest()


def _pays(x: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is of a kind that oneDNN does faster."""
    large = min(*x.shape, matrix.shape[1]) >= SMALLEST
    plain = x.device.type == "cpu" and x.dtype == matrix.dtype == torch.float32 and x.is_contiguous()
    return large and plain and (bias is None or bias.ndim == 1) and _amd()


@cache
def _amd() -> bool:
    info = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and info.exists() and "AuthenticAMD" in info.read_text()


@cache
def options() -> dict[str, Any]:
    """Of torch.compile, the same for each unit: they share code if these are the same objects."""
    tanh = {
        "cpp.use_decompose_tanh": True
    }  # 2 / (1 + e^-2x) - 1, twice as fast; 1e-7 from it, absolutely, as GELU needs
    return {"post_grad_custom_post_pass": Products(), **tanh}
