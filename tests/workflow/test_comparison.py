"""Which calibrator serves best: compared by the user's metric, or chosen by the error of the outputs."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.calibration import BATCHES, activations, calibrated, found_ranges, images, network
from helpers.quantized import TARGET
from lq.numerics.calibrators import CALIBRATORS, MSE
from lq.numerics.quantizer import QuantizerState

TEST = images(1, samples=16, seed=1)[0]
LABELS = torch.arange(16) % 10


def loss(model: nn.Module) -> float:
    return nn.functional.cross_entropy(model(TEST), LABELS).item()


def accuracy_and_loss(model: nn.Module) -> dict[str, float]:
    return {"accuracy": (model(TEST).argmax(1) == LABELS).float().mean().item(), "loss": loss(model)}


def test_figures_are_those_of_recalibrating_by_hand() -> None:
    model = calibrated()
    comparison = lq.compare_calibrators(model, accuracy_and_loss)
    assert list(comparison.scores) == ["minmax", "moving_average", "percentile:99.99", "mse", "entropy"]
    assert comparison.float_metrics == accuracy_and_loss(network())
    with torch.no_grad():
        by_hand = {name: accuracy_and_loss(lq.recalibrate(model, name)) for name in comparison.scores}
    assert comparison.scores == by_hand
    assert len({values["loss"] for values in by_hand.values()}) == 5


def test_the_model_is_afterwards_as_it_was() -> None:
    model = lq.recalibrate(calibrated(), "percentile:95", ["layer1"])
    model.layer2.train()  # type: ignore[union-attr]
    lq.quantizers(model)["input"].state = QuantizerState.OFF
    model(TEST)  # weights' ranges are there once it has run
    before, ranges = copy.deepcopy(model.state_dict()), found_ranges(model)
    flags = [module.training for module in model.modules()]
    lq.compare_calibrators(model, loss, ["minmax", "entropy"])

    def fail(model: nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lq.compare_calibrators(model, fail)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert found_ranges(model) == ranges
    assert [module.training for module in model.modules()] == flags


def test_the_evaluation_gets_the_model_itself_evaluating_without_gradients() -> None:
    model = calibrated().train()
    seen: list[tuple[nn.Module, bool, bool, bool]] = []

    def evaluate(given: nn.Module) -> float:
        simulates = any(q.state & QuantizerState.FAKE_QUANTIZE for q in lq.quantizers(given).values())
        seen.append((given, given.training, torch.is_grad_enabled(), simulates))
        return 1.0

    lq.compare_calibrators(model, evaluate, ["minmax", "mse"])
    assert seen == [(model, False, False, False), (model, False, False, True), (model, False, False, True)]


def test_the_best_by_a_metric() -> None:
    scores = {"a": {"accuracy": 0.5, "loss": 3.0}, "b": {"accuracy": 0.7, "loss": 2.0}, "c": {"accuracy": 0.6}}
    comparison = lq.CalibratorComparison({**scores, "c": {"accuracy": 0.6, "loss": 4.0}}, {})
    assert comparison.best() == "b"
    assert comparison.best("loss") == "c"
    assert comparison.best("loss", smallest=True) == "b"
    with pytest.raises(ValueError, match="metric='f1' was not measured; choose one of 'accuracy', 'loss'"):
        comparison.best("f1")


@pytest.mark.parametrize("smallest", [False, True])
def test_not_a_number_is_never_the_best(smallest: bool) -> None:
    scores = {"a": {"loss": math.nan}, "b": {"loss": -math.inf}, "c": {"loss": math.nan}}
    assert lq.CalibratorComparison(scores, {}).best(smallest=smallest) == "b"


def test_the_table_has_every_figure() -> None:
    comparison = lq.compare_calibrators(calibrated(), accuracy_and_loss, ["mse", "minmax", "percentile:99.9"])
    lines = str(comparison).splitlines()
    for name, values in {"float": comparison.float_metrics, **comparison.scores}.items():
        (line,) = [line for line in lines if line.split()[1:2] == [name]]
        assert all(f"{value:.4f}" in line for value in values.values())
    order = [line.split()[1] for line in lines if line.startswith("│")]
    assert order == ["float", "mse", "minmax", "percentile:99.9"]
    alone = lq.compare_calibrators(calibrated(), loss, ["mse"])
    assert alone.scores["mse"].keys() == alone.float_metrics.keys() == {"score"}


def test_one_kind_with_different_parameters() -> None:
    comparison = lq.compare_calibrators(calibrated(), loss, [MSE(), MSE(steps=4), "percentile:99", "percentile:90"])
    assert list(comparison.scores) == ["mse", "mse:4", "percentile:99", "percentile:90"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="calibrator='max' is unknown"):
        lq.compare_calibrators(calibrated(), loss, ["mse", "max"])
    with pytest.raises(ValueError, match="'input' holds no statistics"):
        lq.compare_calibrators(lq.prepare(network(), TEST), loss)
    with pytest.raises(ValueError, match="calibrators is empty; give at least one of 'minmax', 'moving_average'"):
        lq.compare_calibrators(calibrated(), loss, [])
    with pytest.raises(ValueError, match="not prepared"):
        lq.compare_calibrators(network(), loss)


def sqnr(model: nn.Module, batches: list[Tensor]) -> float:
    """In decibels, of a calibrated model's outputs."""
    reference = network()
    with torch.no_grad():
        pairs = [(reference(x).double().numpy(), model(x).double().numpy()) for x in batches]
    noise = sum(((y - q) ** 2).sum() for y, q in pairs)
    return float(10 * np.log10(sum((y**2).sum() for y, _ in pairs) / noise))


