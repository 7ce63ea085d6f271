from __future__ import annotations

import os
import zlib

import hypothesis
import pytest
import torch

from helpers.finished_run import FinishedRun, finished_run
from lq.callback import outputs
from lq.schemes import targets
from lq.timing import measure as timing

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("lq", deadline=None)
hypothesis.settings.load_profile("lq")

# Every fit would write and run an ONNX file more; `callback/end/test_engines.py` has a fit with nothing but defaults.
outputs.UNASKED = ()

# What is computed here is small: on busy cores, threads would wait for each other for most of the time. The processes
# that tests start have one, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run the cases that are marked as thorough, too")
    parser.addoption("--kills", type=int, default=2, help="of each chain of runs in test_kills (default %(default)s)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        left_out = {item for item in items if item.get_closest_marker("thorough") or not _is_its_turn(item)}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _is_its_turn(item: pytest.Item) -> bool:
    """Whether the parameter that ``in_turns`` names has the value whose turn it is among the test's other cases.

    Tests of one module begin with different values, so that where it is a test's only parameter all of them are run.
    """
    marker = item.get_closest_marker("in_turns")
    if marker is None:
        return True
    (name,) = marker.args
    values = next((len(mark.args[1]) for mark in item.iter_markers("parametrize") if mark.args[0] == name), 1)
    indices = item.callspec.indices if values > 1 else {}  # type: ignore[attr-defined]
    first = zlib.crc32(item.originalname.encode()) if len(indices) == 1 else 0  # type: ignore[attr-defined]
    turn = first + sum(index for parameter, index in indices.items() if parameter != name)
    return bool(indices.get(name, 0) == turn % values)


@pytest.fixture
def no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of large networks do not go the way to INT8 twice; the rehearsal has tests of its own."""
    monkeypatch.setattr("lq.callback.callback.rehearse", lambda *args: None)


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at how fast anything is; that fits time their models is tested with a few calls as well."""
    monkeypatch.setattr(timing, "SECONDS", 0.05)


@pytest.fixture(autouse=True)
def same_target_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``target="auto"`` stands for the same whatever the CPU; what else it may stand for is tested by itself."""
    monkeypatch.setattr(targets, "is_x86", lambda: True)
    monkeypatch.setattr(targets, "has_vnni", lambda: True)


@pytest.fixture(autouse=True)
def same_weights_every_time() -> None:
    """The networks of a test are the same whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def qat_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished QAT run, in which one layer's input range was cut to a tenth."""
    return finished_run(tmp_path_factory.mktemp("qat"), "qat")


@pytest.fixture(scope="session")
def ptq_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished PTQ run, likewise, with other loggers beside TensorBoard."""
    return finished_run(tmp_path_factory.mktemp("ptq"), "ptq")
