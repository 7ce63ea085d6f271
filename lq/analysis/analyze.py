"""Analyze: what rounding costs a calibrated model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lq.analysis.layers import Layer, elements, layers_of, watch_outputs, weight_figures
from lq.analysis.measures import energy, error_energy, float_leaves, sqnr_db
from lq.analysis.result import Analysis, LayerAnalysis
from lq.analysis.rounding import Rounding, Roundings
from lq.analysis.samples import default_num_samples, model_inputs
from lq.analysis.simulation import Plan, Simulator, Values
from lq.analysis.timing import layer_times
from lq.calibration.calibrate import batch_size
from lq.convert import check_calibrated
from lq.graph.analysis import GraphAnalysis
from lq.graph.placement import Chain
from lq.modes import evaluating
from lq.prepare import prepared_forward, quantizers, unprepared
from lq.progress import progress_bar
from lq.report import report_rows


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_samples: int | None = None,
    sensitivity: bool = True,
    timing: bool = True,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Analysis:
    """Find the layers that rounding harms, and what each costs in time.

    The float model and its INT8 simulation run on the same samples, and so does, for ``sensitivity``, the model with
    one layer alone in INT8, and with one layer alone in float: just what :func:`~lq.prepare` makes of it with
    ``overrides``, on the ranges it has now. ``model``, its ranges, their statistics, its mode and the random number
    generators are afterwards as before.

    Args:
        model: a prepared module that has ranges, from :func:`~lq.calibrate` or training.
        batches: inputs for the model, of the forms that :func:`~lq.calibrate` takes.
        num_samples: at most so many. By default 32, or fewer where the network is large: so many that the
            sensitivity takes about 10^12 multiplications (4 samples for a ResNet-50 at 224 pixels).
        sensitivity: whether to measure it: two partial runs of the model for each layer and sample.
        timing: whether to measure times, of the float model and of ``lq.convert(model)``, node by node on up to 8
            samples at once; where the model is on the CPU, in float32, and torch has INT8 kernels for this CPU.
        forward: runs the model on one batch; for batches of any other form. What the model returns is analysed, and
            not what is made of it.
        progress: whether to show a progress bar.

    Returns:
        Rows as those of :func:`~lq.report`; ``str()`` of it is a table, ``advice()`` the layers to leave in float.

    Raises:
        ValueError: where ``model`` is not prepared or has no ranges, ``batches`` has no samples, or the float model's
            outputs on them are not finite or no floating-point tensors.
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
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Loaders draw seeds, and what is random in a network draws numbers: none of that is to be felt afterwards.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        analysis = prepared.analyse()
        roundings = Roundings(model, analysis)
        layers = layers_of(report_rows(model, analysis, quantizers(model)), analysis, roundings)
        chunks = model_inputs(model, batches, num_samples or default_num_samples(analysis), forward)
        with unprepared(model), evaluating(model):
            study = _Study(model, analysis, roundings, layers, sensitivity)
            steps = len(chunks) * study.steps
            for _ in progress_bar(study.run(chunks), steps, enabled=progress, label="Analyzing"):
                pass
            figures = [_figures(model, layer, analysis, roundings) for layer in layers]
        times = layer_times(model, analysis, layers, chunks[0]) if timing else [{} for _ in layers]
    rows = []
    for layer, found, time in zip(layers, figures, times, strict=True):
        row = layer.row
        measured: dict[str, Any] = {**found, **study.figures(layer), **time}
        rows.append(LayerAnalysis(row.name, row.kind, row.precision, row.reason, **measured))
    samples = sum(batch_size(chunk) for chunk in chunks)
    return Analysis(type(model).__name__, prepared.target.name, samples, study.output_sqnr_db, tuple(rows))


def _figures(model: nn.Module, layer: Layer, analysis: GraphAnalysis, roundings: Roundings) -> dict[str, Any]:
    """What is known of a layer by itself."""
    weight = weight_figures(model, layer.kernel, roundings) if isinstance(layer.kernel, Chain) else {}
    output = {"output_sqnr_db": layer.output.sqnr_db, "cosine": layer.output.cosine}
    return {**elements(model, layer, analysis), **weight, **layer.input_figures(), **output}


