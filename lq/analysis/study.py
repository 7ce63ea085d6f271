"""The runs of a model that an analysis takes: in float, in INT8, and each layer's two variants."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lq.analysis.layers import Layer, watch_outputs
from lq.analysis.measures import energy, error_energy, float_leaves, sqnr_db
from lq.analysis.rounding import Rounding, Roundings
from lq.analysis.simulation import Plan, Simulator, Values
from lq.graph.analysis import GraphAnalysis
from lq.results.analysis import SQNR_LIMIT_DB


class Study:
    """The runs of all variants of a model, and the noise of each in the outputs.

    A variant with one layer alone in INT8 is the float model up to there, and one with all others in INT8 is the INT8
    model: each runs what comes after the layer, on values that those two runs kept.

    Args:
        model: without quantizers, in evaluation mode.
        analysis: its graph.
        roundings: what is rounded in each variant.
        layers: the rows; they collect what the runs show.
        sensitivity: whether to run the layers' variants.
        weight_sqnr: of the layers' weights by name, dB: where time is short, the noisiest layers come first.
        all_but: whether to run, of each layer's two variants, also that with all others in INT8.

    Attributes:
        chunks: how many were run.
        left_out: names of layers whose variants there was no time for.
    """

    def __init__(
        self,
        model: nn.Module,
        analysis: GraphAnalysis,
        roundings: Roundings,
        layers: list[Layer],
        sensitivity: bool,
        weight_sqnr: Mapping[str, float],
        all_but: bool = True,
    ) -> None:
        self.layers = layers
        self.weight_sqnr = weight_sqnr
        self.chunks = 0
        self.left_out: list[str] = []
        self.simulator = simulator = Simulator(model, analysis.captured)
        self.placeholders = [node for node in analysis.graph.nodes if node.op == "placeholder"]
        self.float_plan = simulator.plan(Rounding())
        self.int8_plan = simulator.plan(roundings.whole, Rounding())
        names = dict.fromkeys(layer.row.name for layer in layers if layer.kernel is not None) if sensitivity else {}
        self.only = {name: simulator.plan(roundings.only(name), Rounding()) for name in names}
        variants = {name: roundings.all_but(name) for name in names} if all_but else {}
        self.all_but = {name: simulator.plan(v, roundings.whole) for name, v in variants.items() if v is not None}
        # What the float and the INT8 run have to keep for the runs that start from them.
        starting = [self.int8_plan, *self.only.values()]
        self.float_kept = {node for plan in starting for node in (*plan.made, *plan.read)}
        self.float_kept |= {layer.end for layer in layers if layer.end is not None}
        self.float_kept |= {statistics.node for layer in layers for statistics in layer.inputs}
        self.int8_made = {node for plan in self.all_but.values() for node in plan.made}
        self.int8_read = {node for plan in self.all_but.values() for node in plan.read}
        reached = {node for node, _ in self.int8_plan.steps}
        self.same_in_both = (self.int8_made | self.int8_read) - reached  # before all rounding
        self.float_kept |= self.same_in_both
        self.signal = 0.0
        self.noise = 0.0
        self.only_noise = dict.fromkeys(self.only, 0.0)
        self.all_but_noise = dict.fromkeys(self.all_but, 0.0)

    @property
    def steps(self) -> int:
        """How many runs a chunk takes."""
        return 2 + len(self.only) + len(self.all_but)

    def run(self, chunks: list[dict[str, Any]], seconds: float | None = None) -> Iterator[None]:
        """All runs on all chunks; yields after each.

        Args:
            chunks: inputs by name.
            seconds: about how long it may take: chunks are dropped first, then layers of the first chunk.
        """
        begun = time.perf_counter()
        for inputs in chunks:
            spent = time.perf_counter() - begun
            if seconds is not None and self.chunks and spent / self.chunks * (self.chunks + 1) > seconds:
                return
            yield from self._run(inputs, None if seconds is None or self.chunks else begun + seconds)
            self.chunks += 1

    def suspicion(self) -> dict[str, float]:
        """The SQNR of the worse of weight and input, dB, by layer: the lower, the sooner it is looked at."""
        suspicion: dict[str, float] = {}
        for layer in self.layers:
            inputs = [s.rounded.sqnr_db for s in layer.inputs if s.rounded.sqnr_db is not None]
            name = layer.row.name
            weight = self.weight_sqnr.get(name, SQNR_LIMIT_DB)
            suspicion[name] = min([*inputs, weight, suspicion.get(name, SQNR_LIMIT_DB)])
        return suspicion

    def _in_time(self, plans: dict[str, Plan], order: Mapping[str, float], until: float | None) -> Iterator[str]:
        """Names of the variants to run, lowest ``order`` first, as many as there is time for."""
        for name in sorted(plans, key=lambda name: order.get(name, SQNR_LIMIT_DB)):
            if until is not None and time.perf_counter() > until:
                del plans[name]
                if name not in self.left_out:
                    self.left_out.append(name)
            else:
                yield name

    def _run(self, inputs: dict[str, Any], until: float | None) -> Iterator[None]:
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
            noisy, _ = self.simulator.run(plan, base)
            return otherwise if noisy is None else error_energy(reference, float_leaves(noisy))

        watch = watch_outputs(self.layers, floats)
        int8_outputs, int8 = self.simulator.run(self.int8_plan, floats, self.int8_made, self.int8_read, watch)
        for node in watch.keys() - {node for node, _ in self.int8_plan.steps}:
            watch[node](floats.read[node])
        same = {node: floats.read[node] for node in self.same_in_both}
        int8 = Values({**same, **int8.made}, {**same, **int8.read})
        whole = 0.0 if int8_outputs is None else error_energy(reference, float_leaves(int8_outputs))
        self.noise += whole
        yield
        now = time.perf_counter()
        share = None if until is None else now + (until - now) / (2 if self.all_but else 1)
        for name in self._in_time(self.only, self.suspicion(), share):
            self.only_noise[name] += noise(self.only[name], floats, 0.0)
            yield
        floats = Values()  # the runs that follow start from the INT8 model's
        # What makes the most noise alone is what may gain the most in float.
        order = {name: -self.only_noise[name] for name in self.only}
        for name in self._in_time(self.all_but, order, until):
            self.all_but_noise[name] += noise(self.all_but[name], int8, whole)
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
        figures = {}
        name = layer.row.name
        for field, plans, noises in (
            ("only_sqnr_db", self.only, self.only_noise),
            ("all_but_sqnr_db", self.all_but, self.all_but_noise),
        ):
            if layer.kernel is not None and name in plans:
                figures[field] = sqnr_db(self.signal, noises[name])
        return figures
