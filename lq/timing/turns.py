"""A contender's turns: timed calls in a row, after untimed ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: About how long a turn lasts, seconds.
TURN = 0.05

#: Untimed calls at the start of a turn, to refill the caches; a call that fills a turn needs none.
_REWARM = 2

#: Untimed calls before the first turn, as long as they have taken less than so many seconds: the first ones keep
#: compilers and kernel caches busy.
_WARMUP, _WARMUP_SECONDS = 3, 1.0

#: Most calls of one turn, and the same where each call comes after a sleep.
_MOST, _MOST_AFTER_SLEEP = 100, 10

#: Pause between turns, seconds: thread pools keep spinning for a while after their last task.
PAUSE = 0.01


class Turns:
    """Times calls of one contender, a turn at a time, so that others can have theirs in between.

    Args:
        call: a call of it; warmed up here.
        sleep: seconds before each timed call: in a server that waits for requests, threads have gone to sleep.
        length: about how many seconds a turn lasts.
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
