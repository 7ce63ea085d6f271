"""Other ranges from the statistics at hand are those that calibrating anew would give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.calibration import BATCHES, activations, found_ranges, network, prepared
from lq.numerics.calibrators import MSE, Calibrator, Percentile

CHOICES: list[str | Calibrator] = [
    "minmax",
    "moving_average",
    "percentile",
    "percentile:99",
    "mse",
    "entropy",
    Percentile(90.0),
    MSE(steps=16),
]


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    return lq.calibrate(prepared(), BATCHES)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("calibrator", CHOICES, ids=str)
def test_it_is_calibrating_anew(calibrated: nn.Module, calibrator: str | Calibrator) -> None:
    assert lq.recalibrate(calibrated, calibrator) is calibrated
    anew = lq.calibrate(prepared(), BATCHES, calibrator=calibrator)
    assert found_ranges(calibrated) == found_ranges(anew)
    assert torch.equal(calibrated(BATCHES[0]), anew(BATCHES[0]))


def test_calibrators_give_different_ranges(calibrated: nn.Module) -> None:
    scales = set()
    for calibrator in ("minmax", "moving_average", "percentile:99", "mse", "entropy"):
        lq.recalibrate(calibrated, calibrator)
        scales.add(tuple(q.scale.item() for q in activations(calibrated).values()))
    assert len(scales) == 5


def test_the_default_is_mse_with_histograms_and_minmax_without() -> None:
    assert {q.calibrator for q in activations(lq.calibrate(prepared(), BATCHES)).values()} == {MSE()}
    model = lq.calibrate(prepared("minmax"), BATCHES)
    assert {str(q.calibrator) for q in activations(model).values()} == {"minmax"}
    # Not those of an observer that has only seen extremes, and not those of a histogram either: the same.
    histogram = lq.recalibrate(lq.calibrate(prepared(), BATCHES), "minmax")
    assert found_ranges(model) == found_ranges(histogram)


def test_nothing_but_the_ranges_changes(calibrated: nn.Module) -> None:
    lq.recalibrate(calibrated, "mse")
    before = state_of(calibrated)
    lq.recalibrate(calibrated, "minmax")
    changed = {key for key, value in calibrated.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in changed} <= {"scale", "zero_point", "_extra_state"}
    assert not any("weight.quantizer" in key or key.endswith("observer._extra_state") for key in changed)
    lq.recalibrate(calibrated, "mse")
    assert unchanged(calibrated, before)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["layer1"], {"layer1.relu", "layer1.bn2", "layer1.relu_1"}),
        ("layer1", {"layer1.relu", "layer1.bn2", "layer1.relu_1"}),
        (["layer1.relu_1"], {"layer1.relu_1"}),
        (["input", "layer2", "stem"], {"input", "stem.1", "layer2.relu", "layer2.bn2", "layer2.relu_1"}),
        (["layer2", "layer2.relu"], {"layer2.relu", "layer2.bn2", "layer2.relu_1"}),
        ((name for name in ("pool", "pool")), {"pool"}),
        ([], set()),
    ],
)
def test_named_layers_and_modules_alone(layers: str | list[str] | Iterator[str], expected: set[str]) -> None:
    model = lq.calibrate(prepared(), BATCHES, calibrator="minmax")
    minmax = found_ranges(model)
    lq.recalibrate(model, "percentile:95", layers)
    percentile = found_ranges(lq.calibrate(prepared(), BATCHES, calibrator="percentile:95"))
    assert found_ranges(model) == {n: (percentile if n in expected else minmax)[n] for n in minmax}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layer3"], r"no activation's quantizer is called 'layer3' .*similar are .*'layer1\.relu'"),
        (["layer1.rellu"], r"called 'layer1\.rellu'.*similar are 'layer1\.relu'"),
        # A prefix of a name is no module, and a weight's range is its own.
        (["layer"], r"called 'layer'.*similar are"),
        (["layer1.conv1.weight"], r"called 'layer1\.conv1\.weight'.*similar are"),
        (["layer1", "zzz"], r"called 'zzz'.*similar are 'input', 'stem\.1'"),
        ("", r"called ''.*similar are"),
    ],
)
def test_names_that_match_nothing(calibrated: nn.Module, layers: list[str], message: str) -> None:
    before = state_of(calibrated)
    with pytest.raises(ValueError, match=message):
        lq.recalibrate(calibrated, "percentile:95", layers)
    assert unchanged(calibrated, before)


@pytest.mark.parametrize("calibrator", ["percentile", "mse", "entropy", "moving_average"])
def test_an_observer_without_a_histogram(calibrator: str) -> None:
    model = lq.calibrate(prepared("minmax"), BATCHES)
    before = state_of(model)
    with pytest.raises(ValueError, match="needs a histogram, and a MinMaxObserver keeps none; prepare the model with"):
        lq.recalibrate(model, calibrator)
    assert unchanged(model, before)
    # The same when it is asked for with the data, of which none is read.
    batches = iter(BATCHES)
    with pytest.raises(ValueError, match="needs a histogram"):
        lq.calibrate(model, batches, calibrator=calibrator)
    assert unchanged(model, before)
    assert next(batches) is BATCHES[0]


def test_without_statistics() -> None:
    with pytest.raises(ValueError, match="'input' holds no statistics; call lq.calibrate"):
        lq.recalibrate(prepared(), "minmax")
    with pytest.raises(ValueError, match="not prepared; call lq.prepare"):
        lq.recalibrate(network(), "minmax")
    with pytest.raises(ValueError, match="calibrator='auto' is unknown; choose one of"):
        lq.recalibrate(lq.calibrate(prepared(), BATCHES), "auto")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_of_a_calibration_that_failed_are_not_used(bad: float) -> None:
    model = lq.calibrate(prepared(), BATCHES)
    with pytest.raises(lq.CalibrationError, match="a NaN or an infinity at 'input'"):
        lq.calibrate(model, [BATCHES[0], torch.full_like(BATCHES[0], bad)])
    with pytest.raises(ValueError, match="'input' holds no statistics"):
        lq.recalibrate(model, "minmax")
    with pytest.raises(ValueError, match="'input' holds no statistics"):
        lq.compare_calibrators(model, lambda m: 0.0)


def test_calibrating_again_starts_from_nothing() -> None:
    model = lq.calibrate(prepared(), [batch * 100 for batch in BATCHES])
    lq.calibrate(model, BATCHES)
    assert found_ranges(model) == found_ranges(lq.calibrate(prepared(), BATCHES))
