"""A histogram as calibrators read it: quantiles, and what a range would cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lq.numerics.functional import choose_qparams
from lq.numerics.observers import HistogramObserver
from lq.numerics.spec import QuantSpec

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Histogram:
    """The occupied part of an observer's bins, on the CPU.

    Args:
        counts: elements per bin, float64 of shape ``(bins,)``.
        upper: upper end of each bin, float64 of shape ``(bins,)``: that of the last bin can be beyond any float32.
        width: of a bin, shape ``()``.
        low: exact minimum, shape ``()``.
        high: exact maximum, shape ``()``.
    """

    counts: Tensor
    upper: Tensor
    width: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, observer: HistogramObserver) -> Histogram:
        """The histogram that ``observer`` holds."""
        # On the CPU, wherever it was collected: few numbers, many small steps, and float64, which some devices lack.
        half = observer.BINS // 2
        counts = observer.counts.cpu().double().roll(half - 1)
        index = torch.arange(1 - half, half + 1)
        occupied = counts.nonzero()
        if len(occupied):
            first, last = int(occupied.min()), int(occupied.max()) + 1
            counts, index = counts[first:last], index[first:last]
        width = torch.tensor(2.0 ** int(observer.exponent))
        return cls(counts, index * width.double(), width, observer.min_val.cpu(), observer.max_val.cpu())

    def span(self) -> Range:
        """The range, widened to contain zero."""
        return self.low.clamp(max=0.0), self.high.clamp(min=0.0)

    def centers(self) -> Tensor:
        """Middle of each bin; where nothing is negative, bin 0 holds exact zeros."""
        centers = self.upper - self.width / 2
        return torch.where(self.upper.eq(0) & self.low.ge(0), 0.0, centers)

    def magnitudes(self) -> Histogram:
        """The histogram of the absolute values."""
        # Bin i <= 0 is (i - 1, i] times the width: its mirror image is bin 1 - i.
        index = torch.round(self.upper / self.width).long()
        is_zero = index.eq(0) & self.low.ge(0)
        mirrored = torch.where((index > 0) | is_zero, index, 1 - index)
        counts = self.counts.new_zeros(int(mirrored.max()) + 1).index_add_(0, mirrored, self.counts)
        upper = torch.arange(len(counts)) * self.width.double()
        reach = torch.maximum(self.low.abs(), self.high.abs())
        return Histogram(counts, upper, self.width, torch.zeros_like(reach), reach)

    def quantile(self, share: float) -> Tensor:
        """The value that ``share`` of the elements do not exceed, interpolated as ``numpy.quantile`` does."""
        cumulated = self.counts.cumsum(0)
        rank = share * (cumulated[-1] - 1)
        ranks = torch.stack([rank.floor(), rank.ceil()])
        bins = torch.searchsorted(cumulated, ranks, right=True).clamp(max=len(cumulated) - 1)
        inside = (ranks - cumulated[bins] + self.counts[bins] + 0.5) / self.counts[bins]
        below, above = self.upper[bins] - self.width * (1.0 - inside)
        value = below + (above - below) * (rank - rank.floor())
        return torch.clamp(value.float(), self.low, self.high)


def squared_error(histogram: Histogram, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Sum over the bins of squared rounding and clipping error, in squared bin widths, for each candidate range.

    Args:
        histogram: of ``B`` bins.
        low: lower ends, shape ``(K,)``.
        high: upper ends, shape ``(K,)``.
        spec: the grid.

    Returns:
        Shape ``(K,)``.
    """
    x, scale, zero_point = _candidates(histogram, low, high, spec)
    q = torch.round(x / scale).clamp_(spec.quant_min - zero_point, spec.quant_max - zero_point)
    return q.mul_(scale).sub_(x).square_() @ histogram.counts.float()


def divergence(histogram: Histogram, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Kullback-Leibler divergence of each candidate range, as :class:`Entropy` defines it.

    Args:
        histogram: of ``B`` bins.
        low: lower ends, shape ``(K,)``.
        high: upper ends, shape ``(K,)``.
        spec: the grid.

    Returns:
        Shape ``(K,)``.
    """
    x, scale, zero_point = _candidates(histogram, low, high, spec)
    levels = torch.round(x / scale).add_(zero_point)
    inside = (levels >= spec.quant_min) & (levels <= spec.quant_max)
    counts = torch.where(x.eq(0) & histogram.low.ge(0), 0.0, histogram.counts.float())
    kept = counts * inside

    levels = levels.clamp_(spec.quant_min, spec.quant_max).sub_(spec.quant_min).long()
    size = spec.quant_max - spec.quant_min + 1
    zeros = kept.new_zeros(len(low), size)
    # The outermost bins inside also count what lies beyond them.
    first = inside.int().argmax(1, keepdim=True)
    last = inside.shape[1] - 1 - inside.flip(1).int().argmax(1, keepdim=True)
    position = torch.arange(inside.shape[1])
    p = kept.clone()
    p.scatter_add_(1, first, (counts * (position < first)).sum(1, keepdim=True))
    p.scatter_add_(1, last, (counts * (position > last)).sum(1, keepdim=True))
    occupied = p > 0
    total = zeros.scatter_add(1, levels, kept)
    bins = zeros.scatter_add(1, levels, occupied.float())
    q = (total / bins.clamp(min=1.0)).gather(1, levels) * occupied
    p = p / p.sum(1, keepdim=True).clamp(min=1.0)
    q = q / q.sum(1, keepdim=True).clamp(min=1.0)
    # With nothing inside there is no distribution, and a divergence of 0 would win.
    return torch.xlogy(p, p / (q + 1e-9)).sum(1).masked_fill_(~inside.any(1), torch.inf)


def _candidates(histogram: Histogram, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Bins' centers, and scale and zero point of each range as columns; in bin widths, so that squares are finite."""
    scale, zero_point = choose_qparams(low, high, spec)
    x = (histogram.centers() / histogram.width).float()
    return x, (scale / histogram.width).unsqueeze(1), zero_point.unsqueeze(1)
