"""``lq.quantize(journal=...)``: a search whose process is killed goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq
from helpers.broken_layers import BATCHES, TEST, break_layers, explained, network

BROKEN = ("layer2", "layer5", "layer6")

#: Ends itself as the system does where memory is short, in its seventh evaluation.
KILLED = """
import os, signal, sys
import lq
from helpers.broken_layers import BATCHES, break_layers, explained, network

model = break_layers(network(), ["layer2", "layer5", "layer6"])
metric, calls = explained(model), []

def evaluate(network):
    calls.append(network)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return metric(network)

lq.quantize(model, BATCHES, evaluate, max_drop=8, journal=sys.argv[1], target="x86_avx2")
"""


def search(model: nn.Module, **arguments: Any) -> tuple[lq.Quantized, int]:
    """What it gives, and how often it evaluated."""
    metric, calls = explained(model), []

    def evaluate(network: nn.Module) -> float:
        calls.append(network)
        return metric(network)

    quantized = lq.quantize(model, BATCHES, evaluate, **{"max_drop": 8, "target": "x86_avx2", **arguments})
    return quantized, len(calls)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_after_a_kill_only_the_rest_is_evaluated(tmp_path: Path) -> None:
    journal = tmp_path / "search.json"
    path = [str(Path(__file__).parents[1]), str(Path(lq.__file__).parents[1])]
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{KILLED}", str(journal)]
    assert subprocess.run(run, capture_output=True, timeout=120).returncode == -9
    model = break_layers(network(), BROKEN)
    whole, every = search(model)
    resumed, rest = search(model, journal=journal)
    assert [step.change for step in resumed.tuning.steps] == [step.change for step in whole.tuning.steps]
    assert [step.metric for step in resumed.tuning.steps[:5]] == pytest.approx(
        [step.metric for step in whole.tuning.steps[:5]], abs=1e-3
    )
    assert rest == every - 5  # the float model is evaluated again
    assert torch.equal(resumed.int8(TEST), whole.int8(TEST))
    # All of it is there now: the float model, and the network that is taken.
    again, few = search(model, journal=journal)
    assert few == 2 and again.tuning.float_layers == whole.tuning.float_layers
    assert torch.equal(again.int8(TEST), whole.int8(TEST))


def test_a_network_that_no_longer_meets_it_is_not_taken(tmp_path: Path) -> None:
    journal = tmp_path / "search.json"
    model = break_layers(network(), BROKEN)
    search(model, journal=journal)
    written = json.loads(journal.read_text())
    first = written["steps"][0]
    first["metric"], first["drop"] = 100.0, 0.0  # as if other calibration data had been lucky
    journal.write_text(json.dumps(written))
    quantized, _ = search(model, journal=journal)
    assert quantized.tuning.steps[0].drop > 8
    assert explained(model)(quantized.int8) == pytest.approx(quantized.tuning.step.metric)


def test_steps_of_another_search_are_not_taken(tmp_path: Path) -> None:
    journal = tmp_path / "search.json"
    search(break_layers(network(), BROKEN), journal=journal)
    other = break_layers(network(), BROKEN[:1])
    quantized, calls = search(other, journal=journal)
    assert calls == quantized.tuning.evaluations and quantized.tuning.float_layers == ("layer2.conv2",)


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    for text in ("not json", '{"mine": 1}', "[]"):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match=r"mine.json' holds no steps of a search, and would be replaced"):
            search(network(), journal=tmp_path / "mine.json")
        assert (tmp_path / "mine.json").read_text() == text


def test_a_folder_that_cannot_be_written_to_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    quantized, _ = search(network(), journal=tmp_path / "file" / "search.json")
    assert quantized.tuning.met and "the steps are not kept" in caplog.text


def test_another_file_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    def evaluate(network: nn.Module) -> float:
        raise AssertionError("too late")

    for path in (tmp_path, tmp_path / "notes.json"):
        if path != tmp_path:
            path.write_text("{}")
        with pytest.raises(ValueError, match=r"journal='.*' holds no steps of a search, and would be replaced"):
            lq.quantize(network(), BATCHES, evaluate, max_drop=8, journal=path)


def test_steps_of_another_machine_or_version_are_made_again(tmp_path: Path) -> None:
    model, path = break_layers(network(), BROKEN[:1]), tmp_path / "steps.json"
    expected, evaluations = search(model, journal=path)
    written = json.loads(path.read_text())
    for change in ({"steps": [{"unknown": 1}]}, {"runtime": "tpu"}, {"steps": None}):
        path.write_text(json.dumps(written | change))
        again, as_often = search(model, journal=path)
        assert as_often == evaluations and again.tuning.float_layers == expected.tuning.float_layers, change
