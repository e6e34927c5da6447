"""Matrix products of compiled code, on CPUs for which MKL is not tuned."""

import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

SMALLEST = 64  # rows, and features in and out: below it oneDNN takes longer to begin than is gained
FEW = 8  # images: the gradient of a weight that sees them, and not their tokens, is written faster than MKL multiplies

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
    """Changes the products of a compiled graph, forward and backward, where others are faster on an AMD CPU.

    Those of activations and weights are oneDNN's; those over a few images are sums of outer products. The rest stay,
    such as gradients of weights, in which MKL is as fast. All are float32. The compiler calls it after derivatives are
    taken, and tensors are those of one device, so that nothing else need know of it. Measured:
    tools/benchmarks/train.md.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change it in place."""
        aten = torch.ops.aten
        for node in [*graph.nodes]:
            if node.target is aten.addmm.default and not node.kwargs:
                bias, x, matrix = node.args
            elif node.target is aten.mm.default:
                bias, (x, matrix) = None, node.args
            else:
                continue
            left, right = x.meta["val"], matrix.meta["val"]
            if left.device.type != "cpu" or not left.dtype == right.dtype == torch.float32 or not _amd():
                continue
            sizes = (len(left), *right.shape)
            with graph.inserting_before(node):
                if min(sizes) >= SMALLEST and left.is_contiguous() and (bias is None or bias.meta["val"].ndim == 1):
                    weight = _node(graph, aten.permute.default, matrix, [1, 0])
                    product = _node(graph, torch.ops.dit.linear.default, x, weight, bias)
                elif sizes[1] <= FEW and min(sizes[::2]) >= SMALLEST and bias is None:
                    product = _outer(graph, x, matrix, sizes[1])
                else:
                    continue
            node.replace_all_uses_with(product)
            graph.erase_node(node)

    def uuid(self) -> str:
        """What the compiler's cache knows it by."""
        return hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode() + bytes([_amd()])).hexdigest()


def _outer(graph: fx.Graph, x: fx.Node, matrix: fx.Node, number: int) -> fx.Node:
    """(N, K), (K, M) -> (N, M), the sum of x[:, k] matrix[k]: one loop, that the compiler writes."""
    aten = torch.ops.aten
    total = None
    for k in range(number):
        column = _node(graph, aten.slice.Tensor, x, 1, k, k + 1)
        term = _node(graph, aten.mul.Tensor, column, _node(graph, aten.slice.Tensor, matrix, 0, k, k + 1))
        total = term if total is None else _node(graph, aten.add.Tensor, total, term)
    assert total is not None
    return total


def _node(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call, and what comes of it: sizes and strides without numbers."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return node


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
