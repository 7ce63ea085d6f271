from __future__ import annotations

import pytest

from lq.callback.end import conversion


@pytest.fixture(autouse=True)
def small_timed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throughput is timed with two images: these networks take a second for a usual batch."""
    monkeypatch.setattr(conversion, "BATCH_SIZE", 2)
