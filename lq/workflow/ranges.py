"""The ranges of a model's quantizers, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from lq.numerics.histogram import Histogram
from lq.numerics.observers import HistogramObserver
from lq.numerics.quantizer import Quantizer, WeightQuantizer
from lq.numerics.spec import QuantSpec
from lq.util.display import as_text
from lq.workflow.prepare import quantizers, refresh_weights


@dataclass(frozen=True)
class QuantizerRange:
    """One row of the table.

    Args:
        name: of the quantizer, see :func:`~lq.quantizers`.
        bits: how many bits the integers take.
        scheme: dtype, symmetry and granularity.
        low: smallest real value on the grid, one or one per channel; empty before calibration.
        high: largest one, likewise.
        calibrator: where the range comes from.
        rounds: False for a tensor that only other targets quantize, which is watched and not rounded.
        clipped: share of the observed values outside the grid, in [0, 1], or None where that is not known.
    """

    name: str
    bits: int
    scheme: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    calibrator: str
    rounds: bool
    clipped: float | None

    @property
    def range(self) -> str:
        """``[low, high]``, or the smallest and the largest of the channels' ranges."""
        if not self.low:
            return "no range yet"
        if len(self.low) == 1:
            return f"[{self.low[0]:.4g}, {self.high[0]:.4g}]"
        return f"±{min(self.high):.4g} to ±{max(self.high):.4g} ({len(self.high)} channels)"


@dataclass(frozen=True)
class RangeTable:
    """The ranges of all quantizers, module by module; ``str(table)`` prints them."""

    rows: tuple[QuantizerRange, ...]

    def table(self) -> Table:
        table = Table(title=f"{len(self.rows)} quantizers")
        for header in ("quantizer", "bits", "scheme", "range", "calibrator", "clipped"):
            table.add_column(header, justify="right" if header in ("bits", "clipped") else "left", overflow="fold")
        for row in self.rows:
            clipped = "" if row.clipped is None else f"{row.clipped:.4%}"
            scheme = row.scheme if row.rounds else f"{row.scheme}; watched for other targets, not rounded"
            table.add_row(row.name, str(row.bits), scheme, row.range, row.calibrator, clipped)
        return table

    def __str__(self) -> str:
        return as_text(self.table(), 150)


def ranges(model: nn.Module) -> RangeTable:
    """Name, bits, scheme, range, calibrator and clipped share of every quantizer of a prepared model.

    A weight that the forward computes itself has a range once the calibrated model has run.

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    by_name = quantizers(model)
    refresh_weights(model)
    return RangeTable(tuple(_row(name, quantizer) for name, quantizer in by_name.items()))


def clipped_share(quantizer: Quantizer) -> float | None:
    """Share of the observed values that lie more than half a step outside the grid, to within one bin.

    None if nothing was observed, or if only minimum and maximum are known and lie outside.
    """
    observer = quantizer.observer
    low, high = quantizer.quantized_range()
    low, high = low - quantizer.scale / 2, high + quantizer.scale / 2
    seen_low, seen_high = observer.range()
    if not quantizer.calibrated or bool((seen_low > seen_high).any()):
        return None
    if bool(((seen_low >= low) & (seen_high <= high)).all()):
        return 0.0
    if not isinstance(observer, HistogramObserver):
        return None
    histogram = Histogram.of(observer)
    centers = histogram.centers()
    outside = (centers < low.cpu()) | (centers > high.cpu())
    return float(histogram.counts[outside].sum() / histogram.counts.sum())


def _row(name: str, quantizer: Quantizer) -> QuantizerRange:
    low, high = quantizer.quantized_range() if quantizer.calibrated else (torch.empty(0), torch.empty(0))
    return QuantizerRange(
        name=name,
        bits=_bits(quantizer.spec),
        scheme=str(quantizer.spec),
        low=tuple(low.reshape(-1).tolist()),
        high=tuple(high.reshape(-1).tolist()),
        calibrator=str(quantizer.calibrator),
        rounds=quantizer.rounds,
        # A weight's range always covers it: nothing is clipped.
        clipped=0.0 if isinstance(quantizer, WeightQuantizer) and quantizer.calibrated else clipped_share(quantizer),
    )


def _bits(spec: QuantSpec) -> int:
    # Symmetric grids lack one value or have one more: [-127, 127] counts as 8 bits, [-64, 64] as 7.
    return round(math.log2(spec.quant_max - spec.quant_min))
