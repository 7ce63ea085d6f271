"""Verification: an exported file against the network it was exported from, before it is deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from lq.engines.onnxruntime import import_onnxruntime
from lq.errors import ExportMismatchError
from lq.graph.qdq import QUANTIZE, constant_qparams
from lq.int8.module import Int8Module
from lq.int8.onednn import lower

#: Largest RMS difference of the outputs, relative to their RMS, in a network that does not amplify rounding errors:
#: engines round some ties to different neighbours, and that spreads through the layers.
OUTPUT_TOLERANCE = 0.1

#: Largest mean difference of a layer's integers, in steps of its grid, where it reads the same integers: those that
#: lie next to the middle between two may round to either.
LAYER_TOLERANCE = 0.05

#: The same within one channel, where a single integer weighs more.
CHANNEL_TOLERANCE = 0.5

#: Channels with fewer integers than this have no meaningful mean.
_CHANNEL_SIZE = 16

#: Largest RMS difference of a channel before it is rounded, where the same operators compute it from the same integers:
#: relative to its RMS, and in steps of its grid, which is what it may be where next to nothing is left to round.
VALUE_TOLERANCE = 0.01

#: Largest RMS difference of the outputs, relative to their RMS, where the same operators compute them from the same
#: inputs.
FLOAT_TOLERANCE = 1e-3

#: How often the network's own spread is drawn, and how much more than the largest draw is allowed.
_DRAWS = 3
_MARGIN = 2.0


class UnreadableError(RuntimeError):
    """An engine cannot run a file, which does not mean that the file is wrong."""

    def __init__(self, runtime: str, error: Exception) -> None:
        self.runtime = runtime
        # If loading failed, the engine's own message comes first.
        self.reason = " ".join(str(error.__cause__ or error).split())
        super().__init__(f"{runtime} cannot run the file: {self.reason}")


@dataclass(frozen=True)
class Verification:
    """How far an engine's outputs are from the simulation of the INT8 network.

    Args:
        runtime: the engine.
        samples: how many samples were compared.
        max_difference: largest absolute difference of an output.
        relative_difference: root mean square of the differences over that of the outputs.
        top1_agreement: share of the samples with the same largest output, in [0, 1]; None where the outputs are not
            one matrix of scores.
        allowed: the largest ``relative_difference`` that roundings can explain, see :func:`allowed_difference`.
    """

    runtime: str
    samples: int
    max_difference: float
    relative_difference: float
    top1_agreement: float | None
    allowed: float = OUTPUT_TOLERANCE

    def __str__(self) -> str:
        text = f"{self.runtime}: largest difference {self.max_difference:.3g}, RMS {self.relative_difference:.2%}"
        if self.top1_agreement is not None:
            text += f", top-1 agreement {self.top1_agreement:.1%}"
        if self.allowed > OUTPUT_TOLERANCE:
            text += f", where roundings alone make up to {self.allowed:.0%} of the outputs"
        return f"{text} ({self.samples} samples)"


def compare(runtime: str, outputs: Any, expected: Any) -> Verification:
    """Outputs of an engine against those of the simulation, in any nesting."""
    pairs = [
        (actual.double(), wanted.double())
        for actual, wanted in zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
        if isinstance(wanted, Tensor)
    ]
    for actual, wanted in pairs:
        if actual.shape != wanted.shape:
            raise ExportMismatchError(
                f"{runtime} returns an output of shape {tuple(actual.shape)} instead of {tuple(wanted.shape)}"
            )
    error = torch.cat([(actual - wanted).reshape(-1) for actual, wanted in pairs])
    size = torch.cat([wanted.reshape(-1) for _, wanted in pairs])
    scores = pairs[0][1]
    agreement = None
    if len(pairs) == 1 and scores.dim() == 2 and scores.shape[1] > 1:
        agreement = float((pairs[0][0].argmax(1) == scores.argmax(1)).double().mean())
    relative = float(error.square().mean().sqrt() / size.square().mean().sqrt().clamp(min=1e-12))
    samples = len(scores) if scores.dim() else 1
    return Verification(runtime, samples, float(error.abs().max()), relative, agreement)


@dataclass(frozen=True)
class QuantizedTensor:
    """What a quantize node of the simulation reads and makes.

    Args:
        value: the tensor before it is rounded.
        step: the distance of two neighbours on its grid.
        integers: the tensor afterwards.
    """

    value: Tensor
    step: float
    integers: Tensor


class _Simulation(fx.Interpreter):
    """Runs a quantize/dequantize graph with its own function for every quantize node."""

    def __init__(self, model: Int8Module, quantize: Callable[[fx.Node, tuple[Any, ...]], Tensor]) -> None:
        super().__init__(model, graph=constant_qparams(model.graph, model))
        self._quantize = quantize

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target is QUANTIZE:
            return self._quantize(n, self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any]) -> Any:
        return self.run(*inputs.values())


def simulated(model: Int8Module, inputs: Mapping[str, Any]) -> tuple[Any, list[QuantizedTensor]]:
    """The outputs of the simulation, and what each quantize node reads and makes, in the order of the graph."""
    quantized: list[QuantizedTensor] = []

    def quantize(node: fx.Node, args: tuple[Any, ...]) -> Tensor:
        integers: Tensor = QUANTIZE(*args)
        quantized.append(QuantizedTensor(args[0], float(args[1]), integers))
        return integers

    return _Simulation(model, quantize).outputs(inputs), quantized


def allowed_difference(model: Int8Module, inputs: Mapping[str, Any], outputs: Any) -> float:
    """The relative difference of the outputs that an engine may have although all its layers are right.

    A deep network amplifies a single rounding, with random weights to 2 to 40 % of its outputs, and many roundings no
    more than one. So the amplification is measured: the simulation runs again with noise before each quantizer, large
    enough to move a layer's integers by as much as :data:`LAYER_TOLERANCE` allows on average.

    Args:
        model: the INT8 network.
        inputs: by name.
        outputs: the simulation's.
    """
    generator = torch.Generator().manual_seed(0)

    def quantize(node: fx.Node, args: tuple[Any, ...]) -> Tensor:
        x, scale, *rest = args
        # Uniform within a of either side it moves a/2 of the integers.
        noise = torch.rand(x.shape, generator=generator).mul_(2).sub_(1).mul_(2 * LAYER_TOLERANCE * scale)
        quantized: Tensor = QUANTIZE(x + noise, scale, *rest)
        return quantized

    spread = [
        compare("noise", _Simulation(model, quantize).outputs(inputs), outputs).relative_difference
        for _ in range(_DRAWS)
    ]
    return max(OUTPUT_TOLERANCE, _MARGIN * max(spread))


def _by_channel(steps: Tensor) -> Iterator[Tensor]:
    """``steps`` as (channels, values of a channel), for either place that a layer may have its channels in."""
    if steps.dim() < 2:
        yield steps.reshape(1, -1)
        return
    yield steps.transpose(0, 1).flatten(1)
    if steps.dim() > 2:  # linear layers have their channels last
        yield steps.flatten(0, -2).T


def _check_shape(what: str, name: str, actual: Tensor, wanted: Tensor) -> None:
    if actual.shape != wanted.shape:
        raise ExportMismatchError(
            f"{what} differs from the INT8 network in the layer that ends in {name!r}: it gives the shape "
            f"{tuple(actual.shape)} instead of {tuple(wanted.shape)}"
        )


def _check_integers(what: str, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Compare the integers that layers computed from given integers with the simulation's.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
    """
    for name, actual, wanted in pairs:
        _check_shape(what, name, actual, wanted)
        steps = (actual.int() - wanted.int()).abs().float()
        if not steps.numel():
            continue
        means = [channels.mean(1) for channels in _by_channel(steps) if channels.shape[1] >= _CHANNEL_SIZE]
        worst = max((float(mean.max()) for mean in means), default=0.0)
        if steps.mean() > LAYER_TOLERANCE or worst > CHANNEL_TOLERANCE:
            raise ExportMismatchError(
                f"{what} differs from the INT8 network in the layer that ends in {name!r}: its integers are "
                f"{steps.mean():.2f} steps apart on average, {worst:.2f} in one channel, {steps.max():.0f} at most"
            )


