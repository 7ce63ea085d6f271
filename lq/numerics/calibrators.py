"""Calibrators turn an observer's statistics into a range; trying another one needs no data."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from lq.numerics.histogram import Histogram, Range, divergence, squared_error
from lq.numerics.observers import HistogramObserver, MovingAverageObserver, Observer
from lq.numerics.spec import QuantSpec


class Calibrator(ABC):
    """Base of the calibrators: called with an observer and a grid, it gives the range that the grid is to cover."""

    #: What the user types.
    name: ClassVar[str]

    @abstractmethod
    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        """The range for what ``observer`` has seen.

        Args:
            observer: statistics of a tensor.
            spec: the grid the range will be mapped to.

        Returns:
            ``(low, high)``, each of the shape of the observer's ``min_val``.

        Raises:
            ValueError: where the observer does not hold the statistics that are needed.
        """

    def check(self, observer: Observer) -> None:  # noqa: B027 (min and max, which some do with, are always there)
        """Whether ``observer`` collects what is needed, checked before the data pass through.

        Raises:
            ValueError: where it does not.
        """

    def __str__(self) -> str:
        return self.name


class HistogramCalibrator(Calibrator):
    """Base of those that need a histogram."""

    def check(self, observer: Observer) -> None:
        _with_histogram(observer, self)


@dataclass(frozen=True)
class MinMax(Calibrator):
    """All that was seen: ``[min, max]``; nothing is clipped."""

    name: ClassVar[str] = "minmax"

    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        return observer.range()


@dataclass(frozen=True)
class MovingAverage(Calibrator):
    """Exponential moving average of each batch's min and max (Jacob et al. 2018, section 3.1).

    ``m = m + max(c, 1 / n) * (batch - m)`` for the ``n``-th batch, in the order the batches came: the mean of the first
    ``1 / c``. An observer that keeps the running average itself has its own constant.

    Args:
        averaging_constant: ``c``, in ``(0, 1]``.

    Raises:
        ValueError: where ``averaging_constant`` is outside ``(0, 1]``.
    """

    name: ClassVar[str] = "moving_average"
    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant={self.averaging_constant} must be in (0, 1]")

    def check(self, observer: Observer) -> None:
        if not isinstance(observer, MovingAverageObserver):
            _with_histogram(observer, self)

    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        if isinstance(observer, MovingAverageObserver):
            return observer.range()
        ranges = _with_histogram(observer, self).batch_ranges.cpu().double()
        if not len(ranges):
            return observer.range()
        average = ranges[0]
        for number, batch in enumerate(ranges[1:], start=2):
            average = average + max(self.averaging_constant, 1 / number) * (batch - average)
        low, high = average.float()
        return low, high

    def __str__(self) -> str:
        return _typed(self, self.averaging_constant)


@dataclass(frozen=True)
class Percentile(HistogramCalibrator):
    """Cuts off the rarest values (McKinstry et al. 2018, "Discovering low-precision networks", section 3.1).

    An affine range is ``[quantile(x, 1 - p), quantile(x, p)]``, a symmetric one ``±quantile(|x|, p)``, with
    ``p = percentile / 100``; from the histogram, so within one bin of the values' own quantiles.

    Args:
        percentile: in ``(50, 100]``. The default is one that Wu et al. 2020 ("Integer quantization for deep learning
            inference", table 5) found best on most networks.

    Raises:
        ValueError: where ``percentile`` is outside ``(50, 100]``.
    """

    name: ClassVar[str] = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile={self.percentile} must be in (50, 100]")

    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        histogram = Histogram.of(_with_histogram(observer, self))
        share = self.percentile / 100
        if not spec.symmetric:
            return histogram.quantile(1.0 - share), histogram.quantile(share)
        high = histogram.magnitudes().quantile(share)
        return -high, high

    def __str__(self) -> str:
        return f"{self.name}:{_shortest(self.percentile)}"


@dataclass(frozen=True)
class MSE(HistogramCalibrator):
    """The range with the least mean squared error of rounding and clipping together.

    ``argmin over (low, high) of sum_i n_i * (x_i - q(x_i))**2`` over the bins' centers ``x_i`` with ``n_i`` elements,
    ``q`` the rounding of the grid that the range really gives (Sung et al. 2015, "Resiliency of deep neural networks
    under quantization", section 3; Nagel et al. 2021, "A white paper on neural network quantization", eq. 27).
    Each end is searched among equal steps from 0 to the farthest value; the two ends of an affine range in turn,
    until neither moves.

    Args:
        steps: candidates for each end.

    Raises:
        ValueError: where ``steps`` is less than 2.
    """

    name: ClassVar[str] = "mse"
    steps: int = 128

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps={self.steps} must be at least 2")

    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        histogram = Histogram.of(_with_histogram(observer, self))
        shares = torch.arange(1, self.steps + 1) / self.steps
        low, high = (bound.clone() for bound in histogram.span())
        if spec.symmetric:
            reach = torch.maximum(-low, high) * shares
            best = squared_error(histogram, -reach, reach, spec).argmin()
            return -reach[best], reach[best]
        lows, highs = low * shares, high * shares
        for _ in range(8):  # two or three are enough; ties could alternate forever
            before = torch.stack([low, high])
            high = highs[squared_error(histogram, low.expand_as(highs), highs, spec).argmin()]
            low = lows[squared_error(histogram, lows, high.expand_as(lows), spec).argmin()]
            if torch.equal(torch.stack([low, high]), before):
                break
        return low, high

    def __str__(self) -> str:
        return _typed(self, self.steps)


@dataclass(frozen=True)
class Entropy(HistogramCalibrator):
    """The range that keeps the distribution's shape best, by Kullback-Leibler divergence (Migacz 2017, "8-bit
    inference with TensorRT").

    Candidates are ``[max(min, -t), min(max, t)]`` for thresholds ``t`` in equal steps up to the farthest value. For
    each, ``P`` is the histogram inside, with the clipped counts added to the outermost bins; ``Q`` is the histogram
    inside without them, where the counts of all bins that round to the same integer are shared out evenly among those
    of them that ``P`` has something in. Both are normalised, and the least ``sum_i P_i * log(P_i / (Q_i + 1e-9))``
    wins. Zeros after a ReLU take no part: every grid has them exactly.

    Args:
        steps: number of thresholds.

    Raises:
        ValueError: where ``steps`` is less than 2.
    """

    name: ClassVar[str] = "entropy"
    steps: int = 128

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps={self.steps} must be at least 2")

    def __call__(self, observer: Observer, spec: QuantSpec) -> Range:
        histogram = Histogram.of(_with_histogram(observer, self))
        low, high = histogram.span()
        reach = torch.maximum(-low, high)
        thresholds = torch.linspace(1 / self.steps, 1.0, self.steps) * reach
        lows, highs = torch.maximum(-thresholds, low), torch.minimum(thresholds, high)
        best = divergence(histogram, lows, highs, spec).argmin()
        return lows[best], highs[best]

    def __str__(self) -> str:
        return _typed(self, self.steps)


CALIBRATORS: dict[str, type[Calibrator]] = {
    calibrator.name: calibrator for calibrator in (MinMax, MovingAverage, Percentile, MSE, Entropy)
}


def get_calibrator(calibrator: str | Calibrator) -> Calibrator:
    """The calibrator called ``calibrator``; an instance is returned as it is.

    A colon and a number after the name give its parameter: ``"percentile:99.9"``, ``"mse:256"`` (steps). Each
    calibrator of this module is the one that its own ``str`` gives.

    Raises:
        ValueError: where no calibrator has that name, or what follows the colon is not in its parameter's range.
    """
    if isinstance(calibrator, Calibrator):
        return calibrator
    name, _, value = calibrator.partition(":")
    if name not in CALIBRATORS or (value and name == MinMax.name):
        near = difflib.get_close_matches(name, CALIBRATORS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near and near[0] != name else ""
        choices = ", ".join(map(repr, (*CALIBRATORS, "percentile:99.9")))
        raise ValueError(f"calibrator={calibrator!r} is unknown{hint}; choose one of {choices}")
    if not value:
        return CALIBRATORS[name]()
    kind = CALIBRATORS[name]
    try:
        number = int(value) if kind in (MSE, Entropy) else float(value)
    except ValueError:
        raise ValueError(
            f"calibrator={calibrator!r}: {value!r} is not a valid number; write for example 'percentile:99.9' or "
            f"'mse:256'"
        ) from None
    return kind(number)  # type: ignore[call-arg]


def _typed(calibrator: Calibrator, parameter: float) -> str:
    """What the user types: the name, and a parameter other than the default one."""
    is_default = calibrator == type(calibrator)()
    return calibrator.name if is_default else f"{calibrator.name}:{_shortest(parameter)}"


def _shortest(number: float) -> str:
    """The shortest text that reads as exactly this number; an integer has no fraction."""
    return str(number).removesuffix(".0")


def default_calibrator(observer: Observer) -> Calibrator:
    """The calibrator for an observer where none is asked for."""
    if isinstance(observer, HistogramObserver):
        return MSE()
    return MovingAverage() if isinstance(observer, MovingAverageObserver) else MinMax()


def _with_histogram(observer: Observer, calibrator: Calibrator) -> HistogramObserver:
    if not isinstance(observer, HistogramObserver):
        raise ValueError(
            f"calibrator={str(calibrator)!r} needs a histogram, and a {type(observer).__name__} keeps none; prepare "
            f"the model with lq.prepare(..., observer='histogram')"
        )
    return observer
