"""What a node of a captured graph computes, as far as quantization is concerned: one table of ATen operators."""

from __future__ import annotations

import enum
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten


class OpKind(enum.Enum):
    """The roles an operator can play in an INT8 graph."""

    CONV = "conv"
    LINEAR = "linear"
    BATCH_NORM = "batch_norm"
    CLAMP = "relu"  # ReLU and its relatives: a clamp, which an INT8 kernel applies to its output
    ADD = "add"
    SAME_SCALE = "same_scale"  # moves or selects values: the output lies on the grid of the input
    PAD = "pad"  # with values that lie on every grid (zero) or are never chosen (the lowest value, before a max pool)
    AVG_POOL = "avg_pool"
    MUL = "mul"
    CONCAT = "concat"
    SIGMOID = "sigmoid"
    HARD_SIGMOID = "hard_sigmoid"
    SILU = "silu"
    HARD_SWISH = "hard_swish"
    LEAKY_RELU = "leaky_relu"
    SHAPE = "shape"  # looks at sizes and computes with them
    OTHER = "other"


#: PyTorch's own layers with a weight that INT8 kernels exist for.
WEIGHTED_MODULES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

#: Convolutions by their number of spatial axes: with padding as numbers, and as a word.
CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}

_KINDS: dict[Any, OpKind] = {
    **dict.fromkeys(CONVOLUTIONS, OpKind.CONV),
    aten.linear.default: OpKind.LINEAR,
    aten.batch_norm.default: OpKind.BATCH_NORM,
    aten.relu.default: OpKind.CLAMP,
    aten.relu6.default: OpKind.CLAMP,
    aten.hardtanh.default: OpKind.CLAMP,
    aten.clamp.default: OpKind.CLAMP,
    aten.clamp_min.default: OpKind.CLAMP,
    aten.add.Tensor: OpKind.ADD,
    aten.mul.Tensor: OpKind.MUL,
    aten.cat.default: OpKind.CONCAT,
    aten.sigmoid.default: OpKind.SIGMOID,
    aten.hardsigmoid.default: OpKind.HARD_SIGMOID,
    aten.silu.default: OpKind.SILU,
    aten.hardswish.default: OpKind.HARD_SWISH,
    aten.leaky_relu.default: OpKind.LEAKY_RELU,
    aten.max_pool1d.default: OpKind.SAME_SCALE,
    aten.max_pool2d.default: OpKind.SAME_SCALE,
    aten.max_pool3d.default: OpKind.SAME_SCALE,
    aten.flatten.using_ints: OpKind.SAME_SCALE,
    aten.unflatten.int: OpKind.SAME_SCALE,
    aten.view.default: OpKind.SAME_SCALE,
    aten.reshape.default: OpKind.SAME_SCALE,
    aten.permute.default: OpKind.SAME_SCALE,
    aten.transpose.int: OpKind.SAME_SCALE,
    aten.t.default: OpKind.SAME_SCALE,
    aten.squeeze.default: OpKind.SAME_SCALE,
    aten.squeeze.dim: OpKind.SAME_SCALE,
    aten.squeeze.dims: OpKind.SAME_SCALE,
    aten.unsqueeze.default: OpKind.SAME_SCALE,
    aten.expand.default: OpKind.SAME_SCALE,
    aten.select.int: OpKind.SAME_SCALE,
    aten.slice.Tensor: OpKind.SAME_SCALE,
    aten.flip.default: OpKind.SAME_SCALE,
    aten.pixel_shuffle.default: OpKind.SAME_SCALE,
    aten.pixel_unshuffle.default: OpKind.SAME_SCALE,
    aten.channel_shuffle.default: OpKind.SAME_SCALE,
    aten.contiguous.default: OpKind.SAME_SCALE,
    aten.clone.default: OpKind.SAME_SCALE,
    aten.avg_pool1d.default: OpKind.AVG_POOL,
    aten.avg_pool2d.default: OpKind.AVG_POOL,
    aten.avg_pool3d.default: OpKind.AVG_POOL,
    aten.adaptive_avg_pool1d.default: OpKind.AVG_POOL,
    aten.adaptive_avg_pool2d.default: OpKind.AVG_POOL,
    aten.adaptive_avg_pool3d.default: OpKind.AVG_POOL,
    aten.mean.dim: OpKind.AVG_POOL,
    aten.sym_size.int: OpKind.SHAPE,
    aten.sym_numel.default: OpKind.SHAPE,
    aten.sym_stride.int: OpKind.SHAPE,
}

