"""The way to an accuracy: which INT8 networks are evaluated, in which order, and when that ends."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lq.int8.module import Int8Module
from lq.results.tuning import Tuning, TuningStep
from lq.tuning.builder import Builder, Choice
from lq.tuning.fewest import fewest

#: A calibrator whose outputs have an SQNR that is lower than the best one's by more than so many decibels is not
#: evaluated: 3 dB are twice the noise.
CALIBRATOR_MARGIN_DB = 3.0

#: How many calibrators are evaluated at most.
MOST_CALIBRATORS = 3

#: A method stays where the drop is smaller by this share of it: what gains less may do so by chance.
WORTH = 0.1

#: Share of the time left that measuring the layers' sensitivity may take.
SENSITIVITY_SHARE = 0.3


class _LimitError(Exception):
    """No more is to be evaluated; the message says why."""


@dataclass(frozen=True)
class Goal:
    """What is to be reached, and within what.

    Args:
        max_drop: by how much the metric may be worse than the float model's, in points, see :meth:`allowed_drop`.
        max_evaluations: how often the metric may be measured, with the float model.
        seconds: how long all of it may take; None for no limit.
        smallest: whether a smaller metric is a better one.
        metric_name: what to call the metric.

    Raises:
        ValueError: where a number is out of its range.
    """

    max_drop: float
    max_evaluations: int
    seconds: float | None = None
    smallest: bool = False
    metric_name: str = "metric"

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop={self.max_drop} must be a number of points, at least 0")
        if self.max_evaluations < 2:
            raise ValueError(
                f"max_evaluations={self.max_evaluations} must be at least 2: one of the float model, one of INT8"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be above 0, or None for no limit")

    def allowed_drop(self, float_metric: float) -> float:
        """``max_drop`` in the metric's own units.

        A point is a hundredth of a metric that grows to 1, as accuracies do that are shares: one that the float model
        has between 0 and 1. Of any other metric, a percentage or a loss, it is 1.
        """
        is_share = not self.smallest and 0.0 <= float_metric <= 1.0
        return self.max_drop / 100 if is_share else self.max_drop


@dataclass
class Search:
    """Evaluates INT8 networks until one meets a goal, or the goal's limits are reached.

    Args:
        builder: makes the networks.
        evaluate: the metric of a network, as the builder's engine runs it.
        float_metric: the metric of the float model.
        goal: what is to be reached.
        always: methods that every network is made with.
        where_needed: methods that are tried, in this order, where the calibrators alone do not meet the goal; what
            does not make the drop smaller by a tenth is left out again.
        tell: called with each step.
        begun: when it began, by :func:`time.monotonic`; the goal's seconds count from there.
    """

    builder: Builder
    evaluate: Callable[[nn.Module], float]
    float_metric: float
    goal: Goal
    always: tuple[str, ...] = ()
    where_needed: tuple[str, ...] = ()
    tell: Callable[[TuningStep], None] = lambda step: None
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not math.isfinite(self.float_metric):
            raise ValueError(f"{self.goal.metric_name} of the float model is {self.float_metric}: it must be finite")
        self._steps: list[TuningStep] = []
        self._best: tuple[int, Choice, Int8Module] | None = None

    def run(self, scores: Mapping[str, float]) -> tuple[Tuning, Choice, Int8Module]:
        """The steps, and the network that was taken: the first to meet the goal, with the fewest layers in float, or
        the best one.

        Args:
            scores: the calibrators to try, each with the SQNR of the outputs, dB.
        """
        try:
            self._try_all(scores)
            ended = "it is met" if self._met else "everything was tried"
        except _LimitError as reason:
            ended = str(reason)
        assert self._best is not None  # the limits allow one evaluation at least
        index, choice, int8 = self._best
        tuning = Tuning(
            metric_name=self.goal.metric_name,
            float_metric=self.float_metric,
            allowed_drop=self._allowed,
            steps=tuple(self._steps),
            chosen=index,
            ended=ended,
            runtime=self.builder.judge.runtime,
        )
        return tuning, choice, int8

    def _try_all(self, scores: Mapping[str, float]) -> None:
        for name in _promising(scores):
            change = ", ".join([f"calibrator {name}", *map(_words, self.always)])
            if self._meets(Choice(name, self.always), change):
                return
        assert self._best is not None
        index, choice, _ = self._best
        chosen = self._try_methods(choice, self._steps[index].drop)
        if chosen is not None:
            self._try_layers(chosen)

    def _try_methods(self, choice: Choice, drop: float) -> Choice | None:
        """``choice`` with the methods that help; None where one of them is enough."""
        for method in self.where_needed:
            methods = (*choice.methods, method)
            if not self.builder.applies(method):
                continue
            if self._meets(replace(choice, methods=methods), ", ".join(map(_words, methods))):
                return None
            gained = drop - self._steps[-1].drop
            if gained >= WORTH * drop:
                choice, drop = replace(choice, methods=methods), self._steps[-1].drop
        return choice

    def _try_layers(self, choice: Choice) -> None:
        self._check_limits()
        left = self._seconds_left()
        ranking = self.builder.ranking(choice, None if left is None else SENSITIVITY_SHARE * left)

        @functools.cache
        def meets(layers: tuple[str, ...]) -> bool:
            shown = ", ".join(layers) if len(layers) <= 2 else f"{len(layers)} layers ({layers[0]} ... {layers[-1]})"
            return self._meets(replace(choice, float_layers=layers), f"{shown} in float")

        # One stays in INT8: with all in float there would be no INT8 network.
        if len(ranking) > 1:
            fewest(ranking[:-1], meets)

    def _meets(self, choice: Choice, change: str) -> bool:
        """Evaluate a network; whether it meets the goal."""
        self._check_limits()
        begun = time.monotonic()
        int8, network = self.builder.int8(choice)
        metric = float(self.evaluate(network))
        drop = metric - self.float_metric if self.goal.smallest else self.float_metric - metric
        drop = math.inf if math.isnan(drop) else drop
        step = TuningStep(
            change,
            metric,
            drop,
            time.monotonic() - begun,
            choice.calibrator,
            choice.methods,
            choice.float_layers,
            self.builder.judge.latency(int8, network),
        )
        self._steps.append(step)
        if self._best is None or self._is_better(step, self._steps[self._best[0]]):
            self._best = (len(self._steps) - 1, choice, int8)
        self.tell(step)
        return drop <= self._allowed

    def _is_better(self, step: TuningStep, other: TuningStep) -> bool:
        """Meeting the goal counts most, then the fewest layers in float, then the metric."""

        def merit(step: TuningStep) -> tuple[bool, int, float]:
            met = step.drop <= self._allowed
            return met, -len(step.float_layers) if met else 0, -step.drop

        return merit(step) > merit(other)

    def _check_limits(self) -> None:
        if not self._steps:
            return
        if len(self._steps) + 1 >= self.goal.max_evaluations:
            raise _LimitError(f"max_evaluations={self.goal.max_evaluations} is reached")
        left = self._seconds_left()
        # Another evaluation takes about as long as the last one.
        if left is not None and left < self._steps[-1].seconds:
            raise _LimitError(f"seconds={self.goal.seconds:g} leave no time for another evaluation")

    def _seconds_left(self) -> float | None:
        return None if self.goal.seconds is None else self.goal.seconds - (time.monotonic() - self.begun)

    @property
    def _allowed(self) -> float:
        return self.goal.allowed_drop(self.float_metric)

    @property
    def _met(self) -> bool:
        return self._best is not None and self._steps[self._best[0]].drop <= self._allowed


def _promising(scores: Mapping[str, float]) -> list[str]:
    """The calibrators to evaluate, the best first."""
    # A NaN is worse than any number.
    best_first = sorted(scores, key=lambda name: (math.isnan(scores[name]), -scores[name]))
    enough = scores[best_first[0]] - CALIBRATOR_MARGIN_DB
    others = [name for name in best_first[1:] if scores[name] >= enough]
    return [best_first[0], *others][:MOST_CALIBRATORS]


def _words(method: str) -> str:
    return method.replace("_", " ")
