"""What an observer has seen: against counts made in numpy."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.calibrator_references import AFFINE, bin_counts, finest_exponent, observed, observed_counts
from lq.numerics.calibrators import Percentile
from lq.numerics.observers import HistogramObserver, MinMaxObserver, MovingAverageObserver, Observer

values = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: Batches of which one may be a million times as wide as the one before it.
batches = st.lists(
    st.builds(
        lambda xs, power: np.float32(xs) * np.float32(10.0) ** power,
        st.lists(st.floats(-4, 4, width=32), max_size=12),
        st.integers(-12, 12),
    ),
    min_size=1,
    max_size=6,
)


def same(a: Observer, b: Observer) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


@settings(deadline=None)
@given(st.lists(st.lists(values, min_size=1, max_size=10), min_size=1, max_size=5))
def test_histogram_of_any_floats_is_the_one_that_numpy_counts(lists: list[list[float]]) -> None:
    parts = [np.float32(part) for part in lists]
    together = np.concatenate(parts)
    observer = observed(*parts)
    exponent = int(observer.exponent)
    assert exponent == finest_exponent(together)
    assert observed_counts(observer) == bin_counts(together, exponent)
    assert [float(v) for v in observer.range()] == [together.min(), together.max()]
    assert observer.batch_ranges.tolist() == [[part.min(), part.max()] for part in parts]


@settings(deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_histogram_does_not_depend_on_the_order_of_batches(parts: list[np.ndarray], random: object) -> None:
    observer = observed(*parts)
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = observed(*shuffled)
    assert int(other.exponent) == int(observer.exponent)
    assert torch.equal(other.counts, observer.counts)
    assert other.range() == observer.range()
    assert int(observer.counts.sum()) == sum(part.size for part in parts)


def test_no_count_is_lost_when_later_batches_are_much_wider() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=500).astype(np.float32) * np.float32(10.0**power) for power in range(-8, 9, 2)]
    observer = HistogramObserver()
    for seen, part in enumerate(parts, start=1):
        observer(torch.from_numpy(part))
        together = np.concatenate(parts[:seen])
        assert observed_counts(observer) == bin_counts(together, finest_exponent(together))


@pytest.mark.parametrize("tiny", [1e-30, -1e-30, 1e-45])
def test_a_tiny_value_is_in_the_same_bin_before_and_after_a_huge_one(tiny: float) -> None:
    before = observed(torch.tensor([tiny]), torch.tensor([1e30]))
    after = observed(torch.tensor([1e30]), torch.tensor([tiny]))
    assert torch.equal(before.counts, after.counts)
    assert bool(before.counts[1 if tiny > 0 else 0] == 1)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
def test_what_is_not_finite_shows_in_the_range(observer: type[Observer], position: int, value: float) -> None:
    watching = observer()
    for batch in range(3):
        watching(torch.tensor([0.5, value if batch == position else 1.0, -1.0]))
    assert not all(torch.isfinite(v) for v in watching.range())
    if isinstance(watching, HistogramObserver):
        assert int(watching.counts.sum()) == 9
        assert len(watching.batch_ranges) == 3


@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
def test_empty_batches_change_nothing(observer: type[Observer]) -> None:
    with_empty, without = observer(), observer()
    for x in (torch.zeros(0), torch.randn(7), torch.zeros(2, 0, 3), torch.randn(5) * 9, torch.zeros(0)):
        with_empty(x)
        if x.numel():
            without(x)
    assert same(with_empty, without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
def test_other_dtypes_count_as_their_float32(observer: type[Observer], dtype: torch.dtype) -> None:
    in_dtype, in_float32 = observer(), observer()
    for scale in (1.0, 100.0, 0.01):
        x = (torch.randn(4, 3, 5, 5, dtype=torch.float64) * scale).to(dtype)
        in_dtype(x)
        in_float32(x.float())
    assert same(in_dtype, in_float32)
    assert in_dtype.min_val.dtype == torch.float32


def layouts() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "every other row": x[:, :, ::2],
        "part of the channels": x[:, 2:5],
        "from a storage with more in it": x.flatten()[17:400].unflatten(0, (1, 383)),
        "expanded": x[:, :1].expand(-1, 9, -1, -1),
        "expanded scalar": torch.tensor(3.0).expand(2, 3),
        "scalar": torch.tensor(-2.5),
        "requires grad": x.clone().requires_grad_(),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
def test_layout_in_memory_does_not_matter(observer: type[Observer], name: str) -> None:
    x = layouts()[name]
    as_it_is, contiguous = observer(), observer()
    as_it_is(x)
    contiguous(x.detach().clone(memory_format=torch.contiguous_format))
    assert same(as_it_is, contiguous)
    if isinstance(as_it_is, HistogramObserver):
        assert int(as_it_is.counts.sum()) == x.numel()


# Sizes that a step of numel / max_samples would fall in with: powers of two, and axes as long as the step.
@pytest.mark.parametrize("shape", [(8, 64, 32, 32), (16, 13, 64, 64), (2048, 512), (1, 3, 384, 384), (4, 26, 13, 999)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sample_of_a_large_tensor_has_something_of_every_index(shape: tuple[int, ...], channels_last: bool) -> None:
    for axis, size in enumerate(shape):
        index = torch.arange(float(size)).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        x = index.expand(shape).contiguous()
        if channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        observer = HistogramObserver()
        observer(x)
        assert int(observer.counts.sum()) == pytest.approx(x.numel(), rel=1e-3)
        # Bins up to one wide: every whole number has one of its own.
        bins = index.flatten().long() * 2 ** -int(observer.exponent)
        counts = observer.counts[bins].float()
        torch.testing.assert_close(counts * size / x.numel(), torch.ones(size), atol=0.1, rtol=0)


def test_a_sample_has_the_quantiles_of_the_whole() -> None:
    x = torch.randn(16, 64, 56, 56)
    sampled, whole = observed(x, max_samples=2**16), observed(x)
    assert int(whole.counts.sum()) == x.numel()
    assert sampled.range() == whole.range() == (x.min(), x.max())
    for percentile in (99.9, 99.0, 90.0):
        low, high = Percentile(percentile)(sampled, AFFINE)
        # The standard error of a quantile of 65536 normal values is below 0.015 up to the 99.9th percentile.
        expected = np.quantile(x.numpy(), [1 - percentile / 100, percentile / 100])
        np.testing.assert_allclose([low.item(), high.item()], expected, atol=0.06)


def test_most_samples_is_checked() -> None:
    with pytest.raises(ValueError, match="max_samples=0 must be at least 1, or None to count every element"):
        HistogramObserver(max_samples=0)
    one = observed(torch.arange(10.0), max_samples=1)
    assert int(one.counts.sum()) >= 10
    assert [v.item() for v in one.range()] == [0.0, 9.0]


@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
def test_reset_forgets_everything(observer: type[Observer]) -> None:
    used, x = observer(), torch.randn(10)
    used(torch.randn(100) * 50)
    used.reset()
    assert same(used, observer())
    fresh = observer()
    used(x)
    fresh(x)
    assert same(used, fresh)


@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
@pytest.mark.parametrize("seen_before", [0, 1, 9])
def test_a_state_dict_goes_on_where_it_was_taken(observer: type[Observer], seen_before: int) -> None:
    source, other = observer(), observer()
    for _ in range(4):
        source(torch.randn(20))
    for _ in range(seen_before):
        other(torch.randn(20) * 1e3)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other, source)
    for x in (torch.randn(20), torch.randn(20) * 7):
        source(x)
        other(x)
    assert same(other, source)


@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver, MovingAverageObserver])
def test_a_copy_goes_its_own_way(observer: type[Observer]) -> None:
    source = observer()
    source(torch.randn(20))
    before, twin = copy.deepcopy(source.state_dict()), copy.deepcopy(source)
    assert same(twin, source)
    twin(torch.randn(20) * 100)
    assert all(torch.equal(source.state_dict()[key], value) for key, value in before.items())
    assert not same(twin, source)


@pytest.mark.parametrize("constant", [0.01, 0.3, 1.0])
def test_moving_average_is_a_loop_over_batches(constant: float) -> None:
    parts = [torch.randn(30) * scale for scale in (1.0, 5.0, 0.1, 2.0)]
    observer = MovingAverageObserver(constant)
    low = high = 0.0
    for number, part in enumerate(parts, start=1):
        observer(part)
        share = max(constant, 1 / number)
        low += share * (part.min().item() - low)
        high += share * (part.max().item() - high)
    np.testing.assert_allclose([v.item() for v in observer.range()], [low, high], rtol=1e-5)
    with pytest.raises(ValueError, match=r"averaging_constant=1.5 must be in \(0, 1\]"):
        MovingAverageObserver(1.5)