class _Study:
    """The runs of all variants of a model, and the noise of each in the outputs."""

    def __init__(
        self,
        model: nn.Module,
        analysis: GraphAnalysis,
        roundings: Roundings,
        layers: list[Layer],
        sensitivity: bool,
    ) -> None:
        self.layers = layers
        self.simulator = simulator = Simulator(model, analysis.graph)
        self.placeholders = [node for node in analysis.graph.nodes if node.op == "placeholder"]
        self.float_plan = simulator.plan(Rounding())
        self.int8_plan = simulator.plan(roundings.whole, Rounding())
        names = dict.fromkeys(layer.row.name for layer in layers if layer.kernel is not None) if sensitivity else {}
        self.only = {name: simulator.plan(roundings.only(name), Rounding()) for name in names}
        variants = {name: roundings.all_but(name) for name in names}
        self.all_but = {name: simulator.plan(v, roundings.whole) for name, v in variants.items() if v is not None}
        # What the float and the INT8 run have to leave behind for those that start from them.
        starting = [self.int8_plan, *self.only.values()]
        self.float_kept = {node for plan in starting for node in (*plan.made, *plan.read)}
        self.float_kept |= {layer.end for layer in layers if layer.end is not None}
        self.float_kept |= {statistics.node for layer in layers for statistics in layer.inputs}
        self.int8_made = {node for plan in self.all_but.values() for node in plan.made}
        self.int8_read = {node for plan in self.all_but.values() for node in plan.read}
        reached = {node for node, _ in self.int8_plan.steps}
        self.same_in_both = (self.int8_made | self.int8_read) - reached  # in front of all rounding
        self.float_kept |= self.same_in_both
        self.signal = 0.0
        self.noise = 0.0
        self.only_noise = dict.fromkeys(self.only, 0.0)
        self.all_but_noise = dict.fromkeys(self.all_but, 0.0)

    @property
    def steps(self) -> int:
        """How many runs a chunk takes."""
        return 2 + len(self.only) + len(self.all_but)

    def run(self, chunks: list[dict[str, Any]]) -> Iterator[None]:
        """All runs on all chunks; yields after each."""
        for inputs in chunks:
            yield from self._run(inputs)

    def _run(self, inputs: dict[str, Any]) -> Iterator[None]:
        given = Values(made=dict(zip(self.placeholders, inputs.values(), strict=True)))
        outputs, floats = self.simulator.run(self.float_plan, given, keep_read=self.float_kept)
        floats.made = floats.read  # nothing is rounded
        reference = float_leaves(outputs)
        self._check(reference)
        self.signal += energy(reference)
        for layer in self.layers:
            for statistics in layer.inputs:
                statistics.add(floats.read[statistics.node])
        yield

        def noise(plan: Plan, base: Values, otherwise: float) -> float:
            found, _ = self.simulator.run(plan, base)
            return otherwise if found is None else error_energy(reference, float_leaves(found))

        watch = watch_outputs(self.layers, floats)
        found, int8 = self.simulator.run(self.int8_plan, floats, self.int8_made, self.int8_read, watch)
        for node in watch.keys() - {node for node, _ in self.int8_plan.steps}:
            watch[node](floats.read[node])
        same = {node: floats.read[node] for node in self.same_in_both}
        int8 = Values({**same, **int8.made}, {**same, **int8.read})
        whole = 0.0 if found is None else error_energy(reference, float_leaves(found))
        self.noise += whole
        yield
        for name, plan in self.only.items():
            self.only_noise[name] += noise(plan, floats, 0.0)
            yield
        floats = Values()  # the runs that follow start from the INT8 model's
        for name, plan in self.all_but.items():
            self.all_but_noise[name] += noise(plan, int8, whole)
            yield

    def _check(self, reference: list[torch.Tensor]) -> None:
        if not reference:
            raise ValueError(
                "the model returns no floating-point tensor, and lq.analyze compares its outputs: prepare the part of "
                "it that does"
            )
        if not all(bool(torch.isfinite(leaf).all()) for leaf in reference):
            raise ValueError(
                "the float model's outputs on batches have a NaN or an infinity in them; check the data, and the "
                "weights of the model"
            )

    @property
    def output_sqnr_db(self) -> float:
        return sqnr_db(self.signal, self.noise)

    def figures(self, layer: Layer) -> dict[str, float]:
        """The sensitivity of a layer, as far as it was measured."""
        found = {}
        for field, noises in (("only_sqnr_db", self.only_noise), ("all_but_sqnr_db", self.all_but_noise)):
            if layer.kernel is not None and layer.row.name in noises:
                found[field] = sqnr_db(self.signal, noises[layer.row.name])
        return found