def _flat_like(wanted: Tensor, actual: Tensor) -> Tensor:
    """``actual`` without the height and width of 1 that a pool leaves, where ``wanted`` is a mean that has none."""
    return actual.flatten(1) if actual.shape == (*wanted.shape, 1, 1) else actual


def _check_values(what: str, pairs: Iterable[tuple[str, Tensor, QuantizedTensor]]) -> None:
    """Compare what layers computed from given integers, before it is rounded, with the simulation's.

    Rounding hides a wrong scale of a channel that lies within a few steps of its tensor's grid.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
    """
    for name, actual, wanted in pairs:
        _check_shape(what, name, actual, wanted.value)
        if not actual.numel():
            continue
        equal = torch.isclose(actual, wanted.value, rtol=0, atol=0, equal_nan=True)  # of infinite ones, too
        difference = (actual - wanted.value).masked_fill(equal, 0.0) / wanted.step
        for values, differences in zip(_by_channel(wanted.value / wanted.step), _by_channel(difference), strict=True):
            size, apart = (steps.square().mean(1).sqrt() for steps in (values, differences))
            excess = apart - VALUE_TOLERANCE * (1 + size)
            if not (excess <= 0).all():
                worst = int(excess.argmax())
                raise ExportMismatchError(
                    f"{what} differs from the INT8 network in the layer that ends in {name!r}: before it is rounded, "
                    f"channel {worst} is {apart[worst]:.2f} steps of the grid apart (RMS) where its values are "
                    f"{size[worst]:.2f}"
                )


