"""The figures against the same network written in numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lq
from helpers.analysis_references import (
    TENSORS,
    Reference,
    activation_grid,
    cosine,
    network,
    round_activation,
    round_weight,
    sqnr,
)
from helpers.quantized import calibrated, noise
from lq.schemes.targets import TARGETS


def calibrated_network(target: str = "x86") -> nn.Module:
    return calibrated(
        network(), noise(8, 8), example=noise(2, 8), target=target, observer="minmax", calibrator="minmax"
    )


def analyzed(model: nn.Module, x: Tensor, timing: bool = False, sensitivity: bool = True) -> lq.Analysis:
    return lq.analyze(model, [x], timing=timing, sensitivity=sensitivity, progress=False)


@pytest.mark.parametrize("target", ["x86", "x86_avx2"])
def test_each_figure_of_a_small_network(target: str) -> None:
    analysis = analyzed(calibrated_network(target), noise(8, 8))
    assert analysis.samples == 8
    reference = Reference(network(), TARGETS[target].weight.quant_max)
    x = noise(8, 8).double().numpy()
    outputs = reference.run(x, {}, set())
    floats = dict(reference.values)
    grids = {name: activation_grid(floats[name]) for name in TENSORS}
    rounded = reference.run(x, grids, {"0", "3", "7"})
    int8 = dict(reference.values)
    assert analysis.output_sqnr_db == pytest.approx(sqnr(outputs, rounded), abs=0.02)

    layers = {layer.name: layer for layer in analysis.layers}
    assert list(layers) == ["0", "3", "5", "7"]
    factor, _ = reference.batch_norm()
    for name, read, made in (("0", "x", "2"), ("3", "2", "4"), ("7", "5", "7")):
        layer = layers[name]
        weight = reference.parameter(f"{name}.weight")
        column = (factor if name == "0" else np.ones(len(weight))).reshape(-1, *[1] * (weight.ndim - 1))
        expected = sqnr(weight * column, round_weight(weight, reference.most) * column)
        assert layer.weight_sqnr_db == pytest.approx(expected, abs=0.01)
        assert layer.input_sqnr_db == pytest.approx(
            sqnr(floats[read], round_activation(floats[read], grids[read])), abs=0.01
        )
        assert layer.output_sqnr_db == pytest.approx(sqnr(floats[made], int8[made]), abs=0.02)
        assert layer.cosine == pytest.approx(cosine(floats[made], int8[made]), abs=1e-6)
        assert layer.observed == pytest.approx((floats[read].min(), floats[read].max()), rel=1e-5, abs=1e-6)
        scale, zero_point = grids[read]
        assert layer.range == pytest.approx((-zero_point * scale, (255 - zero_point) * scale), rel=1e-4)
        assert layer.clipped == 0
        assert (layer.parameters, layer.weights) == (weight.size + (0 if name == "0" else len(weight)), weight.size)

    # A pool behind a layer in INT8 reads INT8 too, so that layer "3" has a rounded tensor on either side.
    own = {"0": ["x"], "3": ["2", "4"], "7": ["5"]}
    for name, tensors in own.items():
        only = reference.run(x, {tensor: grids[tensor] for tensor in tensors}, {name})
        assert layers[name].only_sqnr_db == pytest.approx(sqnr(outputs, only), abs=0.02)
        others = {tensor: grids[tensor] for other, found in own.items() if other != name for tensor in found}
        all_but = reference.run(x, others, {"0", "3", "7"} - {name})
        assert layers[name].all_but_sqnr_db == pytest.approx(sqnr(outputs, all_but), abs=0.02)

    pool = layers["5"]
    assert (pool.precision, pool.parameters) == ("float", 0)
    assert "pooling averages in float" in pool.reason
    assert pool.output_sqnr_db == pytest.approx(sqnr(floats["5"], int8["5"]), abs=0.02)
    unknown = (
        pool.weight_sqnr_db,
        pool.input_sqnr_db,
        pool.clipped,
        pool.range,
        pool.only_sqnr_db,
        pool.all_but_sqnr_db,
    )
    assert unknown == (None,) * 6


CALIBRATED = calibrated_network()


@given(
    st.integers(1, 4),
    st.floats(-3, 3),
    st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0, 1e4]),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=25, deadline=None)
def test_whatever_the_data(samples: int, shift: float, width: float, seed: int) -> None:
    x = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * width + shift
    analysis = analyzed(CALIBRATED, x)
    assert analysis.samples == samples
    first = analysis.layers[0]
    assert first.observed == (float(x.min()), float(x.max()))
    assert first.range is not None
    half = (first.range[1] - first.range[0]) / 255 / 2
    outside = (x.double() < first.range[0] - half) | (x.double() > first.range[1] + half)
    assert first.clipped == pytest.approx(float(outside.double().mean()), abs=1.01 / x.numel())
    for layer in analysis.layers:
        sqnrs = (
            layer.weight_sqnr_db,
            layer.input_sqnr_db,
            layer.output_sqnr_db,
            layer.only_sqnr_db,
            layer.all_but_sqnr_db,
        )
        assert all(-200 <= value <= 200 for value in (*sqnrs, analysis.output_sqnr_db) if value is not None)
        assert layer.cosine is not None and -1 <= layer.cosine <= 1
    assert lq.Analysis.from_dict(json.loads(json.dumps(analysis.to_dict(), allow_nan=False))) == analysis


def test_figures_add_up_over_batches_and_stop_at_num_samples() -> None:
    x = noise(29, 8)
    model = calibrated_network()
    whole = analyzed(model, x)
    parts = lq.analyze(model, list(x.split([3, 9, 0, 17])), timing=False, progress=False)
    assert whole.samples == parts.samples == 29
    some = lq.analyze(model, list(x.split(5)), num_samples=13, timing=False, progress=False)
    assert some.samples == 13
    for a, b in ((whole, parts), (some, analyzed(model, x[:13]))):
        assert a.output_sqnr_db == pytest.approx(b.output_sqnr_db, abs=1e-3)
        for one, other in zip(a.layers, b.layers, strict=True):
            assert one.only_sqnr_db == (
                None if other.only_sqnr_db is None else pytest.approx(other.only_sqnr_db, abs=0.05)
            )
            assert one.output_sqnr_db == pytest.approx(other.output_sqnr_db, abs=0.05)
            assert one.observed == other.observed


def test_no_more_batches_are_taken_than_needed() -> None:
    taken = []

    def batches() -> object:
        for index in range(9):
            taken.append(index)
            yield noise(4, 8)

    analysis = lq.analyze(calibrated_network(), batches(), num_samples=6, timing=False, progress=False)  # type: ignore[arg-type]
    assert (analysis.samples, taken) == (6, [0, 1])


def test_what_is_not_asked_for_is_none() -> None:
    analysis = analyzed(calibrated_network(), noise(8, 8), sensitivity=False)
    rows = analysis.layers
    assert all(row.only_sqnr_db is row.all_but_sqnr_db is row.float_ms is row.int8_ms is None for row in rows)
    assert analysis.advice() == ()
    weakest = analysis.by_harm()[0]
    assert weakest.weight_sqnr_db is not None and weakest.input_sqnr_db is not None
    others = [value for row in rows for value in (row.weight_sqnr_db, row.input_sqnr_db) if value is not None]
    assert min(weakest.weight_sqnr_db, weakest.input_sqnr_db) == min(others)
    assert analysis.by_harm()[-1].name == "5"


def test_times_and_the_table() -> None:
    analysis = analyzed(calibrated_network(), noise(8, 8), timing=True)
    assert all(row.float_ms is not None and row.float_ms > 0 for row in analysis.layers)
    if lq.util.cpu.has_onednn_int8():
        assert all(row.int8_ms is not None and row.int8_ms > 0 for row in analysis.layers)
    lines = str(analysis).splitlines()
    assert f"{analysis.output_sqnr_db:.1f} dB on 8 samples" in lines[0]
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert [name for name in rows if name] == [layer.name for layer in analysis.by_harm()]
    assert lq.Analysis.from_dict(json.loads(json.dumps(analysis.to_dict()))) == analysis


def test_rounding_that_changes_nothing_is_at_the_limit() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).eval()
    nn.init.eye_(model[0].weight)
    x = torch.arange(256.0).reshape(64, 4)
    lq.calibrate(lq.prepare(model, x, target="x86", observer="minmax"), [x])
    analysis = lq.analyze(model, [x], num_samples=64, timing=False, progress=False)
    (layer,) = analysis.layers
    assert (layer.weight_sqnr_db, layer.input_sqnr_db, layer.output_sqnr_db) == (200.0,) * 3
    assert (layer.only_sqnr_db, layer.all_but_sqnr_db, analysis.output_sqnr_db) == (200.0,) * 3
    assert layer.cosine is not None and math.isclose(layer.cosine, 1.0)
    assert analysis.advice() == ()
