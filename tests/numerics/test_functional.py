"""The numerics, against numpy written from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lq.numerics.functional import choose_qparams, dequantize, fake_quantize, quantize
from lq.numerics.observers import MinMaxObserver, MovingAverageObserver
from lq.numerics.quantizer import Quantizer, QuantizerState
from lq.numerics.spec import QuantSpec

AFFINE = QuantSpec(torch.uint8, 0, 255, symmetric=False)
SYMMETRIC = QuantSpec(torch.int8, -127, 127, symmetric=True)
PER_CHANNEL = QuantSpec(torch.int8, -127, 127, symmetric=True, ch_axis=0)

finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(finite, finite)
def test_affine_range_covers_the_data_and_has_zero(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), AFFINE)
    assert scale > 0
    assert 0 <= zero_point <= 255
    s, z = float(scale), int(zero_point)
    # Zero is on the grid exactly; both ends are within half a step of it.
    assert quantize(torch.tensor(0.0), scale, zero_point, AFFINE) == zero_point
    assert (0 - z) * s <= min(low, 0.0) + 0.51 * s
    assert (255 - z) * s >= max(high, 0.0) - 0.51 * s


@given(finite, finite)
def test_symmetric_range_reaches_the_largest_magnitude(a: float, b: float) -> None:
    scale, zero_point = choose_qparams(torch.tensor(min(a, b)), torch.tensor(max(a, b)), SYMMETRIC)
    assert zero_point == 0
    assert float(scale) == pytest.approx(max(abs(a), abs(b), 127 * np.finfo(np.float32).eps) / 127, rel=1e-5)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.booleans())
def test_quantize_and_dequantize_are_the_formula(values: list[float], symmetric: bool) -> None:
    spec = SYMMETRIC if symmetric else AFFINE
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x.min(), x.max(), spec)
    q = quantize(x, scale, zero_point, spec)
    inverse = np.float32(1) / np.float32(scale)
    expected = np.clip(np.rint(x.numpy() * inverse) + int(zero_point), spec.quant_min, spec.quant_max)
    assert q.dtype == spec.dtype
    np.testing.assert_array_equal(q.numpy(), expected)
    back = dequantize(q, scale, zero_point, spec)
    np.testing.assert_allclose(back.numpy(), x.numpy(), atol=float(scale) * 0.51)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, spec), back)


def test_per_channel_is_per_tensor_channel_by_channel() -> None:
    w = torch.randn(5, 3, 2, 2) * torch.tensor([0.0, 1e-3, 1.0, 10.0, 1e3]).reshape(5, 1, 1, 1)
    low, high = w.flatten(1).amin(1), w.flatten(1).amax(1)
    scale, zero_point = choose_qparams(low, high, PER_CHANNEL)
    q = quantize(w, scale, zero_point, PER_CHANNEL)
    for channel in range(5):
        alone = choose_qparams(low[channel], high[channel], SYMMETRIC)
        assert torch.equal(q[channel], quantize(w[channel], *alone, SYMMETRIC))
    torch.testing.assert_close(
        fake_quantize(w, scale, zero_point, PER_CHANNEL), dequantize(q, scale, zero_point, PER_CHANNEL)
    )


def test_gradient_passes_inside_the_range_only() -> None:
    x = torch.tensor([-0.3, -0.1, 0.0, 1.0, 2.54, 2.6], requires_grad=True)
    fake_quantize(x, torch.tensor(0.01), torch.tensor(10, dtype=torch.int32), AFFINE).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # the range is [-0.1, 2.45]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    scale, zero_point = choose_qparams(x.min(), x.max(), AFFINE)
    assert scale.dtype == torch.float32
    out = fake_quantize(x, scale, zero_point, AFFINE)
    assert out.dtype == dtype
    torch.testing.assert_close(out, fake_quantize(x.float(), scale, zero_point, AFFINE).to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.int32, 0, 255, False), r"dtype=torch\.int32.*torch\.uint8 or torch\.int8"),
        ((torch.uint8, -1, 255, False), r"quant_min=-1.*\[0, 255\]"),
        ((torch.int8, 5, 5, False), r"ascending"),
        ((torch.uint8, 0, 255, True), r"symmetric=True needs quant_min < 0"),
    ],
)
def test_specs_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(*arguments)  # type: ignore[arg-type]


@given(st.lists(st.lists(finite, min_size=1, max_size=8), min_size=1, max_size=6))
def test_minmax_is_the_minimum_and_maximum(batches: list[list[float]]) -> None:
    observer = MinMaxObserver()
    for batch in batches:
        observer(torch.tensor(batch))
        observer(torch.zeros(0))  # empty: nothing to see
    flat = np.float32([value for batch in batches for value in batch])
    assert [float(v) for v in observer.range()] == [flat.min(), flat.max()]
    observer.reset()
    assert [float(v) for v in observer.range()] == [np.inf, -np.inf]


def test_minmax_hands_a_nan_on() -> None:
    observer = MinMaxObserver()
    for value in (1.0, float("nan"), 2.0):
        observer(torch.tensor([value]))
    assert all(torch.isnan(v) for v in observer.range())


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageObserver])
def test_what_is_not_finite_is_never_forgotten(observer: type, position: int, value: float) -> None:
    watching = observer()
    for batch in range(3):
        watching(torch.tensor([value if batch == position else 1.0, -1.0]))
    assert not all(torch.isfinite(v) for v in watching.range())


def test_moving_average_begins_as_the_mean() -> None:
    batches = [torch.randn(10) for _ in range(15)]
    observer = MovingAverageObserver(averaging_constant=0.1)
    for batch in batches[:10]:
        observer(batch)
    low, high = (torch.stack([getattr(batch, end)() for batch in batches[:10]]).mean() for end in ("min", "max"))
    torch.testing.assert_close(observer.range(), (low, high))
    for batch in batches[10:]:
        observer(batch)
        low, high = 0.9 * low + 0.1 * batch.min(), 0.9 * high + 0.1 * batch.max()
    torch.testing.assert_close(observer.range(), (low, high))
    observer.reset()
    observer(batches[3])
    torch.testing.assert_close(observer.range(), (batches[3].min(), batches[3].max()))
    with pytest.raises(ValueError, match=r"averaging_constant=0 must be in \(0, 1\]"):
        MovingAverageObserver(averaging_constant=0)


def test_per_channel_observer() -> None:
    x = torch.randn(4, 3, 5)
    observer = MinMaxObserver(ch_axis=1, num_channels=3)
    observer(x)
    torch.testing.assert_close(observer.range(), (x.amin((0, 2)), x.amax((0, 2))))


def test_quantizer_learns_from_training_batches_alone_and_remembers_its_state() -> None:
    quantizer = Quantizer(AFFINE, MovingAverageObserver())
    quantizer.state = QuantizerState.OBSERVE | QuantizerState.FAKE_QUANTIZE
    x = torch.rand(10)
    assert quantizer.eval()(x) is x  # no range yet
    quantizer.train()(x)
    before = quantizer.scale.clone()
    quantizer.eval()(x * 100)
    assert torch.equal(quantizer.scale, before)
    other = Quantizer(AFFINE, MovingAverageObserver())
    other.load_state_dict(quantizer.state_dict())
    assert (other.state, other.calibrated) == (quantizer.state, True)
    assert torch.equal(other.eval()(x), quantizer(x))
