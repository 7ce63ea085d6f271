"""What the CPU's kernels can do, as oneDNN is told and not as the CPU is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lq.util.cpu import has_onednn_int8, has_vnni

SCRIPT = """
import torch, lq
from helpers.networks import Residual, randomize_batch_norm
from lq.util.cpu import cpu_name, has_vnni
torch.manual_seed(0)
x = torch.randn(8, 3, 16, 16) + 5  # one sign: nothing cancels in the sums
model = randomize_batch_norm(Residual()).eval()
lq.calibrate(lq.prepare(model, x, target="x86"), [x])
int8 = lq.convert(model)
ran = int8(x)
int8.execution = "simulation"
simulated = int8(x)
assert has_vnni() == ("no VNNI" not in cpu_name())
print(int(has_vnni()), float((ran - simulated).abs().max() / simulated.abs().max()))
"""


@pytest.mark.skipif(not has_onednn_int8(), reason="no oneDNN INT8 kernels on this machine")
@pytest.mark.parametrize(
    ("variable", "isa"),
    [
        ("ONEDNN_MAX_CPU_ISA", "SSE41"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI"),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT"),
        ("DNNL_MAX_CPU_ISA", "AVX2"),  # its old name
    ],
)
def test_kernels_without_vnni_are_given_weights_that_fit(variable: str, isa: str) -> None:
    environment = {
        **os.environ,
        variable: isa,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found, difference = done.stdout.split()
    expected = {"AVX512_CORE_VNNI": has_vnni(), "DEFAULT": has_vnni()}.get(isa, False)
    assert bool(int(found)) == expected
    # 7 bits are two of 127 steps away at most; sums that saturate are 13 % off.
    assert float(difference) < 0.05