@pytest.mark.parametrize("number", [1, 2, 6])
@pytest.mark.parametrize("outlier", [0.0, 1000.0])
def test_auto_takes_what_is_nearest_to_float_on_batches_held_out(number: int, outlier: float) -> None:
    batches = images(number, samples=8)
    # In the first batch, which ranges are taken from: with one batch, the only one.
    batches[0][0, 0, 0, 0] += outlier
    model = lq.prepare(network(), TEST)
    watched: list[Tensor] = []
    judged: list[Tensor] = []

    def forward(batch: Tensor) -> Any:
        watching = lq.quantizers(model)["input"].state == QuantizerState.OBSERVE
        found = watched if watching else judged
        if not any(batch is x for x in found):
            found.append(batch)
        return model(batch)

    lq.calibrate(model, batches, calibrator="auto", forward=forward)
    assert all(any(x is batch for x in watched + judged) for batch in batches)
    assert len(watched) + len(judged) == max(number, 2)  # of one batch, nothing can be held out
    scores = {
        name: sqnr(lq.calibrate(lq.prepare(network(), TEST), watched, calibrator=name), judged) for name in CALIBRATORS
    }
    best = max(scores, key=lambda name: scores[name])
    chosen = {str(q.calibrator) for q in activations(model).values()}
    assert chosen == {str(CALIBRATORS[best]())}
    anew = lq.calibrate(lq.prepare(network(), TEST), watched, calibrator=best)
    assert found_ranges(model) == found_ranges(anew)
    assert torch.equal(model(TEST), anew(TEST))
    if outlier and number > 1:
        assert best != "minmax"
        assert scores[best] > scores["minmax"] + 3


class LogOfLinear(nn.Module):
    """Finite in float; in INT8 the smallest of its values are rounded to zero, or below."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        nn.init.eye_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.fc(x))


def test_auto_where_int8_outputs_are_not_finite() -> None:
    x = torch.rand(64, 4) + 1e-4
    x[0, 0] = 100.0
    model = lq.calibrate(lq.prepare(LogOfLinear(), x), [x, x], calibrator="auto")
    assert model(x).isinf().any()  # whichever was chosen
    with pytest.raises(lq.CalibrationError, match="outputs on held-out calibration batches have a NaN or an infinity"):
        lq.calibrate(model, [x, -x], calibrator="auto")
    assert torch.equal(model(x), torch.log(model.fc(x)))  # and the model is float


def test_auto_needs_histograms() -> None:
    model = lq.prepare(network(), TEST, observer="minmax")
    with pytest.raises(ValueError, match="needs a histogram, and a MinMaxObserver keeps none"):
        lq.calibrate(model, BATCHES, calibrator="auto")
    assert torch.equal(model(TEST), network()(TEST))


class Found(nn.Module):
    """Returns the positions above a threshold, as detectors do: another number of them in INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.body(x).relu())
        return scores, scores[scores > 0]


def test_outputs_whose_length_depends_on_data() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 16, 16) for _ in range(6)]
    network = Found().eval()
    original = copy.deepcopy(network)
    model = lq.calibrate(lq.prepare(network, batches[0], target=TARGET), batches, calibrator="auto")
    scores, found = model(batches[0])
    assert len(found) == (scores > 0).sum()
    assert (scores - original(batches[0])[0]).norm() < 0.03 * scores.norm()
