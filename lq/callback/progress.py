"""The progress bar over calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def calibration_progress(batches: Iterable[Any], total: int, enabled: bool) -> Iterator[Any]:
    """The first ``total`` of ``batches``, with a bar that shows the time left."""
    columns = (
        TextColumn("Calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task("calibrate", total=total)
        for _, batch in zip(range(total), batches, strict=False):
            yield batch
            progress.advance(task)
