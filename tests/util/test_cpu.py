"""What the CPU's kernels can do, as oneDNN is told and not as the CPU is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from helpers.networks import Residual, randomize_batch_norm
from helpers.processes import finish, start
from helpers.quantized import quantized
from lq.util.cpu import cpu_name, has_onednn_int8, has_vnni


def convert_and_run(variable: str, isa: str, path: Path) -> None:
    """In a process of its own, whose oneDNN has computed nothing yet: it reads the variable once."""
    os.environ[variable] = isa
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16) + 5  # one sign: nothing cancels in the sums
    int8 = quantized(randomize_batch_norm(Residual()), x, target="x86")
    ran = int8(x)
    int8.execution = "simulation"
    simulated = int8(x)
    assert has_vnni() == ("no VNNI" not in cpu_name())
    difference = float((ran - simulated).abs().max() / simulated.abs().max())
    path.write_text(json.dumps({"vnni": has_vnni(), "difference": difference}))


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
def test_kernels_without_vnni_are_given_weights_that_fit(variable: str, isa: str, tmp_path: Path) -> None:
    process = start(convert_and_run, variable, isa, tmp_path / "found.json", output=tmp_path / "output")
    finish(process, tmp_path / "output")
    found = json.loads((tmp_path / "found.json").read_text())
    expected = {"AVX512_CORE_VNNI": has_vnni(), "DEFAULT": has_vnni()}.get(isa, False)
    assert found["vnni"] == expected
    # 7 bits are two of 127 steps away at most; sums that saturate are 13 % off.
    assert found["difference"] < 0.05
