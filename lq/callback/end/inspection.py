"""What is looked at before INT8 takes the unit's place: its layers, tensors, predictions and graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lq.analysis.analyze import analyze
from lq.callback.steps.batches import (
    calibration_batches,
    count_samples,
    first_samples,
    has_train_data,
    validation_batches,
    validation_dataloaders,
)
from lq.callback.steps.evaluation import is_overridden
from lq.callback.steps.running import Step, call_unit
from lq.callback.steps.stages import StagedUnit
from lq.charts.chart import Chart
from lq.charts.predictions import Predictions
from lq.charts.tensors import tensor_histogram, weight_histogram
from lq.graph.analysis import GraphAnalysis
from lq.graph.placement import site, source_of
from lq.int8.module import Int8Module
from lq.numerics.observers import HistogramObserver
from lq.numerics.quantizer import Quantizer
from lq.results.analysis import Analysis
from lq.util.modes import evaluating
from lq.workflow.prepare import activation_quantizers, prepared_forward, quantizers, quantizers_off

if TYPE_CHECKING:
    from lq.callback.callback import QuantizationCallback

#: Samples that are looked at; of a large network the analysis takes fewer.
SAMPLES = 32


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's weight and its quantizer.

    Args:
        weight: in float.
        quantizer: with its range.
    """

    weight: Tensor
    quantizer: Quantizer


@dataclass(frozen=True)
class Findings:
    """What was found; empty where nothing was looked at.

    Args:
        analysis: of the layers.
        predictions: of float and INT8.
        activations: the quantizers of the activations by name, each with a histogram of the float tensor.
        weights: by the name of their quantizer.
        inputs: for each layer, by name, the name of its input's quantizer.
        graph: the float graph with its placement.
        graph_root: the module that it is of.
    """

    analysis: Analysis | None = None
    predictions: Predictions | None = None
    activations: dict[str, tuple[Quantizer, HistogramObserver]] = field(default_factory=dict)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    graph: GraphAnalysis | None = None
    graph_root: nn.Module = field(default_factory=nn.Module)

    def tensor_charts(self, layers: list[str] | None = None) -> list[Chart]:
        """A histogram for each quantizer: of the given layers' inputs and weights, or of all tensors."""
        names = None if layers is None else {self.inputs.get(layer) for layer in layers}
        charts = [
            Chart(
                f"activations/{name}",
                f"Values of {name}, and the range of its grid.",
                partial(_activation_chart, name, quantizer, observer),
            )
            for name, (quantizer, observer) in self.activations.items()
            if names is None or name in names
        ]
        charts += [
            Chart(
                f"weights/{name.removesuffix('.weight')}",
                f"Values of {name} before and after rounding.",
                partial(weight_histogram, name, found.weight, found.quantizer),
            )
            for name, found in self.weights.items()
            if layers is None or name.removesuffix(".weight") in layers
        ]
        return charts


def _activation_chart(name: str, quantizer: Quantizer, observer: HistogramObserver, theme: Any) -> Any:
    return tensor_histogram(name, quantizer, theme, observer)


@contextmanager
def going_on(what: str) -> Iterator[None]:
    """An error inside is a warning: a trained and converted model is not to be lost for a picture of it."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"lq: {what} failed, the run goes on without: {type(error).__name__}: {error}")


def inspect_unit(
    callback: QuantizationCallback,
    trainer: Any,
    staged: StagedUnit,
    int8: Int8Module,
    times: list[dict[str, float]] | None = None,
) -> Findings:
    """Look at a unit that is prepared and has its ranges, and at the INT8 network made of it.

    Args:
        callback: whose arguments say what to look at.
        trainer: the Trainer, for its data: a few validation samples, or of the calibration data where there are none.
        staged: the unit.
        int8: its INT8 network.
        times: of the layers, in the order of the report, see :func:`lq.analysis.timing.time_layers`.
    """
    unit, found = staged.unit, Findings()
    step, batches = _samples(callback, trainer, staged)
    if not batches:
        rank_zero_info("lq: there are no data to analyse the layers with")
    with going_on("reading the graph"):
        graph = prepared_forward(unit).analyze()
        found = Findings(weights=_weights(unit, graph), inputs=_inputs(unit, graph), graph=graph, graph_root=unit)
    with going_on("analysing the layers"):
        if batches:
            bar = trainer.progress_bar_callback
            analysis = analyze(
                unit,
                batches,
                timing=False,  # that is done
                seconds=callback.analysis_seconds,
                forward=lambda batch: call_unit(staged, batch, step),
                progress=bar is not None and getattr(bar, "is_enabled", True),
            )
            if times is not None:
                analysis = analysis.with_times(times)
            found = replace(found, analysis=analysis)
    with going_on("collecting histograms"):
        found = replace(found, activations=_activations(staged, step, batches))
    return found


def _samples(callback: QuantizationCallback, trainer: Any, staged: StagedUnit) -> tuple[Step, list[Any]]:
    """A few samples, and the step that takes them: of the validation data, which the ranges were not made of."""
    pl_module: Any = staged.pl_module
    step: Step = "training_step"
    found: list[Any] = []
    with going_on("reading data for the analysis"):
        if (
            is_overridden("validation_step", pl_module)
            and staged.is_judged
            and validation_dataloaders(trainer) is not None
        ):
            step, batches = "validation_step", validation_batches(trainer, pl_module)
        elif callback.calibration_dataloader is not None or has_train_data(trainer):
            batches = calibration_batches(trainer, pl_module, callback.calibration_dataloader)
        else:
            return step, []
        left = SAMPLES
        for batch in batches:
            found.append(first_samples(batch, left))
            left -= max(1, count_samples(found[-1]))
            if left <= 0:
                break
    return step, found


def _weights(unit: nn.Module, graph: GraphAnalysis) -> dict[str, QuantizedWeight]:
    known = quantizers(unit)
    found = {}
    for chain in graph.placement.chains:
        weight = graph.values[chain.op.weight]
        found[chain.weight_key] = QuantizedWeight(weight.detach(), known[chain.weight_key])
    return found


def _inputs(unit: nn.Module, graph: GraphAnalysis) -> dict[str, str]:
    found = {chain.name: site(source_of(chain.op.input)) for chain in graph.placement.chains}
    for total in graph.placement.sums:
        found[site(total.add)] = site(source_of(total.add.all_input_nodes[0]))
    return found


@torch.no_grad()
def _activations(staged: StagedUnit, step: Step, batches: list[Any]) -> dict[str, tuple[Quantizer, HistogramObserver]]:
    """The quantizers with a histogram each: the calibration's, or where training kept none one of ``batches``."""
    unit = staged.unit
    rounding = {name: q for name, q in activation_quantizers(unit).items() if q.rounds and q.calibrated}
    found = {name: (q, q.observer) for name, q in rounding.items() if isinstance(q.observer, HistogramObserver)}
    missing = {name: (q, HistogramObserver()) for name, q in rounding.items() if name not in found}
    if missing and batches:
        hooks = [
            quantizer.register_forward_pre_hook(lambda _, args, observer=observer: observer(args[0]))
            for quantizer, observer in missing.values()
        ]
        try:
            with evaluating(staged.pl_module), quantizers_off(unit):
                for batch in batches:
                    call_unit(staged, batch, step)
        finally:
            for hook in hooks:
                hook.remove()
        found |= missing
    return {name: found[name] for name in rounding if name in found}
