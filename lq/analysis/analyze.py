"""Analyze: what rounding costs a calibrated model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lq.analysis.layers import Layer, elements, layers_of, weight_figures
from lq.analysis.rounding import Roundings
from lq.analysis.samples import default_num_samples, model_inputs
from lq.analysis.study import Study
from lq.analysis.timing import layer_times
from lq.graph.analysis import GraphAnalysis
from lq.graph.placement import Chain
from lq.results.analysis import Analysis, LayerAnalysis
from lq.util.modes import evaluating
from lq.util.progress import progress_bar
from lq.workflow.calibrate import batch_size
from lq.workflow.convert import check_calibrated
from lq.workflow.prepare import prepared_forward, quantizers, unprepared
from lq.workflow.reporting import report_rows


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_samples: int | None = None,
    sensitivity: bool = True,
    timing: bool = True,
    seconds: float | None = None,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Analysis:
    """Find the layers that rounding harms, and what each costs in time.

    The float model and its INT8 simulation run on the same samples, and so does, for ``sensitivity``, the model with
    one layer alone in INT8, and with one layer alone in float: just what :func:`~lq.prepare` makes of it with
    ``overrides``, on the ranges it has now. ``model``, its ranges, their statistics, its mode and the random number
    generators are left as they were.

    Args:
        model: a prepared module that has ranges, from :func:`~lq.calibrate` or training.
        batches: inputs for the model, of the forms that :func:`~lq.calibrate` takes.
        num_samples: an upper limit. By default 32, or fewer where the network is large: as many as keep the
            sensitivity at about 10^12 multiplications (4 samples for a ResNet-50 at 224 pixels).
        sensitivity: whether to measure it: two partial runs of the model for each layer and sample.
        timing: whether to measure times, of the float model and of ``lq.convert(model)``, node by node on up to 8
            samples at once; where the model is on the CPU, in float32, and torch has INT8 kernels for this CPU.
        seconds: about how long the sensitivity may take, or None for no limit. The layers whose weights and
            inputs are the noisiest come first; what was left out is ``left_out`` of the result. The number of samples
            is reduced before a layer is left out.
        forward: runs the model on one batch; for batches of any other form. What the model returns is analyzed, not
            what ``forward`` makes of it.
        progress: whether to show a progress bar.

    Returns:
        Rows as those of :func:`~lq.report`; ``str()`` of it is a table, ``advice()`` the layers to leave in float.

    Raises:
        ValueError: where ``model`` is not prepared or has no ranges, ``batches`` has no samples, or the float model's
            outputs on them are not finite or not floating-point tensors.
        FoldError: see :func:`~lq.convert`, for ``timing``.

    Example:
        >>> import lq, torch, torchvision
        >>> images = torch.randn(8, 3, 32, 32)
        >>> model = lq.prepare(torchvision.models.resnet18(), images)
        >>> model = lq.calibrate(model, [images])
        >>> analysis = lq.analyze(model, [images], num_samples=2, timing=False, progress=False)
        >>> [layer.name for layer in analysis.layers] == [layer.name for layer in lq.report(model).layers]
        True
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1, or None for as many as the time allows")
    prepared = prepared_forward(model)
    check_calibrated(model, "lq.analyze(model, batches)")
    with _without_a_trace(model):
        analysis, roundings, layers = _layers(model)
        chunks = model_inputs(model, batches, num_samples or default_num_samples(analysis), forward)
        with unprepared(model), evaluating(model):
            study = Study(model, analysis, roundings, layers, sensitivity, _weight_noise(layers, analysis, roundings))
            steps = len(chunks) * study.steps
            for _ in progress_bar(study.run(chunks, seconds), steps, enabled=progress, label="Analyzing"):
                pass
            figures = [_figures(model, layer, analysis, roundings) for layer in layers]
        times = layer_times(model, analysis, layers, chunks[0]) if timing else [{} for _ in layers]
    rows = []
    for layer, numbers, time in zip(layers, figures, times, strict=True):
        row = layer.row
        measured: dict[str, Any] = {**numbers, **study.figures(layer), **time}
        rows.append(LayerAnalysis(row.name, row.kind, row.precision, row.reason, **measured))
    samples = sum(batch_size(chunk) for chunk in chunks[: study.chunks])
    return Analysis(
        type(model).__name__, prepared.target.name, samples, study.output_sqnr_db, tuple(rows), tuple(study.left_out)
    )


def noisiest_layers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_samples: int,
    seconds: float | None = None,
    forward: Callable[[Any], Any] | None = None,
) -> list[str]:
    """Names of the layers in INT8 by the noise that each alone makes in the model's outputs, the largest first.

    One partial run of the model for each layer and eight samples: half of what :func:`analyze` takes.

    Args:
        model: see :func:`analyze`, which also says what is left as it was, and what is raised.
        batches: likewise.
        num_samples: an upper limit.
        seconds: about how long it may take; the layers that there was no time for come last, those whose weights and
            inputs are the noisiest first.
        forward: see :func:`analyze`.
    """
    with _without_a_trace(model):
        analysis, roundings, layers = _layers(model)
        chunks = model_inputs(model, batches, num_samples, forward)
        with unprepared(model), evaluating(model):
            noise = _weight_noise(layers, analysis, roundings)
            study = Study(model, analysis, roundings, layers, True, noise, all_but=False)
            names = list(study.only)
            for _ in study.run(chunks, seconds):
                pass
    suspicion = study.suspicion()

    def order(name: str) -> tuple[bool, float]:
        left_out = name in study.left_out
        noise = study.only_noise[name]
        return left_out, suspicion[name] if left_out else -math.inf if math.isnan(noise) else -noise

    return sorted(names, key=order)


@contextmanager
def _without_a_trace(model: nn.Module) -> Iterator[None]:
    """Loaders draw seeds, and what is random in a network draws numbers: none of that may have an effect afterwards."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        yield


def _layers(model: nn.Module) -> tuple[GraphAnalysis, Roundings, list[Layer]]:
    analysis = prepared_forward(model).analyze()
    roundings = Roundings(model, analysis)
    return analysis, roundings, layers_of(report_rows(model, analysis, quantizers(model)), analysis, roundings)


def _weight_noise(layers: list[Layer], analysis: GraphAnalysis, roundings: Roundings) -> dict[str, float]:
    """SQNR of the weights by the layers' names, dB."""
    sqnr = {
        layer.row.name: weight_figures(layer.kernel, analysis, roundings)["weight_sqnr_db"]
        for layer in layers
        if isinstance(layer.kernel, Chain)
    }
    return {name: value for name, value in sqnr.items() if value is not None}


def _figures(model: nn.Module, layer: Layer, analysis: GraphAnalysis, roundings: Roundings) -> dict[str, Any]:
    """The figures of a layer by itself."""
    weight = weight_figures(layer.kernel, analysis, roundings) if isinstance(layer.kernel, Chain) else {}
    output = {"output_sqnr_db": layer.output.sqnr_db, "cosine": layer.output.cosine}
    return {**elements(model, layer, analysis), **weight, **layer.input_figures(), **output}
