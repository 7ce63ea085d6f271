"""A contender's turns: calls in a row that are timed, after calls that are not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: A turn lasts about so long, seconds.
TURN = 0.05

#: Untimed calls that a turn opens with, for the caches belonged to another; a call that fills a turn needs none.
_REWARM = 2

#: Untimed calls before the first turn, while they have taken less than so many seconds: compilers and kernel caches are
#: busy with the first ones.
_WARMUP, _WARMUP_SECONDS = 3, 1.0

#: Calls of one turn at most, and where each of them comes after a sleep.
_MOST, _MOST_AFTER_SLEEP = 100, 10

#: Between turns, seconds: thread pools go on spinning for a while after their last task.
PAUSE = 0.01


class Turns:
    """Times calls of one contender, a turn at a time, so that others can have theirs between.

    Args:
        call: a call of it; warmed up here.
        sleep: seconds before each timed call: the threads of a server that waits for requests have gone to sleep.
        length: seconds that a turn lasts, about.
    """

    def __init__(self, call: Callable[[], Any], sleep: float = 0.0, length: float = TURN) -> None:
        self._call = call
        self._sleep = sleep
        begun = time.perf_counter()
        for index in range(_WARMUP):
            if index and time.perf_counter() - begun > _WARMUP_SECONDS:
                break
            call()
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        self._calls = max(1, min(_MOST_AFTER_SLEEP if sleep else _MOST, round(length / (elapsed + sleep))))
        self._rewarm = _REWARM if elapsed < length else 0

    def turn(self) -> list[float]:
        """Seconds of each call of a turn."""
        times = []
        for index in range(self._rewarm + self._calls):
            is_timed = index >= self._rewarm
            if is_timed and self._sleep:
                time.sleep(self._sleep)
            start = time.perf_counter()
            self._call()
            if is_timed:
                times.append(time.perf_counter() - start)
        return times
