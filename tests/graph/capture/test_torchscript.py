"""TorchScript modules in a network stay as they are; the layers before and after them are INT8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.quantized import TARGET, calibrated, noise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) + x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_they_return_is_rounded_by_its_readers(how: str) -> None:
    torch.manual_seed(0)
    x = noise(4)
    inner = Block().eval()
    block = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, torch.randn(4, 8, 16, 16))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), block, nn.Conv2d(8, 4, 3)).eval()
    expected = model(x).detach()
    int8 = lq.convert(calibrated(model, x, target=TARGET))
    assert (int8(x) - expected).norm() < 0.03 * expected.norm()
    report = lq.report(int8)
    assert [layer.name for layer in report.int8_layers] == ["0", "3"]
    assert ["TorchScript" in layer.reason for layer in report.float_layers] == [True]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_block_stays_in_its_mode() -> None:
    """What TorchScript keeps of a module lies outside of Python."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(inner), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 16, 16)
    expected = network(x)
    prepared = lq.prepare(network, x)
    assert not any(part.training for part in prepared.modules())
    assert torch.equal(prepared(x), expected)
