"""What is looked at before INT8 takes the unit's place: its layers, tensors, predictions and graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lq.analysis.analyze import analyze
from lq.callback.settings import QuantizationSettings
from lq.callback.steps.batches import (
    calibration_batches,
    count_samples,
    first_samples,
    has_train_data,
    validation_batches,
)
from lq.callback.steps.calls import Step
from lq.callback.steps.evaluation import judged_step
from lq.callback.steps.running import call_unit
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
                partial(weight_histogram, name, quantized.weight, quantized.quantizer),
            )
            for name, quantized in self.weights.items()
            if layers is None or name.removesuffix(".weight") in layers
        ]
        return charts


def _activation_chart(name: str, quantizer: Quantizer, observer: HistogramObserver, theme: Any) -> Any:
    return tensor_histogram(name, quantizer, theme, observer)


@contextmanager
def warns_on_failure(what: str) -> Iterator[None]:
    """An error inside is a warning: a trained and converted model is not to be lost for a picture of it."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"lq: {what} failed, the run goes on without: {type(error).__name__}: {error}")


def inspect_unit(
    settings: QuantizationSettings,
    trainer: Any,
    staged: StagedUnit,
    int8: Int8Module,
    times: list[dict[str, float]] | None = None,
    *,
    fit_begun: float | None = None,
) -> Findings:
    """Look at a unit that is prepared and has its ranges, and at the INT8 network made of it.

    Args:
        settings: say what to look at, and for how long.
        trainer: the Trainer, for its data: a few validation samples, or of the calibration data where there are none.
        staged: the unit.
        int8: its INT8 network.
        times: of the layers, in the order of the report, see :func:`lq.analysis.timing.time_layers`.
        fit_begun: when, see :meth:`~lq.callback.settings.QuantizationSettings.analysis_seconds`.
    """
    unit, findings = staged.unit, Findings()
    step, batches = validation_samples(settings, trainer, staged)
    if not batches:
        rank_zero_info("lq: there are no data to analyze the layers with")
    with warns_on_failure("reading the graph"):
        graph = prepared_forward(unit).analyze()
        findings = Findings(weights=_weights(unit, graph), inputs=_inputs(unit, graph), graph=graph, graph_root=unit)
    with warns_on_failure("analyzing the layers"):
        if batches:
            bar = trainer.progress_bar_callback
            analysis = analyze(
                unit,
                batches,
                timing=False,  # that is done
                seconds=settings.analysis_seconds(fit_begun),
                forward=lambda batch: call_unit(staged, batch, step),
                progress=bar is not None and getattr(bar, "is_enabled", True),
            )
            if times is not None:
                analysis = analysis.with_times(times)
            findings = replace(findings, analysis=analysis)
    with warns_on_failure("collecting histograms"):
        findings = replace(findings, activations=_activations(staged, step, batches))
    return findings


def validation_samples(settings: QuantizationSettings, trainer: Any, staged: StagedUnit) -> tuple[Step, list[Any]]:
    """A few samples, and the step that takes them: of the validation data, which the ranges were not made of."""
    pl_module: Any = staged.pl_module
    step = judged_step(trainer, staged)
    samples: list[Any] = []
    with warns_on_failure("reading data for the analysis"):
        if step == "validation_step":
            batches = validation_batches(trainer, pl_module)
        elif settings.calibration_dataloader is not None or has_train_data(trainer):
            batches = calibration_batches(trainer, pl_module, settings.calibration_dataloader)
        else:
            return step, []
        left = SAMPLES
        for batch in batches:
            samples.append(first_samples(batch, left))
            left -= max(1, count_samples(samples[-1]))
            if left <= 0:
                break
    return step, samples


def _weights(unit: nn.Module, graph: GraphAnalysis) -> dict[str, QuantizedWeight]:
    known = quantizers(unit)
    weights = {}
    for chain in graph.placement.chains:
        weight = graph.values[chain.op.weight]
        weights[chain.weight_key] = QuantizedWeight(weight.detach(), known[chain.weight_key])
    return weights


def _inputs(unit: nn.Module, graph: GraphAnalysis) -> dict[str, str]:
    return {kernel.name: site(source_of(kernel.reads[0])) for kernel in graph.placement.kernels}


@torch.no_grad()
def _activations(staged: StagedUnit, step: Step, batches: list[Any]) -> dict[str, tuple[Quantizer, HistogramObserver]]:
    """The quantizers with a histogram each: the calibration's, or where training kept none one of ``batches``."""
    unit = staged.unit
    rounding = {name: q for name, q in activation_quantizers(unit).items() if q.rounds and q.calibrated}
    observed = {name: (q, q.observer) for name, q in rounding.items() if isinstance(q.observer, HistogramObserver)}
    missing = {name: (q, HistogramObserver()) for name, q in rounding.items() if name not in observed}
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
        observed |= missing
    return {name: observed[name] for name in rounding if name in observed}
