"""Several processes, each with its share of the data, end with the ranges of one that has all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from helpers.scripts import distributed_calibration
from helpers.scripts.distributed_calibration import NUMBERS_OF_AUTO, NUMBERS_OF_BATCHES, OBSERVERS
from lq.numerics.calibrators import CALIBRATORS

Found = dict[str, Any]
NAMES = [f"{number} histogram {name}" for number in NUMBERS_OF_BATCHES for name in CALIBRATORS]
NAMES += [f"{number} minmax minmax" for number in NUMBERS_OF_BATCHES]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, list[Found]]:
    """What one process found alone, and what each of two found together."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GLOO_SOCKET_IFNAME": "lo"}
    script = str(distributed_calibration.__file__)
    commands = [[sys.executable, script, str(rank), "2", str(folder)] for rank in range(2)]
    outputs = [(folder / f"{rank}.txt").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        for command, output in zip(commands, outputs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=180) for process in processes]
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            process.wait()
            output.close()
    texts = [(folder / f"{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], texts
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return results[0]["alone"], [result["together"] for result in results]


def test_all_cases_ran(found: tuple[Found, list[Found]]) -> None:
    alone, together = found
    for results in (alone, *together):
        assert results.keys() >= set(NAMES)
        assert all(len(results[name]) == 10 for name in NAMES)
        assert len({str(results[f"5 histogram {name}"]) for name in CALIBRATORS}) == len(CALIBRATORS)


@pytest.mark.parametrize("name", NAMES)
def test_ranges_are_those_of_one_process(found: tuple[Found, list[Found]], name: str) -> None:
    alone, together = found
    assert together[0][name] == together[1][name] == alone[name]


@pytest.mark.parametrize("number", NUMBERS_OF_BATCHES)
def test_statistics_are_those_of_one_process(found: tuple[Found, list[Found]], number: int) -> None:
    # Whole: counts, bins, and the batches in the order in which they were dealt out.
    alone, together = found
    name = f"{number} histogram"
    assert together[0][name] == together[1][name] == alone[name]
    assert len(alone[name]) == 10


@pytest.mark.parametrize("number", NUMBERS_OF_BATCHES)
def test_averages_that_observers_keep_are_averaged(found: tuple[Found, list[Found]], number: int) -> None:
    alone, together = found
    name = f"{number} moving_average moving_average"
    assert together[0][name] == together[1][name]
    if number == 1:  # the average of one process that has data
        assert together[0][name] == alone[name]
    else:
        assert together[0][name] != alone[name]


@pytest.mark.parametrize("number", NUMBERS_OF_AUTO)
def test_auto_chooses_the_same_everywhere(found: tuple[Found, list[Found]], number: int) -> None:
    _, together = found
    name = f"auto {number}"
    assert together[0][name] == together[1][name]
    assert len({calibrator for _, _, calibrator in together[0][name].values()}) == 1


def test_limits_are_each_processs_own(found: tuple[Found, list[Found]]) -> None:
    alone, together = found
    assert together[0]["limited"] == together[1]["limited"] == alone["limited"]


@pytest.mark.parametrize("index", range(len(OBSERVERS)))
def test_what_is_wrong_is_said_everywhere(found: tuple[Found, list[Found]], index: int) -> None:
    alone, together = found
    for results in (alone, *together):
        assert "a NaN or an infinity at 'input'" in results["a NaN"][index]
        assert "no calibration data reached 'input'" in results["no data"][index]
