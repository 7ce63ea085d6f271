"""The way to an accuracy: which INT8 networks are evaluated, in which order, and when that ends."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lq.int8.module import Int8Module
from lq.results.tuning import Tuning, TuningStep
from lq.tuning.builder import Builder, Choice
from lq.tuning.fewest import fewest
from lq.tuning.goal import Goal
from lq.tuning.journal import Journal

_log = logging.getLogger("lq")

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


@dataclass
class Search:
    """Evaluates INT8 networks until one meets a goal, or the goal's limits are reached.

    Layers stay in float before anything is trained: it takes no training data and no one's learning rate, and a
    network that was fine-tuned is another one.

    Args:
        builder: makes the networks.
        evaluate: the metric of a network, as the builder's engine runs it.
        float_metric: the metric of the float model.
        goal: what is to be reached.
        always: methods that every network is made with.
        where_needed: methods that are tried, in this order, where the calibrators alone do not meet the goal; what
            does not make the drop smaller by a tenth is left out again.
        tell: called with each step.
        journal: where steps are written to as they are made; those that it has are not made again.
        begun: when it began, by :func:`time.monotonic`; the goal's seconds count from there.
    """

    builder: Builder
    evaluate: Callable[[nn.Module], float]
    float_metric: float
    goal: Goal
    always: tuple[str, ...] = ()
    where_needed: tuple[str, ...] = ()
    tell: Callable[[TuningStep], None] = lambda step: None
    journal: Journal | None = None
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not math.isfinite(self.float_metric):
            raise ValueError(f"{self.goal.metric_name} of the float model is {self.float_metric}: it must be finite")
        self._steps: list[TuningStep] = []
        self._int8: tuple[int, Int8Module] | None = None
        self._kept_methods: Choice | None = None
        self._reserved = 1 if self.builder.fine_tunes else 0
        if self.journal is not None and self.journal.runtime is not None:
            self.builder.judge.runtime = self.journal.runtime

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
        index, int8 = self._confirmed()
        tuning = Tuning(
            metric_name=self.goal.metric_name,
            float_metric=self.float_metric,
            allowed_drop=self._allowed,
            steps=tuple(self._steps),
            chosen=index,
            ended=ended,
            runtime=self.builder.judge.runtime,
        )
        return tuning, _choice(self._steps[index]), int8

    def _try_all(self, scores: Mapping[str, float]) -> None:
        limit: _LimitError | None = None
        try:
            for name in _promising(scores):
                change = ", ".join([f"calibrator {name}", *map(_words, self.always)])
                if self._meets(Choice(name, self.always), change):
                    return
            best = self._steps[self._best]
            self._kept_methods = _choice(best)
            if self._try_methods(best.drop) or self._try_layers(self._kept_methods):
                return
        except _LimitError as reason:
            if self._met or not self._reserved:
                raise
            limit = reason
        if not self.builder.fine_tunes:
            return
        self._reserved = 0
        self._check_limits()
        chosen = self._kept_methods or replace(_choice(self._steps[self._best]), float_layers=())
        try:
            met = self._meets(replace(chosen, fine_tuned=True), "fine-tuned with fake-quantizers")
        except _LimitError:
            raise
        except Exception as error:  # the user's own code: what was found before it stands
            _log.warning("lq: fine-tuning failed, and is left out: %s: %s", type(error).__name__, error)
            met = False
        if limit is not None and not met:
            raise limit

    def _try_methods(self, drop: float) -> bool:
        """Keep the methods that help; whether one of them is enough."""
        for method in self.where_needed:
            choice = self._kept_methods
            assert choice is not None
            methods = (*choice.methods, method)
            if not self.builder.applies(method):
                continue
            if self._meets(replace(choice, methods=methods), ", ".join(map(_words, methods))):
                return True
            gained = drop - self._steps[-1].drop
            if gained >= WORTH * drop:
                self._kept_methods, drop = replace(choice, methods=methods), self._steps[-1].drop
        return False

    def _try_layers(self, choice: Choice) -> bool:
        """Whether it is met with some layers in float."""
        most = self.goal.max_float_layers
        if most == 0:
            return False
        self._check_limits()
        left = self._seconds_left()
        ranking = self.builder.ranking(choice, None if left is None else SENSITIVITY_SHARE * left)

        @functools.cache
        def meets(layers: tuple[str, ...]) -> bool:
            return self._meets(replace(choice, float_layers=layers), f"{_shown(layers)} in float")

        # One stays in INT8: with all in float there would be no INT8 network.
        candidates = ranking[:-1] if most is None else ranking[: min(most, len(ranking) - 1)]
        return bool(candidates) and fewest(candidates, meets) is not None

    def _meets(self, choice: Choice, change: str) -> bool:
        """Evaluate a network; whether it meets the goal."""
        known = None if self.journal is None else self.journal.step(choice)
        if known is None:
            self._check_limits()
            step, int8 = self._evaluated(choice, change)
            self._write(step)
        else:
            step, int8 = known, None
        self._steps.append(step)
        # The others can be made again: one at a time is kept.
        if self._best == len(self._steps) - 1:
            self._int8 = None if int8 is None else (self._best, int8)
        self.tell(step)
        return step.drop <= self._allowed

    def _evaluated(self, choice: Choice, change: str) -> tuple[TuningStep, Int8Module]:
        begun = time.monotonic()
        int8, network = self.builder.int8(choice)
        with self.builder.surroundings(choice):
            metric = float(self.evaluate(network))
        drop = metric - self.float_metric if self.goal.smallest else self.float_metric - metric
        step = TuningStep(
            change,
            metric,
            math.inf if math.isnan(drop) else drop,
            time.monotonic() - begun,
            choice.calibrator,
            choice.methods,
            choice.float_layers,
            self.builder.judge.latency(int8, network),
            choice.fine_tuned,
        )
        return step, int8

    def _write(self, step: TuningStep) -> None:
        if self.journal is None:
            return
        try:
            self.journal.add(step, self.builder.judge.runtime)
        except OSError as error:
            _log.warning("lq: the steps are not kept, should this be interrupted: %s: %s", self.journal.path, error)
            self.journal = None

    def _confirmed(self) -> tuple[int, Int8Module]:
        """The best step and its network: one of the journal is evaluated again, on the ranges that there are now."""
        while self._int8 is None or self._int8[0] != self._best:
            index = self._best
            step, int8 = self._evaluated(_choice(self._steps[index]), self._steps[index].change)
            self._steps[index] = step
            self._int8 = index, int8
        return self._int8

    @property
    def _best(self) -> int:
        """Index of the best step, the first of equals: meeting the goal counts most, then no training and the fewest
        layers in float, then the metric."""

        def merit(index: int) -> tuple[bool, bool, int, float]:
            step = self._steps[index]
            met = step.drop <= self._allowed
            return met, met and not step.fine_tuned, -len(step.float_layers) if met else 0, -step.drop

        return max(range(len(self._steps)), key=merit)

    def _check_limits(self) -> None:
        if not self._steps:
            return
        if len(self._steps) + 1 + self._reserved >= self.goal.max_evaluations:
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
        return bool(self._steps) and self._steps[self._best].drop <= self._allowed


def _promising(scores: Mapping[str, float]) -> list[str]:
    """The calibrators to evaluate, the best first."""
    # A NaN is worse than any number.
    best_first = sorted(scores, key=lambda name: (math.isnan(scores[name]), -scores[name]))
    enough = scores[best_first[0]] - CALIBRATOR_MARGIN_DB
    others = [name for name in best_first[1:] if scores[name] >= enough]
    return [best_first[0], *others][:MOST_CALIBRATORS]


def _words(method: str) -> str:
    return method.replace("_", " ")


def _shown(layers: Sequence[str]) -> str:
    return ", ".join(layers) if len(layers) <= 2 else f"{len(layers)} layers ({layers[0]} ... {layers[-1]})"


def _choice(step: TuningStep) -> Choice:
    return Choice(step.calibrator, step.methods, step.float_layers, step.fine_tuned)
