"""A distributed fit: every process ends with the same INT8 model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lq
from helpers.classifiers import images
from helpers.scripts import launched_fit

TESTS = Path(__file__).parents[1]


@pytest.mark.support("Several processes", '`strategy="ddp"`, processes started by Lightning')
def test_ptq_with_ddp(tmp_path: Path) -> None:
    script = launched_fit.__file__
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["logits"] for rank in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(lq.load(tmp_path / "int8" / "int8.pt2")(images(16, seed=1)[0]), first)