#: Max pools that also return where the largest values were: their first output is the pool's.
_POOLS_WITH_INDICES = (
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
)

#: Operators that return several pieces of their input.
_PIECES = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.tensor_split.sections,
)

_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.dropout_.default,
)

#: Paddings that repeat values of their input.
_REPEATING_PADS = ("reflect", "replicate", "circular")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a function node, wherever the caller put it."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout as it is outside of training: it returns its very input."""
    return node.target in _DROPOUTS and not argument(node, 2, "train", True)


def classify(node: fx.Node) -> OpKind:
    """The role of ``node``, by what it calls; anything unknown is ``OTHER`` and stays in float."""
    if node.op != "call_function":
        return OpKind.OTHER
    kind = _KINDS.get(node.target, OpKind.OTHER)
    if kind in (OpKind.ADD, OpKind.MUL) and not _is_of_two_tensors(node):
        return OpKind.OTHER
    if kind is OpKind.CLAMP and clamp_bounds(node) is None:
        return OpKind.OTHER
    if kind is OpKind.SAME_SCALE and "dtype" in node.kwargs:
        return OpKind.OTHER
    if node.target in (aten.pad.default, aten.constant_pad_nd.default) and _pads_on_the_grid(node):
        return OpKind.PAD
    if kind is OpKind.OTHER and _selects(node):
        return OpKind.SAME_SCALE
    if kind is OpKind.OTHER and _computes_with_sizes(node):
        return OpKind.SHAPE
    return kind


def _is_of_two_tensors(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs


#: Kinds after which a tensor lies on the grid of the one before.
MOVES = (OpKind.SAME_SCALE, OpKind.PAD)

_MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


def _pads_on_the_grid(node: fx.Node) -> bool:
    if node.target is aten.pad.default:
        if argument(node, 2, "mode", "constant") != "constant":
            return False
        value: Any = argument(node, 3, "value")
    else:
        value = argument(node, 2, "value", 0)
    if value in (None, 0):
        return True
    return value == -math.inf and all(user.target in _MAX_POOLS for user in node.users)


def _selects(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node) and source.op == "call_function":
        return source.target in _PIECES or (source.target in _POOLS_WITH_INDICES and not node.args[1])
    if node.target is aten.pad.default:
        return argument(node, 2, "mode", "constant") in _REPEATING_PADS
    return node.target in _PIECES or node.target in _POOLS_WITH_INDICES


def _computes_with_sizes(node: fx.Node) -> bool:
    """Whether ``node`` computes a number from numbers, as arithmetic on sizes does."""
    return bool(node.meta.get("is_size"))


def clamp_bounds(node: fx.Node) -> tuple[float, float | None] | None:
    """``(low, high)`` of a ``CLAMP`` node; ``high`` is None for a ReLU. None where it is not such a clamp."""
    if node.target is aten.relu.default:
        return 0.0, None
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    else:
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float, type(None))):
        return None
    if high is None and low != 0:
        return None
    return float(low), None if high is None else float(high)


@dataclass(frozen=True)
class WeightedOp:
    """A convolution or linear layer as it stands in the graph, however it was written.

    ``input`` and ``weight`` are what the quantizers go on.
    """

    node: fx.Node
    kind: OpKind
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def spatial_dims(self) -> int:
        return len(self.stride)


def per_axis(value: Any, n: int) -> tuple[Any, ...]:
    """A stride, padding or the like as ``n`` values, one for each axis, whether one was given or several."""
    return (value,) * n if not isinstance(value, (tuple, list)) else tuple(value) * (n if len(value) == 1 else 1)


def weighted_op(node: fx.Node) -> WeightedOp | None:
    """``node`` as a :class:`WeightedOp`, or None where it is not one."""
    kind = classify(node)
    if kind not in (OpKind.CONV, OpKind.LINEAR):
        return None
    source, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if kind is OpKind.LINEAR:
        return WeightedOp(node, kind, source, weight, bias)
    dims = CONVOLUTIONS[node.target]
    padding = argument(node, 4, "padding", "valid" if str(node.target).endswith(".padding") else 0)
    sizes = [per_axis(argument(node, 3, "stride", 1), dims), per_axis(argument(node, 5, "dilation", 1), dims)]
    if not isinstance(padding, str):
        padding = per_axis(padding, dims)
        sizes.append(padding)
    if any(isinstance(value, fx.Node) for values in sizes for value in values):
        return None  # "same" padding that follows the input's size at run time
    groups = argument(node, 6, "groups", 1)
    return WeightedOp(node, kind, source, weight, bias, sizes[0], padding, sizes[1], groups)
