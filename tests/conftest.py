from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_weights_every_time() -> None:
    """The networks of a test are the same whichever tests ran before it."""
    torch.manual_seed(0)
