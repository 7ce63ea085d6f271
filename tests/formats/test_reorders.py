"""Weights are laid out once, for the sizes that kernels meet: no call re-orders them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.quantized import noise
from lq.util.cpu import has_onednn_int8

pytestmark = pytest.mark.skipif(not has_onednn_int8(), reason="no oneDNN INT8 kernels on this machine")

X = noise(4, seed=1)

SCRIPT = """
import sys, torch, lq
network = lq.load(*sys.argv[1:])
for threads in (1, 2):
    torch.set_num_threads(threads)
    for size in (1, 2, 8, 1):
        x = torch.randn(size, 3, 16, 16)
        network(x)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            network(x)
"""


class Wide(nn.Module):
    """Wide layers on few positions, whose layout depends on the sizes; signed activations, with a zero point."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 256, 3, stride=4, padding=1)
        self.a = nn.Conv2d(256, 256, 3, stride=2, padding=1)
        self.down = nn.Conv2d(256, 512, 1, stride=2)
        self.b, self.c = nn.Conv2d(512, 512, 1), nn.Conv2d(512, 512, 3, padding=1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.a(F.relu(self.stem(x))))  # 4x4, 2x2, 1x1
        x = F.relu(self.b(x) + x)
        return self.fc(self.c(x).flatten(1))


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_the_second_call_re_orders_no_weights(format: lq.Format, tmp_path: Path) -> None:
    model = lq.calibrate(lq.prepare(Wide().eval(), X, target="x86_avx2"), [X])
    lq.export(model, tmp_path / "int8.pt2", format=format)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "int8.pt2"), "aoti" if format == "aoti" else "torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    executed = [line.split(",") for line in done.stdout.splitlines() if ",exec," in line]
    kinds = [line[5] for line in executed]
    assert len([kind for kind in kinds if kind in ("convolution", "matmul", "inner_product")]) == 8 * 6
    assert [line for line in executed if line[5] == "reorder" and "src:s8" in line[8]] == []
