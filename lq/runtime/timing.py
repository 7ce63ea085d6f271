"""How long a forward takes, of several contenders side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: About how long to measure, seconds.
SECONDS = 2.0


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


@torch.no_grad()
def measure(
    contenders: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, Any],
    batch_size: int,
    *,
    seconds: float | None = None,
    warmup: int = 5,
) -> dict[str, Timing]:
    """Time each contender on the same inputs, taking turns, so that a noisy neighbour disturbs all alike.

    Args:
        contenders: callables by name.
        inputs: their arguments, by name.
        batch_size: samples in one call.
        seconds: about how long to measure in all, :data:`SECONDS` by default; at least 3 rounds are made.
        warmup: calls of each contender before the clock runs; fewer, but one at least, where they take long.
    """
    seconds = SECONDS if seconds is None else seconds
    for contender in contenders.values():
        deadline = time.perf_counter() + seconds / 4
        for call in range(warmup):
            if call and time.perf_counter() > deadline:
                break
            contender(**inputs)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or (time.perf_counter() < deadline and rounds < 500):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender(**inputs)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    timings = {}
    for name, values in times.items():
        p50 = statistics.median(values)
        p95 = statistics.quantiles(values, n=20)[-1]
        timings[name] = Timing(p50 * 1e3, p95 * 1e3, batch_size / p50)
    return timings
