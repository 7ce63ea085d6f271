"""A network whose layers lie in modules, and its data."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

import lq
from helpers.networks import randomize_batch_norm
from lq.numerics.calibrators import Calibrator
from lq.numerics.quantizer import Quantizer, WeightQuantizer


class Block(nn.Module):
    """Two convolutions, and the input added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def network(seed: int = 0) -> nn.Module:
    """For images ``(N, 3, 8, 8)``: activations ``x``, ``stem.1``, ``layer1.relu``, ``layer2.relu`` ... and weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            layer1=Block(),
            layer2=Block(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(8, 10),
        )
        return randomize_batch_norm(nn.Sequential(layers)).eval()


def images(batches: int = 4, samples: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches of images, each wider or narrower than those before it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 3, 8, 8, generator=generator) * (1 + (i * 7) % 5 / 2) for i in range(batches)]


#: What these networks are prepared with and calibrated on.
BATCHES = images()


@functools.cache
def _prepared(observer: str | None, target: str) -> nn.Module:
    return lq.prepare(network(), BATCHES[0], observer=observer, target=target)


def prepared(observer: str | None = None, target: str = "x86") -> nn.Module:
    """A copy of a network that was prepared once."""
    return copy.deepcopy(_prepared(observer, target))


def calibrated(
    calibrator: str | Calibrator | None = None, observer: str | None = None, target: str = "x86"
) -> nn.Module:
    return lq.calibrate(prepared(observer, target), BATCHES, calibrator=calibrator)


def activations(model: nn.Module) -> dict[str, Quantizer]:
    return {name: q for name, q in lq.quantizers(model).items() if not isinstance(q, WeightQuantizer)}


def found_ranges(model: nn.Module) -> dict[str, tuple[float, int, str]]:
    """Scale, zero point and calibrator of each activation, to be compared bit for bit."""
    return {name: (q.scale.item(), q.zero_point.item(), str(q.calibrator)) for name, q in activations(model).items()}
