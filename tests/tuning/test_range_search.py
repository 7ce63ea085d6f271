"""``lq.search_ranges``: ranges by what the outputs gain, on data that they were not found with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lq
from helpers.broken_layers import BATCHES, TEST, explained, network
from lq.numerics.quantizer import WeightQuantizer

FEW_BITS = {"*": {"activation_bits": 4}}


def prepared(model: nn.Module, **kwargs: Any) -> nn.Module:
    example = lq.prepare(copy.deepcopy(model), BATCHES[0], overrides=FEW_BITS, **kwargs)
    return lq.calibrate(example, BATCHES, calibrator="minmax")


def error(model: nn.Module, int8: nn.Module) -> float:
    with torch.no_grad():
        return float((model(TEST) - int8(TEST)).square().sum() / model(TEST).square().sum())


def test_outputs_gain_on_other_data() -> None:
    model = network(2)
    plain = prepared(model)
    before = error(model, lq.convert(plain))
    weights = {name: value.clone() for name, value in plain.named_parameters()}
    searched = lq.search_ranges(plain, BATCHES, seconds=120, progress=False)
    assert searched is plain
    after = error(model, lq.convert(plain))
    assert after < 0.7 * before
    assert all(torch.equal(value, weights[name]) for name, value in plain.named_parameters())
    # Another search finds little more.
    again = error(model, lq.convert(lq.search_ranges(plain, BATCHES, seconds=120, progress=False)))
    assert again == pytest.approx(after, rel=0.1)


def test_a_range_that_is_far_too_wide_is_found_again() -> None:
    model = network(2)
    spoilt = lq.calibrate(lq.prepare(copy.deepcopy(model), BATCHES[0]), BATCHES)
    good = error(model, lq.convert(spoilt))
    quantizers = [q for q in lq.quantizers(spoilt).values() if q.rounds and not isinstance(q, WeightQuantizer)]
    low, high = quantizers[3].quantized_range()
    quantizers[3].set_range(low * 30, high * 30)
    bad = error(model, lq.convert(spoilt))
    lq.search_ranges(spoilt, BATCHES, seconds=120, progress=False)
    assert error(model, lq.convert(spoilt)) < min(1.5 * good, bad / 10)


def test_it_is_a_method_of_quantize() -> None:
    model = network(2)
    arguments: dict[str, Any] = {"max_drop": 0, "calibrator": "minmax", "max_float_layers": 0}
    arguments["overrides"] = {"*": {"activation_bits": 6}}  # with 4, nothing is explained any more
    arguments |= {"bias_correction": False, "equalization": False}
    without = lq.quantize(model, BATCHES, explained(model), **arguments).tuning
    tuning = lq.quantize(model, BATCHES, explained(model), range_search=None, **arguments).tuning
    assert [step.change for step in tuning.steps] == ["calibrator minmax", "range search"]
    assert tuning.step.methods == ("range_search",) and tuning.step.drop < 0.8 * without.step.drop


def test_mistakes() -> None:
    model = prepared(network(1))
    for arguments in ({"seconds": 0}, {"num_samples": 0}):
        ((name, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value} must be "):
            lq.search_ranges(model, BATCHES, **arguments)  # type: ignore[arg-type]
    with pytest.raises(lq.CalibrationError, match="batches has no samples"):
        lq.search_ranges(model, [])
    with pytest.raises(ValueError, match=r"call lq.calibrate\(model, batches\).* before lq.search_ranges"):
        lq.search_ranges(lq.prepare(network(1), BATCHES[0]), BATCHES)
    with pytest.raises(ValueError, match="range_seconds=0 must be above 0"):
        lq.quantize(network(1), BATCHES, lambda _: 1.0, max_drop=1, range_seconds=0)
