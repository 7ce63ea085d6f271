"""Operators on integers: what kernels read and write, and what only moves or selects them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lq.graph.ops import per_axis

aten = torch.ops.aten


def quantize_activation(x: Tensor, scale: float, zero_point: int, grid_min: int, grid_max: int) -> Tensor:
    """The ``quantize_per_tensor`` operator in few steps, with the channels last as convolutions' kernels want them."""
    return _on_grid(x.mul(1.0 / scale), zero_point, grid_min, grid_max)


def quantize_features(x: Tensor, scale: float, zero_point: int, grid_min: int, grid_max: int) -> Tensor:
    """The same for linear layers, whose features are the last axis."""
    return _on_grid(x.mul(1.0 / scale), zero_point, grid_min, grid_max, torch.contiguous_format)


def quantize_normalized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    zero_point: int,
    grid_min: int,
    grid_max: int,
) -> Tensor:
    """Batch norm and ``quantize_per_tensor``, with the grid's scale in ``weight`` and ``bias`` already."""
    normalized = F.batch_norm(x, mean, variance, weight, bias, eps=epsilon)
    return _on_grid(normalized, zero_point, grid_min, grid_max)


def _on_grid(
    steps: Tensor, zero_point: int, grid_min: int, grid_max: int, layout: torch.memory_format | None = None
) -> Tensor:
    """The integers for ``steps`` of a grid, which are overwritten."""
    q = steps.round_()
    if zero_point:
        q = q.add_(zero_point)
    if layout is None:
        layout = torch.channels_last if q.dim() == 4 else torch.preserve_format
    return q.clamp_(grid_min, grid_max).to(torch.uint8, memory_format=layout)


