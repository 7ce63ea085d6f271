"""Files loaded and dropped again leave the process able to take signals, such as that of a worker that ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import lq
from helpers.quantized import calibrated, noise

pytest.importorskip("openvino", reason="needs OpenVINO")

# Dropped in the order in which they were loaded; Python's handlers run on the stack for signals.
_SCRIPT = """
import gc, signal, sys, torch, lq
taken = []
signal.signal(signal.SIGUSR1, lambda *_: taken.append(1))
models = [lq.load(sys.argv[1], "openvino") for _ in range(3)]
for model in models:
    model(torch.rand(1, 3, 16, 16))
del model
while models:
    del models[0]
    gc.collect()
signal.raise_signal(signal.SIGUSR1)
assert taken == [1]
"""


def test_signals_after_files_were_dropped(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    lq.export(calibrated(network, noise(4)), tmp_path / "int8.onnx")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(tmp_path / "int8.onnx")], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
