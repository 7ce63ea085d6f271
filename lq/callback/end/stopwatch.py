"""What the time at the end of a fit goes into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_info


class Stopwatch:
    """Times the stages of the end of a fit; one that comes again is added up.

    Attributes:
        seconds: of each stage by name, in the order in which they first came.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside, also where it fails."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Let a stage have taken so many seconds more."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def tell(self) -> None:
        """Say in the log what took how long."""
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        rank_zero_info(f"lq: the end of fit took {sum(self.seconds.values()):.1f} s: {stages}")
