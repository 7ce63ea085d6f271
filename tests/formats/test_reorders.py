"""Weights are laid out once, for the sizes that kernels meet: no call re-orders them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.quantized import noise
from lq.formats.aoti.write import linear_for_pointwise, without_idle_clamps
from lq.graph.qdq import lookup
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


class Bottlenecks(nn.Module):
    """1x1 convolutions over many positions, whose layout depends on the batch; a residual add in the kernel of each
    size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 128, 3, stride=2, padding=1)
        self.down, self.reduce = nn.Conv2d(128, 512, 1), nn.Conv2d(128, 64, 1)
        self.spatial, self.expand = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 512, 1)
        self.skip, self.strided = nn.Conv2d(512, 256, 1, stride=2), nn.Conv2d(512, 256, 3, stride=2, padding=1)
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.expand(F.relu6(self.spatial(self.reduce(x)))) + self.down(x))
        x = F.relu(self.strided(x) + self.skip(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "format"),
    [
        (Wide, "pt2"),
        (Bottlenecks, "pt2"),
        (Bottlenecks, "aoti"),
        pytest.param(Wide, "aoti", marks=pytest.mark.thorough),
    ],
)
def test_the_second_call_re_orders_no_weights(network: type[nn.Module], format: lq.Format, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lq.calibrate(lq.prepare(network().eval(), X, target="x86_avx2"), [X])
    lq.export(model, tmp_path / "int8.pt2", format=format)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "int8.pt2"), "aoti" if format == "aoti" else "torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    executed = [line.split(",") for line in done.stdout.splitlines() if ",exec," in line]
    kernels = [line for line in executed if line[5] in ("convolution", "matmul", "inner_product")]
    layers = sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in model.modules())
    assert len(kernels) == 8 * layers and all("src:u8" in line[8] for line in kernels)
    assert [line for line in executed if line[5] == "reorder" and "src:s8" in line[8]] == []


@pytest.mark.parametrize("network", [Wide, Bottlenecks])
@pytest.mark.parametrize("target", ["x86", "tensorrt"])
def test_pointwise_convolutions_are_linear_layers(network: type[nn.Module], target: str) -> None:
    torch.manual_seed(0)
    int8 = lq.convert(lq.calibrate(lq.prepare(network().eval(), X, target=target), [X]))
    linear = linear_for_pointwise(int8)
    assert linear is not int8
    convolutions = [node for node in linear.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    weights = [lookup(linear, str(node.args[1].args[0].target)) for node in convolutions]
    assert weights and all(weight.shape[2:] != (1, 1) for weight in weights)
    int8.execution = linear.execution = "simulation"
    for x in (X, X[:1]):
        expected = int8(x)
        # The float sums of a simulation depend on their order, and with them some roundings.
        assert (linear(x) - expected).norm() < 0.01 * expected.norm()
    plain = lq.convert(lq.calibrate(lq.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), X), [X]))
    assert linear_for_pointwise(plain) is plain


@pytest.mark.parametrize(
    "clamp",
    [
        (nn.ReLU(),),
        (nn.ReLU6(),),
        (nn.Hardtanh(-1, 1),),
        (nn.Hardtanh(-1e-3, 1e-3),),
        (nn.ReLU(), nn.Hardtanh(-1, 0.3)),
        (nn.Identity(),),
    ],
)
@pytest.mark.parametrize("target", ["x86", "xnnpack", "tensorrt"])
def test_clamps_that_the_grid_implies_are_left_out(clamp: tuple[nn.Module, ...], target: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), *copy.deepcopy(clamp), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, 4)]
    network = nn.Sequential(*layers).eval()
    int8 = lq.convert(lq.calibrate(lq.prepare(network, X, target=target), [X]))
    without = without_idle_clamps(int8)
    if isinstance(clamp[0], nn.ReLU | nn.ReLU6) and len(clamp) == 1:
        assert (without is int8) == (target == "tensorrt")  # whose grids reach below zero
    int8.execution = without.execution = "simulation"
    for factor in (1, 100):
        assert torch.equal(without(factor * X), int8(factor * X))
