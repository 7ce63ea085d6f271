"""Where the time goes: each layer in the float model and in the INT8 network, node by node."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from lq.analysis.layers import Layer, layers_of
from lq.analysis.rounding import Roundings
from lq.graph.analysis import GraphAnalysis
from lq.graph.interpret import run_node
from lq.graph.placement import site, source_of
from lq.graph.qdq import lookup, origin
from lq.int8.module import Int8Module
from lq.numerics.quantizer import WeightQuantizer
from lq.util.cpu import has_onednn_int8
from lq.util.modes import evaluating
from lq.workflow.calibrate import batch_size
from lq.workflow.convert import convert
from lq.workflow.prepare import prepared_forward, quantizers, unprepared
from lq.workflow.reporting import report_rows

#: Warm-up rounds, the least and the most rounds that are timed, and a limit on their time, seconds.
_WARMUP, _FEWEST, _MOST, _SECONDS = 2, 5, 50, 3.0


class _Stopwatch:
    """Runs a graph and notes how long each operator took, seconds."""

    def __init__(self, root: nn.Module, graph: fx.Graph, attribute: Callable[[str], Any]) -> None:
        self._root = root
        self._graph = graph
        self._attribute = attribute
        self.seconds: dict[fx.Node, float] = {}

    def run(self, *inputs: Any) -> None:
        given = iter(inputs)
        values: dict[fx.Node, Any] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            start = time.perf_counter()
            values[node] = run_node(node, values.__getitem__, self._root, self._attribute)
            if node.op.startswith("call"):
                self.seconds[node] = time.perf_counter() - start


def time_layers(model: nn.Module, int8: Int8Module, inputs: dict[str, Any]) -> list[dict[str, float]]:
    """:func:`layer_times` of a prepared model and what it was converted to, in the order of their report.

    Args:
        model: prepared, with ranges.
        int8: from :func:`lq.convert`, for the model's own target.
        inputs: what to run it on, by name.
    """
    analysis = prepared_forward(model).analyze()
    rows = report_rows(model, analysis, quantizers(model))
    layers = layers_of(rows, analysis, Roundings(model, analysis))
    return layer_times(model, analysis, layers, inputs, int8)


def layer_times(
    model: nn.Module,
    analysis: GraphAnalysis,
    layers: list[Layer],
    inputs: dict[str, Any],
    int8: Int8Module | None = None,
) -> list[dict[str, float]]:
    """``float_ms`` and ``int8_ms`` of each layer, milliseconds per sample: medians over rounds that take turns.

    The float model runs as it is, batch norm and all; a layer's time is that of all operators fused into its kernel.
    What turns a tensor into integers counts for the operator that makes it, or else (the model's input) for the first
    layer that reads it; moves of values between layers (max-pooling, reshapes) count for none.

    Args:
        model: prepared, with ranges.
        analysis: its float graph.
        layers: its layers.
        inputs: what to run it on, by name.
        int8: what it was converted to; converted here if it is not given.

    Returns:
        A dict for each layer: empty if the model is not on the CPU or not in float32, without ``int8_ms`` if torch
        has no INT8 kernels for this CPU.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if any(t.device.type != "cpu" for t in tensors) or any(p.dtype is not torch.float32 for p in floats):
        return [{} for _ in layers]
    contenders = {"int8_ms": _int8_network(model, int8, inputs)} if has_onednn_int8() else {}
    with unprepared(model), evaluating(model):
        contenders = {
            "float_ms": _Stopwatch(model, analysis.graph, partial(analysis.captured.read, model)),
            **contenders,
        }
        rounds = _race(contenders, inputs)
    samples = batch_size(inputs)
    owners = {"float_ms": _float_owners(layers), "int8_ms": _int8_owners(layers, model)}
    times: list[dict[str, float]] = [{} for _ in layers]
    for name, runs in rounds.items():
        spent = [[0.0] * len(layers) for _ in runs]
        for seconds, total in zip(runs, spent, strict=True):
            for node, value in seconds.items():
                owner = owners[name].get(site(node) if name == "float_ms" else origin(node))
                if owner is not None:
                    total[owner] += value
        for index, layer in enumerate(layers):
            if layer.node is not None:
                times[index][name] = statistics.median(total[index] for total in spent) * 1e3 / samples
    return times


def _race(contenders: dict[str, _Stopwatch], inputs: dict[str, Any]) -> dict[str, list[dict[fx.Node, float]]]:
    """The times of each contender's operators, round by round; they take turns, so that noise disturbs all alike."""
    rounds: dict[str, list[dict[fx.Node, float]]] = {name: [] for name in contenders}
    deadline = float("inf")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for index in range(_WARMUP + _MOST):
            if index == _WARMUP:
                deadline = time.perf_counter() + _SECONDS
            if index >= _WARMUP + _FEWEST and time.perf_counter() > deadline:
                break
            for name, contender in contenders.items():
                copies = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, list(inputs.values()))
                contender.run(*copies)
                if index >= _WARMUP:
                    rounds[name].append(dict(contender.seconds))
    return rounds


def _int8_network(model: nn.Module, int8: Int8Module | None, inputs: dict[str, Any]) -> _Stopwatch:
    """The converted network as its kernels run it for these inputs."""
    int8 = _converted(model) if int8 is None else int8
    lowered = int8.kernels(*inputs.values())
    root = nn.Module()
    root.add_module("module", int8)
    for name, value in lowered.constants.items():
        setattr(root, name, value)
    return _Stopwatch(root, lowered.graph, partial(lookup, root))


def _converted(model: nn.Module) -> Int8Module:
    """The INT8 network of a model that is left as it is."""
    weights = {name: q for name, q in quantizers(model).items() if isinstance(q, WeightQuantizer)}
    kept = {q: ([(b, b.clone()) for b in q.buffers()], q.calibrated) for q in weights.values()}
    try:
        return convert(model)
    finally:  # the conversion updated the weights' ranges
        for quantizer, (buffers, calibrated) in kept.items():
            for buffer, value in buffers:
                buffer.copy_(value)
            quantizer.calibrated = calibrated


def _float_owners(layers: list[Layer]) -> dict[str | None, int]:
    return {site(node): index for index, layer in enumerate(layers) for node in layer.nodes}


def _int8_owners(layers: list[Layer], model: nn.Module) -> dict[str | None, int]:
    owners = _float_owners(layers)
    for index, layer in enumerate(layers):
        for read in layer.inputs:
            owners.setdefault(site(source_of(read.node)), index)
    return owners
