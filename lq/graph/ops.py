"""What a node of the graph computes, as far as quantization cares."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

aten = torch.ops.aten


class OpKind(enum.Enum):
    """The roles an operator can play in an INT8 graph."""

    CONV = "conv"
    LINEAR = "linear"
    BATCH_NORM = "batch_norm"
    CLAMP = "relu"  # ReLU and its relatives: a clamp, which an INT8 kernel does on its way out
    ADD = "add"
    SAME_SCALE = "same_scale"  # moves or selects values: the output lies on the grid of the input
    AVG_POOL = "avg_pool"
    IDENTITY = "identity"
    OTHER = "other"


#: Layers with a weight that INT8 kernels exist for, in PyTorch's own form.
WEIGHTED_MODULES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_MODULES: dict[type[nn.Module], OpKind] = {
    nn.Conv1d: OpKind.CONV,
    nn.Conv2d: OpKind.CONV,
    nn.Conv3d: OpKind.CONV,
    nn.Linear: OpKind.LINEAR,
    nn.BatchNorm1d: OpKind.BATCH_NORM,
    nn.BatchNorm2d: OpKind.BATCH_NORM,
    nn.BatchNorm3d: OpKind.BATCH_NORM,
    nn.ReLU: OpKind.CLAMP,
    nn.ReLU6: OpKind.CLAMP,
    nn.Hardtanh: OpKind.CLAMP,
    nn.MaxPool1d: OpKind.SAME_SCALE,
    nn.MaxPool2d: OpKind.SAME_SCALE,
    nn.MaxPool3d: OpKind.SAME_SCALE,
    nn.AdaptiveMaxPool1d: OpKind.SAME_SCALE,
    nn.AdaptiveMaxPool2d: OpKind.SAME_SCALE,
    nn.AdaptiveMaxPool3d: OpKind.SAME_SCALE,
    nn.Flatten: OpKind.SAME_SCALE,
    nn.Unflatten: OpKind.SAME_SCALE,
    nn.PixelShuffle: OpKind.SAME_SCALE,
    nn.ChannelShuffle: OpKind.SAME_SCALE,
    nn.Dropout: OpKind.IDENTITY,
    nn.Dropout1d: OpKind.IDENTITY,
    nn.Dropout2d: OpKind.IDENTITY,
    nn.Dropout3d: OpKind.IDENTITY,
    nn.Identity: OpKind.IDENTITY,
    nn.AvgPool1d: OpKind.AVG_POOL,
    nn.AvgPool2d: OpKind.AVG_POOL,
    nn.AvgPool3d: OpKind.AVG_POOL,
    nn.AdaptiveAvgPool1d: OpKind.AVG_POOL,
    nn.AdaptiveAvgPool2d: OpKind.AVG_POOL,
    nn.AdaptiveAvgPool3d: OpKind.AVG_POOL,
}

_FUNCTIONS: dict[Callable[..., Any], OpKind] = {
    F.conv1d: OpKind.CONV,
    F.conv2d: OpKind.CONV,
    F.conv3d: OpKind.CONV,
    F.linear: OpKind.LINEAR,
    F.relu: OpKind.CLAMP,
    F.relu_: OpKind.CLAMP,
    torch.relu: OpKind.CLAMP,
    torch.relu_: OpKind.CLAMP,
    F.relu6: OpKind.CLAMP,
    F.hardtanh: OpKind.CLAMP,
    operator.add: OpKind.ADD,
    operator.iadd: OpKind.ADD,
    torch.add: OpKind.ADD,
    F.max_pool1d: OpKind.SAME_SCALE,
    F.max_pool2d: OpKind.SAME_SCALE,
    F.max_pool3d: OpKind.SAME_SCALE,
    torch.max_pool2d: OpKind.SAME_SCALE,
    F.adaptive_max_pool2d: OpKind.SAME_SCALE,
    F.pixel_shuffle: OpKind.SAME_SCALE,
    torch.flatten: OpKind.SAME_SCALE,
    torch.reshape: OpKind.SAME_SCALE,
    torch.permute: OpKind.SAME_SCALE,
    torch.transpose: OpKind.SAME_SCALE,
    torch.squeeze: OpKind.SAME_SCALE,
    torch.unsqueeze: OpKind.SAME_SCALE,
    F.avg_pool2d: OpKind.AVG_POOL,
    F.adaptive_avg_pool2d: OpKind.AVG_POOL,
    torch.mean: OpKind.AVG_POOL,
    F.dropout: OpKind.IDENTITY,
    F.dropout2d: OpKind.IDENTITY,
}

# The same operators as `torch.export` writes them.
_FUNCTIONS |= {
    aten.relu.default: OpKind.CLAMP,
    aten.hardtanh.default: OpKind.CLAMP,
    aten.max_pool2d.default: OpKind.SAME_SCALE,
    aten.flatten.using_ints: OpKind.SAME_SCALE,
    aten.view.default: OpKind.SAME_SCALE,
    aten.reshape.default: OpKind.SAME_SCALE,
    aten.permute.default: OpKind.SAME_SCALE,
    aten.transpose.int: OpKind.SAME_SCALE,
    aten.squeeze.dim: OpKind.SAME_SCALE,
    aten.squeeze.dims: OpKind.SAME_SCALE,
    aten.unsqueeze.default: OpKind.SAME_SCALE,
    aten.pixel_shuffle.default: OpKind.SAME_SCALE,
}

_METHODS: dict[str, OpKind] = {
    "relu": OpKind.CLAMP,
    "relu_": OpKind.CLAMP,
    "add": OpKind.ADD,
    "add_": OpKind.ADD,
    "flatten": OpKind.SAME_SCALE,
    "view": OpKind.SAME_SCALE,
    "reshape": OpKind.SAME_SCALE,
    "permute": OpKind.SAME_SCALE,
    "transpose": OpKind.SAME_SCALE,
    "squeeze": OpKind.SAME_SCALE,
    "unsqueeze": OpKind.SAME_SCALE,
    "contiguous": OpKind.SAME_SCALE,
    "mean": OpKind.AVG_POOL,
}


#: By name: torchvision takes seconds to import, and where this function is in a graph it was imported.
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"

_INPLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a ``call_module`` node calls, else None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a function node, wherever the caller put it."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def classify(node: fx.Node, root: nn.Module) -> OpKind:
    """The role of ``node``, going by what it calls; what is not known is ``OTHER`` and stays in float."""
    if node.op == "call_module":
        module: Any = module_of(node, root)
        for cls in type(module).__mro__:
            if cls in _MODULES:
                # A subclass may compute something else altogether; only an inherited forward is known.
                known = type(module).forward is cls.forward
                return _MODULES[cls] if known else OpKind.OTHER
        return OpKind.OTHER
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target, OpKind.OTHER)  # type: ignore[arg-type]
        if _qualified_name(node.target) == _STOCHASTIC_DEPTH:
            kind = OpKind.IDENTITY  # the graph that is analysed is the one of eval mode
    elif node.op == "call_method":
        kind = _METHODS.get(str(node.target), OpKind.OTHER)
    else:
        return OpKind.OTHER
    if kind is OpKind.ADD and not (_is_plain_add(node)):
        return OpKind.OTHER
    if kind is OpKind.IDENTITY and argument(node, 3 if "stochastic" in str(node.target) else 2, "training", True):
        return OpKind.OTHER
    return kind


def _qualified_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"


def _is_plain_add(node: fx.Node) -> bool:
    return len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs


def is_inplace(node: fx.Node, root: nn.Module) -> bool:
    """Whether ``node`` writes its result into its first argument."""
    if node.op == "call_module":
        return bool(getattr(module_of(node, root), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if getattr(node.target, "__module__", None) == "_operator":  # where `and_`, `or_`, `not_` are not in place
            return node.target in _INPLACE_OPERATORS
        return bool(node.kwargs.get("inplace", False)) or (name.endswith("_") and not name.endswith("__"))
    return False


def clamp_bounds(node: fx.Node, root: nn.Module) -> tuple[float, float | None]:
    """``(low, high)`` of a ``CLAMP`` node; ``high`` is None for a ReLU."""
    module = module_of(node, root)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(module.min_val), float(module.max_val)
    if node.target is F.relu6:
        return 0.0, 6.0
    if node.target is F.hardtanh:
        return float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    return 0.0, None


@dataclass(frozen=True)
class WeightedOp:
    """A convolution or linear layer as it stands in the graph, however it was written.

    ``input`` and ``weight`` are what the quantizers go on. ``weight`` is None where a ``torch.nn`` layer owns it.
    """

    node: fx.Node
    kind: OpKind
    input: fx.Node
    module: nn.Module | None
    weight: fx.Node | None
    bias: fx.Node | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def spatial_dims(self) -> int:
        return len(self.stride)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(tuple(value)) == 1 else 1)


_FUNCTIONAL_DIMS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def weighted_op(node: fx.Node, root: nn.Module) -> WeightedOp | None:
    """``node`` as a :class:`WeightedOp`, or None where it is none."""
    kind = classify(node, root)
    if kind not in (OpKind.CONV, OpKind.LINEAR):
        return None
    module = module_of(node, root)
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node):
        return None
    if module is None:
        weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
        if not isinstance(weight, fx.Node):
            return None
        if kind is OpKind.LINEAR:
            return WeightedOp(node, kind, source, None, weight, bias)
        dims = _FUNCTIONAL_DIMS[node.target]  # type: ignore[index]
        padding = argument(node, 4, "padding", 0)
        settings = (argument(node, 3, "stride", 1), padding, argument(node, 5, "dilation", 1))
        if any(isinstance(leaf, fx.Node) for value in settings for leaf in _flat(value)):
            return None  # "same" padding that follows the input's size at run time
        return WeightedOp(
            node,
            kind,
            source,
            None,
            weight,
            bias,
            stride=_tuple(settings[0], dims),
            padding=padding if isinstance(padding, str) else _tuple(padding, dims),
            dilation=_tuple(settings[2], dims),
            groups=argument(node, 6, "groups", 1),
        )
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return WeightedOp(
            node,
            kind,
            source,
            module,
            None,
            None,
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
        )
    return WeightedOp(node, kind, source, module, None, None)


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
