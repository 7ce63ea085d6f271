"""What engines have INT8 kernels for, in the forms that they look for: the same network, written in another way."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Share of the int32 range that a bias may take; the rest is for the sum it is added to.
_LARGEST_BIAS = 2**30


def pool_globally(onnx: Any, model: Any) -> None:
    """Means over height and width as the pool that they are: engines have an INT8 kernel for that."""
    graph = model.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.input)}
    initializers = {value.name: value for value in graph.initializer}
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in initializers:
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        axes = {int(axis) % 4 for axis in onnx.numpy_helper.to_array(initializers[node.input[1]])}
        if len(shapes.get(node.input[0], ())) != 4 or axes != {2, 3}:
            continue
        node.op_type = "GlobalAveragePool"
        del node.input[1:], node.attribute[:]
        if not settings.get("keepdims", 1):
            _flatten(onnx, graph, index)


def _flatten(onnx: Any, graph: Any, index: int) -> None:
    """Give a pool the flat output that a mean has: of its integers, where the output is quantized and nothing else."""
    pool = graph.node[index]
    output, pooled = pool.output[0], f"{pool.output[0]}.pooled"
    pool.output[0] = pooled
    after = []
    readers = [node for node in graph.node if output in node.input]
    if [reader.op_type for reader in readers] == ["QuantizeLinear"]:
        (quantize,) = readers
        grid, integers = quantize.input[1:], quantize.output[0]
        for node in graph.node:
            node.input[:] = [f"{integers}.flat" if name == integers else name for name in node.input]
        quantize.output[0] = f"{integers}.flat"  # the same once more: rounded is what the pool gives
        after.append(onnx.helper.make_node("QuantizeLinear", [pooled, *grid], [integers], f"{pooled}.quantize"))
        pooled = f"{integers}.dequantized"
        after.append(onnx.helper.make_node("DequantizeLinear", [integers, *grid], [pooled], f"{pooled}.node"))
        for value in [value for value in graph.value_info if value.name == integers]:
            graph.value_info.remove(value)  # of another shape
    after.append(onnx.helper.make_node("Flatten", [pooled], [output], f"{output}.flatten"))
    for node in reversed(after):
        graph.node.insert(index + 1, node)


def pad_in_convolutions(onnx: Any, model: Any) -> None:
    """Zeros that are added before a convolution as its own padding, which may be unequal in ONNX.

    Beside an operator less that saves a quantization: a padded tensor is one on the grid of what it was made of.
    """
    graph = model.graph
    initializers = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}

    def grid(node: Any) -> list[Any]:
        return [initializers[name].tolist() if name in initializers else name for name in node.input[1:]]

    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        settings = {attribute.name: attribute for attribute in conv.attribute}
        if "auto_pad" in settings and settings["auto_pad"].s != b"NOTSET":
            continue
        steps: list[Any] = []
        name = conv.input[0]
        while len(steps) < 4 and name in made_by:
            steps.append(made_by[name])
            name = steps[-1].input[0] if steps[-1].input else ""
        if [step.op_type for step in steps] != ["DequantizeLinear", "QuantizeLinear", "Pad", "DequantizeLinear"]:
            continue
        dequantize, quantize, pad, source = steps
        amounts = _zeros(pad, initializers)
        if amounts is None or not (grid(dequantize) == grid(quantize) == grid(source)):
            continue
        own = list(settings["pads"].ints) if "pads" in settings else [0] * (len(amounts) - 4)
        half = len(amounts) // 2
        if any(amounts[:2] + amounts[half : half + 2]) or min(amounts) < 0:
            continue
        sides = amounts[2:half] + amounts[half + 2 :]
        if "pads" in settings:
            conv.attribute.remove(settings["pads"])
        conv.attribute.append(onnx.helper.make_attribute("pads", [a + b for a, b in zip(own, sides, strict=True)]))
        conv.input[0] = source.output[0]
    _drop_unread_nodes(graph)


#: Operators that change where values lie and nothing else: OpenVINO has a kernel for three of them, a channel shuffle.
_MOVES = ("Reshape", "Transpose")


def move_at_once(onnx: Any, model: Any) -> None:
    """Values that are moved in several steps are rounded once, after the last of them.

    Between the steps they are on the grid already. OpenVINO takes Reshape, Transpose and Reshape for a channel shuffle
    only where nothing lies in between; ONNX Runtime moves the rounding to where it has been itself.
    """
    graph = model.graph
    numbers = {
        value.name: (value.data_type, onnx.numpy_helper.to_array(value).item())
        for value in graph.initializer
        if not value.dims
    }
    made_by = {name: node for node in graph.node for name in node.output}
    results = {value.name for value in graph.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def grid(node: Any) -> list[Any]:
        return [numbers.get(name, name) for name in node.input[1:]]

    def read_instead(old: str, new: str) -> None:
        for reader in readers.pop(old, []):
            reader.input[:] = [new if name == old else name for name in reader.input]
            readers.setdefault(new, []).append(reader)

    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.output[0] not in results]
    for quantize in quantizes:
        source = made_by.get(quantize.input[0])
        if source is not None and source.op_type == "DequantizeLinear" and grid(source) == grid(quantize):
            read_instead(quantize.output[0], source.input[0])  # nothing is moved: `contiguous`, say
            readers[source.output[0]].remove(quantize)
    for quantize in quantizes:
        source = made_by.get(quantize.input[0])
        values = [node.output[0] for node in readers.get(quantize.output[0], [])]
        following = [reader for value in values for reader in readers.get(value, [])]
        moves = all(node.op_type in _MOVES and node.input[0] in values for node in following)
        if source is not None and source.op_type in _MOVES and moves and not results.intersection(values):
            for value in values:
                read_instead(value, quantize.input[0])
    _drop_unread_nodes(graph)


def _zeros(pad: Any, initializers: dict[str, Any]) -> list[int] | None:
    """How many zeros a Pad adds before each axis, then after each; None where that is not known, or not zeros."""
    mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
    inputs = [*pad.input, "", ""][1:4]
    if mode != b"constant" or inputs[0] not in initializers or inputs[2]:
        return None
    if inputs[1] and (inputs[1] not in initializers or initializers[inputs[1]].any()):
        return None
    return [int(amount) for amount in initializers[inputs[0]]]


def _drop_unread_nodes(graph: Any) -> None:
    results = {value.name for value in graph.output}
    while True:
        read = results.union(*(node.input for node in graph.node))
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    made = {name for node in graph.node for name in node.output}
    kept = [value for value in graph.value_info if value.name in made]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def own_zero_points(model: Any) -> None:
    """Give each weight zeros of its own.

    The exporter writes one constant for all layers of the same size. OpenVINO (2026.4) then subtracts it from some of
    their weights in 16 bits, and computes these layers and their neighbours so: all convolutions of a ConvNeXt. Without
    zeros, which mean the same, ONNX Runtime has no INT8 kernels.
    """
    initializers = {value.name: value for value in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers and len(node.input) == 3:
            zero_point = initializers.get(node.input[2])
            if zero_point is not None and zero_point.dims:
                own = model.graph.initializer.add()
                own.CopyFrom(zero_point)
                own.name = node.input[2] = f"{node.input[0]}.zero_point_{index}"
    _drop_unread_initializers(model.graph)


def quantize_biases(onnx: Any, model: Any) -> None:
    """Biases of INT8 kernels as INT32 on the grid of their sums."""
    graph = model.graph
    initializers = {value.name: value for value in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    dequantizes = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or node.input[2] not in initializers:
            continue
        x, weight = (made_by.get(name) for name in node.input[:2])
        if x is None or weight is None or {x.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        if weight.input[0] not in initializers or readers[node.input[1]] > 1 or readers[node.input[2]] > 1:
            continue
        x_scale = onnx.numpy_helper.to_array(initializers[x.input[1]]).astype(np.float64)
        stored = initializers[weight.input[0]], initializers[weight.input[1]]
        integers, scale = (onnx.numpy_helper.to_array(value) for value in stored)
        bias = onnx.numpy_helper.to_array(initializers[node.input[2]]).astype(np.float64)
        # If a channel's weights are almost zero, its scale is too small for its bias to fit into 32 bits.
        least = np.abs(bias) / (_LARGEST_BIAS * x_scale)
        if (least > scale).any():
            ratio = np.maximum(least / scale, 1.0)
            integers = np.rint(integers / ratio.reshape(-1, *[1] * (integers.ndim - 1))).astype(integers.dtype)
            scale = np.maximum(scale, least).astype(np.float32)
            names = [f"{node.name or node.output[0]}.{part}" for part in ("weight_rescaled", "weight_scale_rescaled")]
            for index, value in enumerate((integers, scale)):
                graph.initializer.append(onnx.numpy_helper.from_array(value, names[index]))
                weight.input[index] = names[index]
        bias_scale = (x_scale * scale.astype(np.float64)).astype(np.float32)
        quantized = np.rint(bias / bias_scale.astype(np.float64)).astype(np.int32)
        name = node.input[2]
        graph.initializer.append(onnx.numpy_helper.from_array(quantized, f"{name}.quantized"))
        graph.initializer.append(onnx.numpy_helper.from_array(bias_scale, f"{name}.scale"))
        dequantizes.append(
            onnx.helper.make_node(
                "DequantizeLinear",
                [f"{name}.quantized", f"{name}.scale"],
                [f"{name}.dequantized"],
                name=f"{name}.dequantize",
                axis=0,
            )
        )
        node.input[2] = f"{name}.dequantized"
    for node in reversed(dequantizes):
        graph.node.insert(0, node)  # they read initializers only
    _drop_unread_initializers(graph)


def _drop_unread_initializers(graph: Any) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [value for value in graph.initializer if value.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
