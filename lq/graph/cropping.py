"""Cropping kernels: without the weights that, for one size of image, never meet anything but padding.

A 3x3 convolution with a padding of 1 over a single position multiplies its centre with that position and its eight
other weights with zeros. Networks made for large images do that on small ones: a ResNet-18 with the ImageNet stem
has it in three layers for images of 32x32, which hold 7 of its 11 million weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import fx, nn

from lq.graph.convolution import conv_settings, is_convolution
from lq.graph.interpret import node_values
from lq.graph.qdq import DEQUANTIZE_WEIGHT, lookup

_Network = TypeVar("_Network", bound=nn.Module)


class Window(NamedTuple):
    """A convolution along one axis.

    Args:
        start: first position of the kernel that is kept.
        stop: one past the last.
        stride: in steps of the input.
        padding: on either side of the input.
    """

    start: int
    stop: int
    stride: int
    padding: int


def crop_kernels(network: _Network, inputs: Mapping[str, Any]) -> _Network:
    """A network that computes for inputs of these sizes what ``network`` does, and for no others.

    Args:
        network: a module with the ``graph`` it runs, as :func:`lq.convert` and :func:`lq.fold_batch_norm` make it.
        inputs: by name, of those sizes.

    Returns:
        A copy with smaller kernels; ``network`` itself where there is nothing to crop.
    """
    values = node_values(_graph(network), network, inputs)
    windows = [_windows(network, node, values) for node in _graph(network).nodes]
    if not any(windows):
        return network
    cropped = copy.deepcopy(network)
    for node, node_windows in zip(list(_graph(cropped).nodes), windows, strict=True):
        if node_windows:
            _crop(cropped, node, node_windows)
    if isinstance(cropped, fx.GraphModule):
        cropped.recompile()
    return cropped


def _graph(network: nn.Module) -> fx.Graph:
    graph: fx.Graph = network.graph  # type: ignore[assignment]
    return graph


def _weight(node: fx.Node) -> fx.Node | None:
    """The attribute that a convolution's weight is read from, directly or through its dequantization."""
    source = node.args[1]
    if isinstance(source, fx.Node) and source.target is DEQUANTIZE_WEIGHT:
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _windows(network: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> list[Window]:
    """The windows of a convolution that can be cropped, axis by axis; none for any other node."""
    if not is_convolution(node) or (attribute := _weight(node)) is None:
        return []
    kernel = lookup(network, str(attribute.target)).shape[2:]
    before, after = (values[value].shape[-len(kernel) :] for value in (node.args[0], node))  # type: ignore[index]
    windows = [window(*axis) for axis in zip(before, after, kernel, *conv_settings(node)[:3], strict=True)]
    return windows if any(w.stop - w.start < size for w, size in zip(windows, kernel, strict=True)) else []


def window(before: int, after: int, kernel: int, stride: int, padding: int, dilation: int) -> Window:
    """The smallest part of a kernel that computes the same along one axis.

    Args:
        before: size of the input.
        after: size of the output.
        kernel: positions of the kernel.
        stride: of the convolution, as are the next two.
        padding: zeros on either side.
        dilation: input positions from one of the kernel's to the next.
    """

    def is_met(position: int) -> bool:
        return any(0 <= at * stride - padding + position * dilation < before for at in range(after))

    def outputs(start: int, stop: int, step: int) -> int:
        padded = before + 2 * (padding - start * dilation)
        return (padded - dilation * (stop - start - 1) - 1) // step + 1

    met = [position for position in range(kernel) if is_met(position)]
    if met:
        parts = [(start, stop) for start in range(met[0] + 1) for stop in range(met[-1] + 1, kernel + 1)]
        for start, stop in sorted(parts, key=lambda part: part[1] - part[0]):
            # A convolution can only pad with the same number of zeros on either side.
            if padding - start * dilation >= 0 and outputs(start, stop, stride) == after:
                # A single output needs no stride, and kernels without one are faster.
                step = 1 if after == 1 and outputs(start, stop, 1) == 1 else stride
                return Window(start, stop, step, padding - start * dilation)
    return Window(0, kernel, stride, padding)


def _crop(network: nn.Module, node: fx.Node, windows: list[Window]) -> None:
    graph, attribute, source = _graph(network), _weight(node), node.args[1]
    assert attribute is not None and isinstance(source, fx.Node)
    path, _, name = str(attribute.target).rpartition(".")
    weight = lookup(network, str(attribute.target))
    kept = (slice(None), slice(None), *(slice(w.start, w.stop) for w in windows))
    part = weight.detach()[kept].contiguous()
    readers = sum(len(other.users) for other in graph.nodes if other.target == attribute.target)
    if max(readers, len(source.users)) > 1:  # other layers may need the whole weight
        name = f"{name}_of_{node.name}"
    owner = network.get_submodule(path)
    if isinstance(weight, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(part, requires_grad=False))
    else:
        owner.register_buffer(name, part)
    with graph.inserting_before(node):
        cropped = graph.get_attr(f"{path}.{name}" if path else name)
        if source is not attribute:
            cropped = graph.call_function(DEQUANTIZE_WEIGHT, (cropped, *source.args[1:]))
    bias = node.args[2] if len(node.args) > 2 else None
    _, _, dilation, groups = conv_settings(node)
    stride, padding = [w.stride for w in windows], [w.padding for w in windows]
    node.args = (node.args[0], cropped, bias, stride, padding, dilation, groups)
    for unread in (source, attribute):
        if not unread.users and unread in graph.nodes:
            graph.erase_node(unread)
