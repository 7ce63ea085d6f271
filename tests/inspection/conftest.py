from __future__ import annotations

import pytest
from inspection.finished import FinishedRun, finished_run


@pytest.fixture(scope="session")
def qat_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished QAT run, in which one layer's input range was cut to a tenth."""
    return finished_run(tmp_path_factory.mktemp("qat"), "qat")


@pytest.fixture(scope="session")
def ptq_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished PTQ run, likewise, with other loggers beside TensorBoard."""
    return finished_run(tmp_path_factory.mktemp("ptq"), "ptq")
