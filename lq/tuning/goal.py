"""What a search is to reach, and within what limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def check_count(name: str, value: Any, range_: str) -> None:
    """Refuse what is no whole number from 0 on.

    Raises:
        ValueError: with ``name`` and ``range_``, what is allowed in words.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r} must be a whole number, {range_}")


@dataclass(frozen=True)
class Goal:
    """What is to be reached, and within what.

    Args:
        max_drop: by how much the metric may be worse than the float model's, in points, see :meth:`allowed_drop`.
        max_evaluations: how often the metric may be measured, with the float model.
        seconds: how long all of it may take; None for no limit.
        smallest: whether a smaller metric is a better one.
        metric_name: what to call the metric.
        max_float_layers: how many layers may stay in float for the accuracy's sake; None for as many as it takes.

    Raises:
        ValueError: where a number is out of its range.
    """

    max_drop: float
    max_evaluations: int
    seconds: float | None = None
    smallest: bool = False
    metric_name: str = "metric"
    max_float_layers: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop={self.max_drop} must be a number of points, at least 0")
        if self.max_evaluations < 2:
            raise ValueError(
                f"max_evaluations={self.max_evaluations} must be at least 2: one of the float model, one of INT8"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be above 0, or None for no limit")
        if self.max_float_layers is not None:
            check_count("max_float_layers", self.max_float_layers, "at least 0, or None for no limit")

    def allowed_drop(self, float_metric: float) -> float:
        """``max_drop`` in the metric's own units.

        A point is a hundredth of a metric that grows to 1, as accuracies do that are shares: one that the float model
        has between 0 and 1. Of any other metric, a percentage or a loss, it is 1.
        """
        is_share = not self.smallest and 0.0 <= float_metric <= 1.0
        return self.max_drop / 100 if is_share else self.max_drop
