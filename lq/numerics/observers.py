"""Observers collect statistics of a tensor; the range is derived from them afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lq.numerics.functional import choose_qparams, fake_quantize
from lq.numerics.spec import QuantSpec


class Observer(nn.Module):
    """Base of the observers: running ``min_val`` and ``max_val`` as float32 buffers, ``+inf`` / ``-inf`` before data.

    The statistics live where the module lives, and watching never waits for a GPU.

    Args:
        ch_axis: the axis with separate statistics for each index, or None for one range per tensor.
        num_channels: length of that axis; needed with ``ch_axis`` so that state dicts always have the same shapes.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, ch_axis: int | None = None, num_channels: int = 1) -> None:
        super().__init__()
        self.ch_axis = ch_axis
        self._shape = () if ch_axis is None else (num_channels,)
        self.register_buffer("min_val", torch.full(self._shape, torch.inf))
        self.register_buffer("max_val", torch.full(self._shape, -torch.inf))

    def reset(self) -> None:
        """Forget everything seen."""
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)

    def range(self) -> tuple[Tensor, Tensor]:
        """The observed ``(min, max)``, each of shape ``()`` or ``(C,)``."""
        return self.min_val, self.max_val

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """Watch ``x``; an empty tensor changes nothing."""
        if x.numel():
            self._update(x.detach())

    def _update(self, x: Tensor) -> None:
        raise NotImplementedError

    def all_reduce(self) -> None:
        """Merge the statistics of all processes of the default group; every process has to call it.

        Raises:
            RuntimeError: where ``torch.distributed`` has no process group.
        """
        # Backends differ in the minimum with a NaN; an infinity arrives everywhere and serves as well.
        self.min_val.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.max_val.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        dist.all_reduce(self.min_val, dist.ReduceOp.MIN)
        dist.all_reduce(self.max_val, dist.ReduceOp.MAX)

    def _min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.ch_axis is None:
            low, high = torch.aminmax(in_memory_order(x))
        else:
            low, high = torch.aminmax(x.movedim(self.ch_axis, 0).flatten(1), dim=1)
        return low.float(), high.float()