def check_program(
    loaded: Int8Module, names: list[str], expected: list[QuantizedTensor], outputs: Any, inputs: Mapping[str, Any]
) -> None:
    """Compare what a ``.pt2`` program computes as written, without kernels, with the simulation.

    Each layer is given the simulation's integers to read, as in :func:`check_onnx`.

    Args:
        loaded: the network in the file.
        names: of the tensors that are quantized.
        expected: what the simulation quantizes under these names.
        outputs: the simulation's outputs.
        inputs: by name.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
    """
    given = iter(expected)
    values: list[Tensor] = []
    computed: list[Tensor] = []

    def quantize(node: fx.Node, args: tuple[Any, ...]) -> Tensor:
        values.append(args[0])
        computed.append(QUANTIZE(*args))
        wanted = next(given, None)
        return computed[-1] if wanted is None else wanted.integers

    actual = _Simulation(loaded, quantize).outputs(inputs)
    if len(computed) != len(expected):
        raise ExportMismatchError(f"the .pt2 file quantizes {len(computed)} tensors, the INT8 network {len(expected)}")
    what = "the .pt2 file"
    _check_integers(what, zip(names, computed, (wanted.integers for wanted in expected), strict=True))
    _check_values(what, zip(names, values, expected, strict=True))
    _check_last_layer(what, actual, outputs)


def check_kernels(
    loaded: Int8Module, names: list[str], expected: list[QuantizedTensor], outputs: Any, inputs: Mapping[str, Any]
) -> None:
    """Compare what this CPU's kernels compute with the simulation, as :func:`check_program` does.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
    """
    graph = constant_qparams(loaded.graph, loaded)
    indices = {node: index for index, node in enumerate(node for node in graph.nodes if node.target is QUANTIZE)}
    # The kernels' integers are unsigned.
    integers = (tensor.integers for tensor in expected)
    wanted = [(value.int() + 128).to(torch.uint8) if value.dtype is torch.int8 else value for value in integers]
    computed: dict[int, Tensor] = {}

    def watch(node: fx.Node, integers: Tensor) -> Tensor:
        index = indices[node]
        computed[index] = integers.clone()
        given = wanted[index].clone()  # a kernel may write over it
        return given.contiguous(memory_format=torch.channels_last) if given.dim() == 4 else given

    actual = lower(graph, loaded, list(inputs.values()), watch).outputs
    pairs = ((names[index], value, wanted[index]) for index, value in sorted(computed.items()))
    _check_integers("what this CPU's INT8 kernels make of it", pairs)
    _check_last_layer("what this CPU's INT8 kernels make of it", actual, outputs)


def _check_last_layer(what: str, actual: Any, outputs: Any) -> None:
    compared = compare(what, actual, outputs)
    if compared.relative_difference > FLOAT_TOLERANCE:
        raise ExportMismatchError(f"{what} differs from the INT8 network in its last layer: {compared}")


def check_onnx(
    model: Any, names: list[str], expected: list[QuantizedTensor], outputs: Any, inputs: list[Tensor]
) -> None:
    """Compare what an ONNX model computes in each layer with what the simulation does.

    ONNX Runtime fuses nothing here, and each layer is given the simulation's integers to read: a rounding that went
    the other way further up can neither hide a wrong layer nor be taken for one.

    Args:
        model: the ``onnx.ModelProto``.
        names: names of the integers in it, see :func:`lq.formats.onnx.write.to_onnx`.
        expected: what the simulation quantizes under these names.
        outputs: the simulation's outputs.
        inputs: the flat inputs.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
        UnreadableError: where ONNX Runtime cannot run it.
    """
    import onnx

    ort = import_onnxruntime()
    apart = onnx.ModelProto()
    apart.CopyFrom(model)
    wanted = {f"{name}.quantized": tensor for name, tensor in zip(names, expected, strict=True)}
    feeds = {value.name: tensor.numpy(force=True) for value, tensor in zip(model.graph.input, inputs, strict=True)}
    read, computed = {}, {}
    for node in apart.graph.node:
        name = node.output[0]
        if node.op_type == "QuantizeLinear" and name in wanted:
            integers = wanted[name].integers
            dtype = onnx.TensorProto.UINT8 if integers.dtype is torch.uint8 else onnx.TensorProto.INT8
            read[name] = node.input[0]
            node.output[0] = computed[name] = f"{name}.computed"
            apart.graph.output.append(onnx.helper.make_tensor_value_info(computed[name], dtype, None))
            apart.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, integers.shape))
            feeds[name] = integers.contiguous().numpy()
    known = {value.name for value in (*apart.graph.input, *apart.graph.output)}
    for value in dict.fromkeys(read.values()):
        if value not in known:
            apart.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(apart.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnreadableError("onnxruntime", error) from error
    names = [value.name for value in apart.graph.output]
    results = {name: torch.from_numpy(value) for name, value in zip(names, session.run(None, feeds), strict=True)}
    for name in computed:
        for value in {read[name], computed[name]} & results.keys():
            results[value] = _flat_like(wanted[name].integers, results[value])
    what, ends = "the ONNX file", {name: name.removesuffix(".quantized") for name in computed}
    _check_integers(what, ((ends[name], results[output], wanted[name].integers) for name, output in computed.items()))
    _check_values(
        what, ((ends[name], results[value], wanted[name]) for name, value in read.items() if value in results)
    )
    _check_last_layer(what, [results[value.name] for value in model.graph.output], outputs)
