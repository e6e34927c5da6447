"""Matrix products of compiled code, on AMD CPUs, for which MKL is not tuned."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import fallback_handler, register_lowering
from torch.utils.weak import WeakTensorKeyDictionary

SMALLEST = 64  # rows, and features in and out: below it oneDNN takes longer to begin than is gained
FEW = 8  # images: the gradient of a weight that sees them, and not their tokens, is written faster than MKL multiplies
WIDE = 3  # columns to a row of a gradient, from which oneDNN is faster

aten = torch.ops.aten
_library = torch.library.Library("dit", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("packed(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_in_order = WeakTensorKeyDictionary()  # weight -> its version and address, as oneDNN wants it, its storage


@torch.library.impl(_library, "linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X weight^T + bias, by oneDNN: (N, in), (out, in), (out,) -> (N, out)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@torch.library.impl(_library, "packed", "CPU")
def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same, of a weight that stays for long: in the order that oneDNN wants, it is kept beside what it is."""
    if weight.is_inference():  # whose changes nobody counts
        return _linear(x, weight, bias)
    now = weight._version, weight.data_ptr()
    then, ordered, _ = _in_order.get(weight, (None, None, None))
    if then != now:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), len(x))  # as fast with other rows
        _in_order[weight] = now, ordered, weight.untyped_storage()  # so that no other has this address
    return _linear(x, ordered, bias)


@torch.library.register_fake("dit::packed", lib=_library)
@torch.library.register_fake("dit::linear", lib=_library)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


@register_lowering(torch.ops.dit.linear.default, type_promotion_kind=None)
def _lowered(x: Any, weight: Any, bias: Any) -> Any:
    """Called without Python; as it stands the compiler would have the weight be a constant."""
    kernel = torch.ops.mkldnn._linear_pointwise.default
    return fallback_handler(kernel, add_to_fallback_set=False)(x, weight, bias, "none", [], "")


class Products(CustomGraphPass):
    """Changes the products of a compiled graph, forward and backward, where others are faster.

    Those of activations and weights are oneDNN's, and gradients of weights of many more features in than out; those
    over a few images are sums of outer products; sums of rows are products with ones. The rest stay, such as other
    gradients of weights, in which MKL is faster. All are float32. The compiler calls it after derivatives are taken,
    and tensors are those of one device, so that nothing else need know of it. Measured: tools/benchmarks/train.md.

    Args:
        frozen: weights stay as they are, so that it pays to put them in order once. If they change in place after all
            it is done again, but nobody sees what is written through `.data` or by numpy.
    """

    def __init__(self, frozen: bool = False):
        self.frozen = frozen

    def __call__(self, graph: fx.Graph) -> None:
        """Change it in place."""
        for node in [*graph.nodes]:
            change = CHANGES.get(node.target)
            if change is None or node.kwargs or not _float32(node):
                continue
            with graph.inserting_before(node):
                changed = change(graph, *node.args)
            if changed is not None:
                if self.frozen:
                    _pack(changed)
                node.replace_all_uses_with(changed)
                graph.erase_node(node)

    def uuid(self) -> str:
        """What the compiler's cache knows it by."""
        return hashlib.sha256(f"{inspect.getsource(sys.modules[__name__])}{self.frozen}".encode()).hexdigest()


def _addmm(graph: fx.Graph, bias: fx.Node | None, x: fx.Node, matrix: fx.Node) -> fx.Node | None:
    left, right = x.meta["val"], matrix.meta["val"]
    sizes = (len(left), *right.shape)
    large = min(right.shape) >= SMALLEST and (sizes[0] >= SMALLEST or sizes[0] <= FEW)
    flat = sizes[2] >= WIDE * sizes[0]  # the gradient of a weight of fewer features out than in
    if large and (left.is_contiguous() or flat) and (bias is None or _row(bias, sizes[2])):
        return _node(graph, torch.ops.dit.linear.default, x, _turned(graph, matrix), bias)
    if sizes[1] <= FEW and min(sizes[::2]) >= SMALLEST and bias is None:
        return _outer(graph, x, matrix, sizes[1])
    return None


def _mm(graph: fx.Graph, x: fx.Node, matrix: fx.Node) -> fx.Node | None:
    return _addmm(graph, None, x, matrix)


def _pack(product: fx.Node) -> None:
    """Take the packed form, where the weight is an input of the graph as it is."""
    if product.target is not torch.ops.dit.linear.default:
        return
    told: Any = product.args
    x, weight, _ = told
    if weight.op == "placeholder" and len(x.meta["val"]) >= SMALLEST:
        product.target = torch.ops.dit.packed.default


def _turned(graph: fx.Graph, matrix: fx.Node) -> fx.Node:
    """Its transpose, of which it mostly is one itself."""
    told: Any = matrix.args
    if matrix.target is aten.t.default or (matrix.target is aten.permute.default and list(told[1]) == [1, 0]):
        turned: fx.Node = told[0]
        return turned
    return _node(graph, aten.permute.default, matrix, [1, 0])


def _outer(graph: fx.Graph, x: fx.Node, matrix: fx.Node, number: int) -> fx.Node:
    """(N, K), (K, M) -> (N, M), the sum of x[:, k] matrix[k]: one loop, that the compiler writes."""
    total = None
    for k in range(number):
        column = _node(graph, aten.slice.Tensor, x, 1, k, k + 1)
        term = _node(graph, aten.mul.Tensor, column, _node(graph, aten.slice.Tensor, matrix, 0, k, k + 1))
        total = term if total is None else _node(graph, aten.add.Tensor, total, term)
    assert total is not None
    return total


def _sum(graph: fx.Graph, x: fx.Node, dims: list[int], keepdim: bool = False) -> fx.Node | None:
    """Of rows, the gradient of a bias: of one row of ones, as the compiler's loop goes down the columns."""
    value = x.meta["val"]
    if list(dims) != [0] or value.ndim != 2 or min(value.shape) < SMALLEST or not value.is_contiguous():
        return None
    ones = graph.call_function(
        aten.full.default, ([1, len(value)], 1.0), {"dtype": value.dtype, "device": value.device}
    )
    ones.meta["val"] = value.new_ones(1, len(value))
    total = _node(graph, aten.mm.default, ones, x)
    return total if keepdim else _node(graph, aten.select.int, total, 0, 0)


CHANGES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.sum.dim_IntList: _sum,
}


def _float32(node: fx.Node) -> bool:
    """Whether all tensors are so, and on a CPU."""
    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    return all(isinstance(v, Tensor) and v.device.type == "cpu" and v.dtype == torch.float32 for v in values)


def _row(bias: fx.Node, out: int) -> bool:
    """Whether it is as oneDNN reads it."""
    value = bias.meta["val"]
    return value.shape == (out,) and value.is_contiguous()


def _node(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call, and what comes of it: sizes and strides without numbers."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return node


@cache
def options(frozen: bool) -> dict[str, Any]:
    """Of torch.compile, the same for each unit: they share code if these are the same objects.

    Tanh is 2 / (1 + e^-2x) - 1, twice as fast, and within 1e-7 of it absolutely, which is what GELU needs.
    """
    return {"post_grad_custom_post_pass": Products(frozen), "cpp.use_decompose_tanh": True}
