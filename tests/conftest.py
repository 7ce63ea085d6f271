from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core, each with the processes it starts on one thread: with more they would wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def same_weights_every_time() -> None:
    """The networks of a test are the same whichever tests ran before it."""
    torch.manual_seed(0)
