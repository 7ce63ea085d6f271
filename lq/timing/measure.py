"""How long a forward takes, for several contenders side by side."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lq.timing.turns import PAUSE, TURN, Turns

#: About how long to measure, seconds.
SECONDS = 2.0

#: Least number of turns of each contender, however long they take.
_FEWEST = 3


@dataclass(frozen=True)
class Timing:
    """Wall time of one forward.

    Args:
        p50_ms: median, milliseconds.
        p95_ms: 95th percentile, milliseconds.
        throughput: samples per second at the median.
    """

    p50_ms: float
    p95_ms: float
    throughput: float

    @classmethod
    def of(cls, seconds: Sequence[float], batch_size: int) -> Timing:
        """Of two or more calls with ``batch_size`` samples each."""
        p50 = statistics.median(seconds)
        return cls(p50 * 1e3, statistics.quantiles(seconds, n=20)[-1] * 1e3, batch_size / p50)


@torch.no_grad()
def measure(
    contenders: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, Any],
    batch_size: int,
    *,
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Time each contender on the same inputs, in this process, taking turns, so that noise disturbs all alike.

    A turn is some calls in a row, the first ones untimed, and a pause, in which the threads of one engine come to rest
    before another one's run.

    Args:
        contenders: callables by name.
        inputs: their arguments, by name.
        batch_size: samples in one call.
        seconds: about how long to measure in total, :data:`SECONDS` by default; each has at least 3 turns.
    """
    seconds = SECONDS if seconds is None else seconds
    length = min(TURN, seconds / (_FEWEST * max(1, len(contenders))))
    turns = {name: Turns(partial(run, **inputs), length=length) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, generator = list(contenders), random.Random(0)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < _FEWEST or time.perf_counter() < deadline:
        generator.shuffle(order)
        for name in order:
            times[name] += turns[name].turn()
            time.sleep(PAUSE)
        rounds += 1
    return {name: Timing.of(durations, batch_size) for name, durations in times.items()}
