"""Each calibrator against its definition, on the values themselves and without a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from helpers.calibrator_references import (
    AFFINE,
    SEVEN_BITS,
    SPECS,
    SYMMETRIC,
    distributions,
    kl_divergences,
    least_squared_error,
    observed,
    squared_error,
)
from lq.numerics.calibrators import (
    CALIBRATORS,
    MSE,
    Calibrator,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
    Range,
    divergence,
    get_calibrator,
)
from lq.numerics.observers import MinMaxObserver, MovingAverageObserver, Observer
from lq.numerics.quantizer import Quantizer
from lq.numerics.spec import QuantSpec

VALUES = distributions()


def as_floats(found: Range) -> tuple[float, float]:
    low, high = found
    assert low.shape == high.shape == ()
    return low.item(), high.item()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_is_the_minimum_and_the_maximum(name: str, spec: QuantSpec) -> None:
    x = VALUES[name]
    for observer in (observed(x[:50], x[50:]), MinMaxObserver()):
        observer(torch.from_numpy(x))
        assert as_floats(MinMax()(observer, spec)) == (x.min(), x.max())


@pytest.mark.parametrize("percentile", [100.0, 99.99, 99.9, 99.0, 90.0, 60.0])
@pytest.mark.parametrize("name", VALUES)
def test_percentile_is_within_a_bin_of_the_quantile(name: str, percentile: float) -> None:
    x, share = VALUES[name], percentile / 100
    observer = observed(*np.array_split(x, 7))
    atol = 2.0 ** int(observer.exponent)
    low, high = as_floats(Percentile(percentile)(observer, AFFINE))
    np.testing.assert_allclose([low, high], np.quantile(x, [1 - share, share]), atol=atol, rtol=1e-6)
    for spec in (SYMMETRIC, SEVEN_BITS):
        low, high = as_floats(Percentile(percentile)(observer, spec))
        assert low == -high
        np.testing.assert_allclose(high, np.quantile(np.abs(x), share), atol=atol, rtol=1e-6)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_mse_is_as_good_as_the_best_of_all_ranges(name: str, spec: QuantSpec) -> None:
    x = VALUES[name]
    # Of a symmetric grid, values far from zero use few levels, and where exactly these lie takes more steps to tell.
    steps = 1024 if spec.symmetric and name in ("far above zero", "two modes") else 128
    low, high = as_floats(MSE(steps)(observed(*np.array_split(x, 3)), spec))
    error = squared_error(x, np.array([low]), np.array([high]), spec)[0]
    assert error <= 1.02 * least_squared_error(x, spec)


@pytest.mark.parametrize("outlier", [10.0, 60.0, 200.0])
def test_mse_weighs_one_outlier_against_many_values(outlier: float) -> None:
    # 4000 values, each of them seen 250 times: a million, beside which the outlier is worth clipping.
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    observer = observed(*[x] * 250, np.float32([outlier]))
    low, high = as_floats(MSE()(observer, SYMMETRIC))
    candidates = np.concatenate([np.linspace(2, 8, 200), np.linspace(8, outlier, 400), [high]])

    def error(of: np.ndarray) -> np.ndarray:
        once = squared_error(np.float32([outlier]), -of, of, SYMMETRIC)
        return 250 * squared_error(x, -of, of, SYMMETRIC) + once

    errors = error(candidates)
    assert low == -high
    assert errors[-1] <= 1.02 * errors.min()
    assert 2 * errors[-1] < error(np.array([outlier]))[0]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=str)
def test_entropy_is_the_least_divergence_that_loops_find(name: str, spec: QuantSpec) -> None:
    x, steps = VALUES[name], 16
    observer = observed(x)
    expected = np.array(kl_divergences(x, spec, steps))
    # The thresholds of the docstring, once more.
    reach = max(-x.min(), x.max(), 0)
    thresholds = torch.linspace(1 / steps, 1, steps) * float(reach)
    low, high = torch.tensor(float(min(x.min(), 0))), torch.tensor(float(max(x.max(), 0)))
    lows, highs = torch.maximum(-thresholds, low), torch.minimum(thresholds, high)
    got = divergence(Histogram.of(observer), lows, highs, spec).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    chosen = as_floats(Entropy(steps)(observer, spec))
    (index,) = [i for i in range(steps) if np.allclose(chosen, (lows[i], highs[i]), rtol=1e-5, atol=0)]
    assert expected[index] <= expected.min() + 1e-6


@pytest.mark.parametrize("values", [[5.0], [9.0, 9.1, 9.2, 9.9, 10.0], [-3.0] * 10, [-7.0, -6.5, -6.0]])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_entropy_keeps_values_far_from_zero(values: list[float], spec: QuantSpec) -> None:
    # A range with none of them in it loses the distribution altogether, however small a divergence it gives.
    observer = observed(np.float32(values))
    quantizer = Quantizer(spec, observer, Entropy())
    quantizer.update_qparams()
    low, high = as_floats(quantizer.quantized_range())
    # What rounds to the grid's ends is in it; and a value is known to within its bin.
    beyond = quantizer.scale.item() / 2 + 2.0 ** int(observer.exponent)
    assert any(low - beyond <= value <= high + beyond for value in values)


@pytest.mark.parametrize("constant", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_moving_average_is_a_loop_over_batches(constant: float, spec: QuantSpec) -> None:
    parts = [torch.randn(30) * scale for scale in (1.0, 5.0, 0.1, 2.0, 3.0)]
    low, high = parts[0].min().item(), parts[0].max().item()
    for number, part in enumerate(parts[1:], start=2):
        share = max(constant, 1 / number)
        low += share * (part.min().item() - low)
        high += share * (part.max().item() - high)
    found = as_floats(MovingAverage(constant)(observed(*parts), spec))
    np.testing.assert_allclose(found, [low, high], rtol=1e-6)
    # An observer that averages has its own constant.
    averaging = MovingAverageObserver(constant)
    for part in parts:
        averaging(part)
    np.testing.assert_allclose(as_floats(MovingAverage(0.123)(averaging, spec)), [low, high], rtol=1e-5)


@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageObserver])
@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_calibrators_that_need_a_histogram_say_so(observer: type[Observer], name: str) -> None:
    watching = observer()
    watching(torch.randn(10))
    message = rf"calibrator='{name}.*' needs a histogram, and a {observer.__name__} keeps none.*observer='histogram'"
    with pytest.raises(ValueError, match=message):
        get_calibrator(name)(watching, AFFINE)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_asking_for_a_range_does_not_change_the_statistics(calibrator: str) -> None:
    observer = observed(torch.randn(100), torch.randn(100))
    before = {key: value.clone() for key, value in observer.state_dict().items()}
    for spec in SPECS:
        get_calibrator(calibrator)(observer, spec)
    after = observer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


NAMED = [
    *(kind() for kind in CALIBRATORS.values()),
    *(Percentile(p) for p in (50.1, 99.0, 99.9, 99.99999, 100.0)),
    *(MSE(16), Entropy(2048), MovingAverage(0.1), MovingAverage(1.0), MovingAverage(1e-7)),
]


@pytest.mark.parametrize("calibrator", NAMED, ids=repr)
def test_what_a_calibrator_is_called_is_what_one_types_for_it(calibrator: Calibrator) -> None:
    assert get_calibrator(str(calibrator)) == calibrator
    assert get_calibrator(calibrator) is calibrator


def test_names_with_and_without_parameters() -> None:
    assert {name: get_calibrator(name) for name in CALIBRATORS} == {
        "minmax": MinMax(),
        "moving_average": MovingAverage(),
        "percentile": Percentile(99.99),
        "mse": MSE(),
        "entropy": Entropy(),
    }
    assert get_calibrator("percentile:99.9") == Percentile(99.9)
    assert get_calibrator("mse:256") == MSE(steps=256)
    assert str(Percentile(99.9)) == "percentile:99.9"
    assert str(MSE()) == "mse"


@dataclass(frozen=True)
class HalfOfIt(Calibrator):
    name: ClassVar[str] = "half"

    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        low, high = observer.range()
        return low / 2, high / 2


def test_a_calibrator_of_ones_own() -> None:
    half = get_calibrator(HalfOfIt())
    assert str(half) == "half"
    assert as_floats(half(observed(np.float32([-2, 4])), AFFINE)) == (-1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("percentil", r"calibrator='percentil' is unknown \(did you mean 'percentile'\?\); choose one of 'minmax'"),
        ("median", r"calibrator='median' is unknown; choose one of 'minmax', 'moving_average', 'percentile', 'mse'"),
        ("", r"calibrator='' is unknown; choose one of"),
        ("minmax:3", r"calibrator='minmax:3' is unknown; choose one of"),
        ("percentile:most", r"'most' is not a valid number; write for example 'percentile:99.9'"),
        ("mse:2.5", r"'2.5' is not a valid number"),
        ("percentile:50", r"percentile=50.0 must be in \(50, 100\]"),
        ("percentile:nan", r"percentile=nan must be in \(50, 100\]"),
        ("mse:1", r"steps=1 must be at least 2"),
        ("entropy:0", r"steps=0 must be at least 2"),
        ("moving_average:0", r"averaging_constant=0.0 must be in \(0, 1\]"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_calibrator(text)


def test_thresholds_of_entropy_leave_out_the_zeros_of_a_relu() -> None:
    # With the zeros among them, sparse activations would look as if nothing but the zero had to be kept.
    positive = np.abs(np.random.default_rng(0).normal(size=2000)).astype(np.float32)
    sparse = np.concatenate([positive, np.zeros(100_000, np.float32)])
    assert as_floats(Entropy()(observed(sparse), AFFINE)) == as_floats(Entropy()(observed(positive), AFFINE))