def dequantize_activation(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """The ``dequantize_per_tensor`` operator."""
    return q.to(torch.float32).sub_(zero_point).mul_(scale)


def subsample(q: Tensor, stride: list[int]) -> Tensor:
    """Every ``stride``-th pixel: what a 1x1 convolution with that stride reads."""
    return q[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)


def pad(q: Tensor, padding: list[int], zero_point: int) -> Tensor:
    """``q`` padded by ``padding`` on either side of each spatial axis, with the zero point."""
    sides = [side for axis in reversed(padding) for side in (axis, axis)]
    padded = F.pad(q, sides, value=zero_point)
    return padded.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else padded


def max_pool2d(
    q: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    settings = [list(per_axis(value, 2)) for value in (kernel_size, stride or kernel_size, padding, dilation)]
    pooled: Tensor = torch.ops.quantized.max_pool2d(q, *settings, ceil_mode)
    return pooled


def max_pool1d(
    q: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """As the two-dimensional pool, for which there is a kernel."""
    kernel, stride, padding = (per_axis(value, 1) for value in (kernel_size, stride or kernel_size, padding))
    settings = ([1, *stride], [0, *padding], [1, *per_axis(dilation, 1)])
    return max_pool2d(q.unsqueeze(-2), [1, *kernel], *settings, ceil_mode).squeeze(-2)


def max_pool3d(
    q: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    # The kernel takes only floats, in which the integers are exact; so do those below.
    return F.max_pool3d(q.float().contiguous(), kernel_size, stride or None, padding, dilation, ceil_mode).to(
        torch.uint8
    )


def adaptive_max_pool1d(q: Tensor, output_size: Any) -> Tensor:
    return F.adaptive_max_pool1d(q.float(), output_size).to(torch.uint8)


def adaptive_max_pool2d(q: Tensor, output_size: Any) -> Tensor:
    return F.adaptive_max_pool2d(q.float(), output_size).to(torch.uint8)


def adaptive_max_pool3d(q: Tensor, output_size: Any) -> Tensor:
    return F.adaptive_max_pool3d(q.float(), output_size).to(torch.uint8)


#: Max pools by each of their names, with what computes them on integers.
POOLS: dict[Any, Callable[..., Tensor]] = {
    aten.max_pool1d.default: max_pool1d,
    aten.max_pool1d_with_indices.default: max_pool1d,
    aten.max_pool2d.default: max_pool2d,
    aten.max_pool2d_with_indices.default: max_pool2d,
    aten.max_pool3d.default: max_pool3d,
    aten.max_pool3d_with_indices.default: max_pool3d,
    aten.adaptive_max_pool1d.default: adaptive_max_pool1d,
    aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
    aten.adaptive_max_pool3d.default: adaptive_max_pool3d,
    F.max_pool1d: max_pool1d,
    F.max_pool2d: max_pool2d,
    F.max_pool3d: max_pool3d,
    F.adaptive_max_pool1d: adaptive_max_pool1d,
    F.adaptive_max_pool2d: adaptive_max_pool2d,
    F.adaptive_max_pool3d: adaptive_max_pool3d,
    torch.max_pool1d: max_pool1d,
    torch.max_pool2d: max_pool2d,
    torch.max_pool3d: max_pool3d,
}

#: What moves integers as it moves floats, and may return a view.
MOVES: set[Any] = {
    aten.alias.default,
    aten.cat.default,
    aten.channel_shuffle.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.permute.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.t.default,
    aten.transpose.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    F.pixel_shuffle,
    torch.cat,
    torch.flatten,
    torch.permute,
    torch.reshape,
    torch.squeeze,
    torch.transpose,
    torch.unsqueeze,
}

_MOVING_METHODS = {"flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"}

_MOVING_MODULES = (nn.Flatten, nn.Unflatten)

#: What may add a border of zeros, which are the zero point among integers.
_PADS = (F.pad, aten.pad.default, aten.constant_pad_nd.default)

#: What only reads a tensor's sizes, which integers share with their floats.
_SIZES = {aten.sym_size.int, aten.sym_size.default, aten.size.int, aten.size.default, aten.dim.default}


def pool_of(node: fx.Node) -> fx.Node | None:
    """The max pool whose values ``node`` is: itself, or the one whose values (not indices) it takes."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.target in POOLS else None


def pool_call(pool: fx.Node) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """What computes a max pool on integers, and its arguments."""
    function = POOLS[pool.target]
    # ``return_indices`` comes last where it is given: only the pool's values are needed.
    most = 2 if "adaptive" in function.__name__ else 6
    kwargs = {name: value for name, value in pool.kwargs.items() if name not in ("input", "self", "return_indices")}
    read = pool.args or (pool.kwargs["input"],)
    return function, tuple(read[:most]), kwargs


def moves(node: fx.Node, root: nn.Module) -> bool:
    """Whether ``node`` gives the values it reads, or some of them, in another place or shape."""
    if node.op == "call_function":
        return node.target in MOVES or (node.target in _PADS and _padding(node).get("mode", "constant") != "constant")
    if node.op == "call_method":
        return node.target in _MOVING_METHODS and not has_dtype(node)
    return node.op == "call_module" and type(root.get_submodule(str(node.target))) in _MOVING_MODULES


def _padding(node: fx.Node) -> dict[str, Any]:
    """The arguments of a padding by name."""
    names = ["input", "pad", "mode", "value"]
    if node.target is aten.constant_pad_nd.default:
        names.remove("mode")
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def border(node: fx.Node) -> tuple[int, ...] | None:
    """The sides of a border of zeros that ``node`` adds, as :func:`torch.nn.functional.pad` takes them, or None."""
    if node.op != "call_function" or node.target not in _PADS:
        return None
    given = _padding(node)
    is_zeros = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    sides = given["pad"]
    return tuple(sides) if is_zeros and all(isinstance(side, int) for side in sides) else None


def has_dtype(node: fx.Node) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def asks_for_sizes(node: fx.Node) -> bool:
    """Whether ``node`` reads only a tensor's sizes."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    if node.op != "call_function":
        return False
    return node.target in _SIZES or (node.target is getattr and node.args[1] in ("shape", "ndim"))
