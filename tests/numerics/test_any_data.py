"""Whatever the data, a calibrator gives a range that can be used."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.calibrator_references import AFFINE, SEVEN_BITS, SPECS, observed, squared_error
from lq.numerics.calibrators import CALIBRATORS, MSE, Percentile
from lq.numerics.observers import HistogramObserver
from lq.numerics.quantizer import Quantizer
from lq.numerics.spec import QuantSpec

LARGEST = float(np.finfo(np.float32).max)


def check_all(observer: HistogramObserver) -> None:
    """Ranges are finite, ascending and inside the data's own, widened to have zero in it; a quantizer takes them."""
    smallest, largest = (v.item() for v in observer.range())
    low_end, high_end = min(smallest, 0.0), max(largest, 0.0)
    for spec in SPECS:
        reach = max(-low_end, high_end)
        for name, calibrator in CALIBRATORS.items():
            low, high = (v.item() for v in calibrator()(observer, spec))
            assert math.isfinite(low) and math.isfinite(high), (name, spec)
            assert low <= high, (name, spec)
            # A symmetric range may reach as far where nothing was seen as where something was.
            assert low >= (-reach if spec.symmetric else low_end), (name, spec)
            assert high <= (reach if spec.symmetric else high_end), (name, spec)
            quantizer = Quantizer(spec, HistogramObserver(), calibrator())
            quantizer.set_range(torch.tensor(low), torch.tensor(high))
            assert math.isfinite(quantizer.scale) and quantizer.scale > 0
            assert spec.quant_min <= quantizer.zero_point <= spec.quant_max


CASES: dict[str, Tensor] = {
    "around zero": torch.linspace(-1, 2, 1000),
    "constant": torch.full((100,), 5.0),
    "negative constant": torch.full((100,), -0.3),
    "one value": torch.tensor([7.0]),
    "one zero": torch.zeros(1),
    "zeros": torch.zeros(1000),
    "negative zero": torch.tensor([-0.0, 0.0]),
    "a huge outlier": torch.cat([torch.linspace(-1, 2, 1000), torch.tensor([1e30])]),
    "a huge outlier below": torch.cat([torch.linspace(-1, 2, 1000), torch.tensor([-1e30])]),
    "all huge": torch.linspace(-1, 2, 1000) * 1e30,
    "the largest floats": torch.tensor([-LARGEST, LARGEST, 1.0]),
    "the largest float": torch.tensor([LARGEST]),
    "tiny": torch.linspace(-1, 2, 1000) * 1e-20,
    "subnormal": torch.tensor([1e-45, -1e-45]),
    "all negative": -torch.linspace(9, 10, 1000),
    "all positive": torch.linspace(1000, 1001, 1000),
    "two values": torch.tensor([-1.0, 1.0]).repeat(50),
    "float16": torch.linspace(-6e4, 6e4, 500).half(),
    "bfloat16": (torch.linspace(-1, 1, 500) * 3e38).bfloat16(),
    "float64": torch.linspace(-1e3, 1e-3, 500, dtype=torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_known_cases(name: str) -> None:
    check_all(observed(CASES[name]))
    check_all(observed(torch.zeros(0), CASES[name], torch.zeros(0, 3), CASES[name][:1]))


floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, -0.0, 1e30, -1e30, 1e-20, -1e-20, 5.0]),
)
batch = st.builds(lambda xs: torch.tensor(xs, dtype=torch.float32), st.lists(floats, max_size=20))
batch |= batch.map(lambda x: x.clamp(-6e4, 6e4).half())


@settings(deadline=None, max_examples=60)
@given(st.lists(batch, min_size=1, max_size=4).filter(lambda parts: any(len(part) for part in parts)))
def test_any_floats(parts: list[Tensor]) -> None:
    check_all(observed(*parts))


def within_reach(**limits: Any) -> st.SearchStrategy[np.ndarray]:
    """Values of one order of magnitude, whichever that is."""
    return st.builds(
        lambda xs, power: np.float32(xs) * np.float32(10.0**power),
        st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30),
        st.integers(**limits),
    )


@settings(deadline=None, max_examples=100)
@given(within_reach(min_value=-30, max_value=37), st.sampled_from(SPECS))
def test_mse_is_never_worse_than_clipping_nothing(x: np.ndarray, spec: QuantSpec) -> None:
    observer = observed(x)
    low, high = (np.float64([v.item()]) for v in MSE()(observer, spec))
    all_of_it = np.float64([x.min()]), np.float64([x.max()])
    error, unclipped = (np.sqrt(squared_error(x, *r, spec)[0] / x.size) for r in ((low, high), all_of_it))
    # It knows each value to within half a bin, and the distance to the nearest grid point as well.
    assert error <= unclipped * 1.001 + 2.0 ** int(observer.exponent)


@settings(deadline=None, max_examples=100)
@given(within_reach(min_value=-9, max_value=30), st.floats(50, 100, exclude_min=True), st.sampled_from(SPECS))
def test_percentile_is_within_a_bin_of_the_quantile(x: np.ndarray, percentile: float, spec: QuantSpec) -> None:
    observer = observed(x)
    low, high = (v.item() for v in Percentile(percentile)(observer, spec))
    share = percentile / 100
    if spec.symmetric:
        expected = np.array([-1, 1]) * np.quantile(np.abs(x.astype(np.float64)), share)
    else:
        expected = np.quantile(x.astype(np.float64), [1 - share, share])
    np.testing.assert_allclose([low, high], expected, atol=2.0 ** int(observer.exponent) * 1.0001, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e15, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("spec", [AFFINE, SEVEN_BITS], ids=str)
def test_ranges_scale_with_the_data(scale: float, spec: QuantSpec) -> None:
    # By a power of two, with which all arithmetic is exact.
    factor = 2.0 ** round(math.log2(scale))
    x = np.random.default_rng(0).normal(size=500).astype(np.float32)
    for name, calibrator in CALIBRATORS.items():
        expected = [v.item() * factor for v in calibrator()(observed(x), spec)]
        got = [v.item() for v in calibrator()(observed(x * np.float32(factor)), spec)]
        assert got == expected, name
