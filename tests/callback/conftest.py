from __future__ import annotations

from pathlib import Path

import pytest

#: What Lightning says of these small runs, and would not say of real ones.
_EXPECTED = (
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`",
    r"ignore:.*You're resuming from a checkpoint that ended before the epoch ended",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in _EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(warning))