def in_memory_order(x: Tensor) -> Tensor:
    """All elements of ``x`` as one axis, without a copy where ``x`` is dense in any order of its axes."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


class MinMaxObserver(Observer):
    """The smallest and the largest value of everything seen.

    Example:
        >>> import torch
        >>> observer = MinMaxObserver()
        >>> observer(torch.tensor([-1.0, 2.0])); observer(torch.tensor([0.0, 3.0]))
        >>> [v.item() for v in observer.range()]
        [-1.0, 3.0]
    """

    def _update(self, x: Tensor) -> None:
        low, high = self._min_max(x)
        if not self._holds(low, high):
            self._widen(low, high)

    def _holds(self, low: Tensor, high: Tensor) -> bool:
        """Whether a batch is known to change nothing; only tested where that is cheap, as on a CPU."""
        # Elsewhere it would wait for the queue. A comparison with a NaN is false, so a NaN is not skipped.
        if self.ch_axis is not None or low.device.type != "cpu":
            return False
        return self.min_val.item() <= low.item() and high.item() <= self.max_val.item()

    def _widen(self, low: Tensor, high: Tensor) -> None:
        # minimum/maximum propagate a NaN, so one in calibration still shows when the range is computed.
        torch.minimum(self.min_val, low, out=self.min_val)
        torch.maximum(self.max_val, high, out=self.max_val)


class SmallestErrorObserver(Observer):
    """The range of a weight that loses least where it is rounded to ``spec``: of the last tensor seen.

    For each channel the ``a`` that makes ``sum((w - fake_quantize(w, [-a, a]))**2)`` smallest, among
    :data:`SHRINKS` of the largest absolute value; what lies outside is clamped. With few bits it pays to clamp: the
    optimal ``a`` for a Gaussian and 4 bits is 2.6 standard deviations (Banner et al. 2019, "Post training 4-bit
    quantization of convolutional networks for rapid-deployment").

    Args:
        spec: a symmetric grid.
        num_channels: length of its channel axis.
    """

    #: From all of it to a third.
    SHRINKS = tuple(1.0 - step / 48 for step in range(33))

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec.ch_axis, num_channels)
        self.spec = spec

    def _update(self, x: Tensor) -> None:
        low, high = self._min_max(x)
        largest = torch.maximum(-low, high)
        least = torch.full_like(largest, torch.inf)
        best = largest.clone()  # also where a NaN makes every comparison false
        for shrink in self.SHRINKS:
            bound = largest * shrink
            scale, zero_point = choose_qparams(-bound, bound, self.spec)
            error = (fake_quantize(x, scale, zero_point, self.spec) - x).float().square()
            total = error.sum() if self.ch_axis is None else error.movedim(self.ch_axis, 0).flatten(1).sum(1)
            best = torch.where(total < least, bound, best)
            least = torch.minimum(total, least)
        self.min_val.copy_(-best)
        self.max_val.copy_(best)


class MovingAverageObserver(Observer):
    """Exponential moving average of each batch's min and max (Jacob et al. 2018, section 3.1), for training.

    ``m = m + max(c, 1 / n) * (batch - m)`` for the ``n``-th batch: the mean of the first ``1 / c`` batches, so that a
    short training is not left with the range of its first batch. Processes are merged by the mean of their averages.

    Args:
        averaging_constant: ``c``, the weight of a new batch, in ``(0, 1]``.
        ch_axis: see :class:`Observer`.
        num_channels: see :class:`Observer`.

    Raises:
        ValueError: where ``averaging_constant`` is outside ``(0, 1]``.
    """

    batches: Tensor

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int | None = None, num_channels: int = 1) -> None:
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant={averaging_constant} must be in (0, 1]")
        super().__init__(ch_axis, num_channels)
        self.averaging_constant = averaging_constant
        self.register_buffer("batches", torch.zeros(()))

    def reset(self) -> None:
        super().reset()
        self.batches.zero_()

    def _update(self, x: Tensor) -> None:
        low, high = self._min_max(x)
        # `where` and not `if`: asking a tensor on a GPU for its value would wait for the whole queue. Only before the
        # first batch is the minimum above the maximum, so an infinity in the data persists, like a NaN.
        first = self.min_val > self.max_val
        self.batches += 1
        constant = (1 / self.batches).clamp(min=self.averaging_constant)
        for average, batch in ((self.min_val, low), (self.max_val, high)):
            average.copy_(torch.where(first, batch, average + constant * (batch - average)))

    def all_reduce(self) -> None:
        # A process without data has no average; if no process has data there is none.
        seen = ~(self.min_val > self.max_val)
        processes = seen.float()
        dist.all_reduce(processes)
        for average in (self.min_val, self.max_val):
            total = torch.where(seen, average, 0.0)
            dist.all_reduce(total)
            average.copy_(torch.where(processes > 0, total / processes, average))
        # As much as the longest of them weighs the merged one from now on.
        dist.all_reduce(self.batches, op=dist.ReduceOp.MAX)


def all_reduce_together(observers: Sequence[Observer]) -> None:
    """:meth:`Observer.all_reduce` of per-tensor observers, with the communication of one: cheap enough for every step.

    Args:
        observers: all :class:`MinMaxObserver`, or all :class:`MovingAverageObserver`; in the same order everywhere.

    Raises:
        RuntimeError: where ``torch.distributed`` has no process group.
    """
    if not observers:
        return
    both = type(observers[0])(ch_axis=0, num_channels=len(observers)).to(observers[0].min_val.device)
    names = ["min_val", "max_val", *(["batches"] if isinstance(both, MovingAverageObserver) else [])]
    for name in names:
        setattr(both, name, torch.stack([getattr(observer, name) for observer in observers]))
    both.all_reduce()
    for name in names:
        for observer, merged in zip(observers, getattr(both, name), strict=True):
            getattr(observer, name).copy_(merged)


class HistogramObserver(MinMaxObserver):
    """Everything that any calibrator needs: the range, each batch's range, and a histogram.

    Bin ``i`` is ``((i - 1) * w, i * w]`` for ``-2047 <= i <= 2048``, with a width ``w = 2**exponent`` that is the
    smallest power of two above ``max|x| / 2048``, or ``2**-40``. A wider batch makes bins merge in pairs, exactly:
    no count is lost, split or interpolated, and the histogram depends on the data alone, not on their order or on which
    process saw them. After a ReLU, bin 0 is the exact zeros, which no range rounds. Minimum and maximum are exact.

    Of a large tensor every n-th element is counted, n times, so that a batch costs a small part of the forward that
    made it; a tensor of up to ``max_samples`` elements is counted whole.

    Args:
        max_samples: most elements that are counted of one tensor, or None to count all of every tensor.

    Raises:
        ValueError: where ``max_samples`` is less than 1.

    Attributes:
        counts: elements per bin, int64 of shape ``(4096,)``: bin ``i`` is ``counts[i]``, also for negative ``i``.
        exponent: binary logarithm of the bins' width, int32 of shape ``()``.

    Example:
        >>> import torch
        >>> observer = HistogramObserver()
        >>> observer(torch.tensor([0.0, 1.0])); observer(torch.tensor([-3.0, 100.0]))
        >>> observer.exponent.item(), observer.counts.sum().item()
        (-4, 4)
    """

    BINS = 4096
    #: The finest bins are far below the smallest scale; the coarsest hold the largest float.
    MIN_EXPONENT, MAX_EXPONENT = -40, 117

    counts: Tensor
    exponent: Tensor

    def __init__(self, max_samples: int | None = 2**16) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples={max_samples} must be at least 1, or None to count every element")
        super().__init__()
        self.max_samples = max_samples
        self.register_buffer("counts", torch.zeros(self.BINS, dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(self.MIN_EXPONENT, dtype=torch.int32))
        self._batch_ranges: list[tuple[Tensor, Tensor]] = []

    @property
    def batch_ranges(self) -> Tensor:
        """Min and max of each batch in the order they came, float32 of shape ``(batches, 2)``."""
        rows = [torch.stack(row).to(self.min_val.device) for row in self._batch_ranges]
        return torch.stack(rows) if rows else self.min_val.new_empty(0, 2)

    def get_extra_state(self) -> Tensor:
        return self.batch_ranges

    def set_extra_state(self, state: Tensor) -> None:
        self._batch_ranges = [(low, high) for low, high in state.clone()]

    def reset(self) -> None:
        super().reset()
        self.counts.zero_()
        self.exponent.fill_(self.MIN_EXPONENT)
        self._batch_ranges.clear()

    def _update(self, x: Tensor) -> None:
        # Calling operators on single numbers takes longer than the bins' arithmetic, so there are few such calls.
        low, high = self._min_max(x)
        self._batch_ranges.append((low, high))
        if not self._holds(low, high):
            self._widen(low, high)
            self._grow(self._needed_exponent(low, high))
        per_unit = 2.0 ** -int(self.exponent) if x.device.type == "cpu" else _power_of_two(-self.exponent)
        flat, stride = in_memory_order(x), self._stride(x)
        values = flat[::stride].float()
        if isinstance(per_unit, float) and per_unit < 1.0:
            # Rounding up twice equals rounding up once, and tiny values would become zeros if scaled down.
            values = values.ceil()
        # Scaling by a power of two and rounding up are exact: an element is never in a neighbour's bin.
        bins = (values * per_unit).ceil_().to(torch.int16)
        # Negative indices wrap around; a NaN, which shows in the range, has to go somewhere.
        bins.bitwise_and_(self.BINS - 1)
        self.counts.add_(_bincount(bins, self.BINS), alpha=stride)

    def _stride(self, x: Tensor) -> int:
        if self.max_samples is None or x.numel() <= self.max_samples:
            return 1
        stride = math.ceil(x.numel() / self.max_samples)
        # A step that shares a factor with an axis would see only some of its indices: some channels, or some columns.
        while any(math.gcd(stride, size) > 1 for size in x.shape):
            stride += 1
        return stride

    def _needed_exponent(self, low: Tensor, high: Tensor) -> Tensor:
        # |x| < 2**e, so with bins 2**(e - 11) wide every index is in [-2047, 2048]. e is read off the float's bits.
        reach = torch.maximum(-low, high)
        exponent = (reach.view(torch.int32) >> 23) - (126 + int(math.log2(self.BINS // 2)))
        return exponent.clamp_(self.MIN_EXPONENT, self.MAX_EXPONENT)

    def _grow(self, exponent: Tensor) -> None:
        """Merge bins until they are at least ``2**exponent`` wide."""
        # Beyond 31 bits a shift is undefined; by then only bins 0 and 1 are left.
        shift = (exponent - self.exponent).clamp(min=0, max=31)
        half = self.BINS // 2
        index = torch.arange(1 - half, half + 1, dtype=torch.int32, device=shift.device)
        merged = -(-index >> shift)  # ceil(index / 2**shift)
        counts = self.counts.roll(half - 1)  # starting at bin -2047
        self.counts.copy_(torch.zeros_like(counts).index_add_(0, merged % self.BINS, counts))
        self.exponent.copy_(torch.maximum(self.exponent, exponent))

    def all_reduce(self) -> None:
        """Merge the statistics of all processes; the batches are ordered as by a sampler that deals them in turn.

        Raises:
            RuntimeError: where ``torch.distributed`` has no process group.
        """
        super().all_reduce()
        exponent = self.exponent.clone()
        dist.all_reduce(exponent, dist.ReduceOp.MAX)
        self._grow(exponent)
        dist.all_reduce(self.counts)
        self._gather_batch_ranges()

    def _gather_batch_ranges(self) -> None:
        mine = self.batch_ranges
        length = torch.tensor(len(mine), device=mine.device)
        dist.all_reduce(length, dist.ReduceOp.MAX)
        padding = torch.tensor([[torch.inf, -torch.inf]], device=mine.device).expand(int(length) - len(mine), 2)
        mine = torch.cat([mine, padding])
        ranges = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranges, mine)
        in_turn = torch.stack(ranges, dim=1).flatten(0, 1)
        self.set_extra_state(in_turn[in_turn[:, 0] <= in_turn[:, 1]])


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent``, exact (``exp2`` need not be), for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def _bincount(bins: Tensor, length: int) -> Tensor:
    if bins.device.type == "cpu":
        return torch.bincount(bins, minlength=length)
    # bincount reads the largest value first, which would wait for a GPU's queue.
    return torch.zeros(length, dtype=torch.int64, device=bins.device).index_add_(0, bins, torch.ones_like(bins).long())
