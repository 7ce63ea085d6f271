"""An analysis that may take so long and no longer: fewer samples, then fewer layers, the suspicious ones first."""

from __future__ import annotations

import pytest
import torch

import lq
from helpers.networks import Residual
from helpers.quantized import noise
from lq import QuantizationCallback
from lq.analysis import study

X = noise(24)


@pytest.fixture
def model() -> torch.nn.Module:
    found = lq.prepare(Residual().eval(), X[:2], target="x86_avx2")
    return lq.calibrate(found, [X])


def test_with_time_enough_nothing_is_left_out(model: torch.nn.Module) -> None:
    settings = {"timing": False, "progress": False}
    assert lq.analyze(model, [X], **settings) == lq.analyze(model, [X], seconds=1e6, **settings)
    assert lq.analyze(model, [X], **settings).left_out == ()


def test_without_time_sensitivity_is_left_out_and_said(model: torch.nn.Module) -> None:
    whole = lq.analyze(model, [X], timing=False, progress=False)
    found = lq.analyze(model, [X], seconds=1e-9, timing=False, progress=False)
    in_int8 = {layer.name for layer in found.layers if layer.in_int8}
    assert set(found.left_out) == in_int8
    assert all(layer.only_sqnr_db is None and layer.all_but_sqnr_db is None for layer in found.layers)
    assert 0 < found.samples < whole.samples
    # What one run of each model shows is there.
    assert all(layer.input_sqnr_db is not None for layer in found.layers if layer.in_int8)
    assert f"the sensitivity of {len(in_int8)} of {len(in_int8)} layers" in found.left_out_text
    assert lq.Analysis.from_dict(found.to_dict()) == found


def test_the_noisiest_layers_come_first(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by one with each look at it: there is time for a few of the layers."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(study.time, "perf_counter", lambda: float(next(ticks)))
    found = lq.analyze(model, [X[:8]], seconds=7.0, timing=False, progress=False)
    measured = [layer for layer in found.layers if layer.only_sqnr_db is not None]
    others = [layer for layer in found.layers if layer.in_int8 and layer.only_sqnr_db is None]
    assert measured
    assert others

    def noise(layer: lq.LayerAnalysis) -> float:
        return min(v for v in (layer.weight_sqnr_db, layer.input_sqnr_db) if v is not None)

    assert max(map(noise, measured)) <= min(map(noise, others))


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), "all"])
def test_a_wrong_number_of_seconds_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="analyze=.* must be True, False, or how many seconds"):
        QuantizationCallback(analyze=wrong)  # type: ignore[arg-type]


def test_the_budget_of_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert QuantizationCallback(analyze=120).analysis_seconds == 120
    callback = QuantizationCallback()
    assert callback.analysis_seconds == 30
    callback._begun = 0.0
    monkeypatch.setattr("lq.callback.callback.time.monotonic", lambda: 1000.0)
    assert callback.analysis_seconds == 100
