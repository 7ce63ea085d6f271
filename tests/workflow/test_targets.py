"""A model that is prepared for one target and converted for another."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.networks import randomize_batch_norm
from helpers.quantized import noise
from lq.schemes.targets import TARGETS
from lq.workflow.prepare import Mode

X = noise(4, seed=1)


class Dense(nn.Module):
    """Features that only batch norms read, some of them joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 3)
        self.norm_a, self.norm_b = nn.BatchNorm2d(8), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.stem(x), 2)
        y = self.a(F.relu(self.norm_a(x)))
        return self.b(F.relu(self.norm_b(torch.cat([x, y], 1)))).mean((2, 3))


@pytest.mark.parametrize("trained_for", TARGETS)
@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_converted_for_another_target(mode: Mode, trained_for: str) -> None:
    model = randomize_batch_norm(Dense()).eval()
    expected = model(X).detach()
    lq.prepare(model, X[:2], target=trained_for, mode=mode)
    if mode == "ptq":
        lq.calibrate(model, [X])
    else:
        model.train()(X)  # of which the statistics are changed
        model.eval()
        with torch.no_grad():
            expected = lq.unprepare(copy.deepcopy(model))(X)
    for target in TARGETS.values():
        # Of what lies between convolutions, training watches what its target rounds.
        if mode == "qat" and not {*target.operators} <= {*TARGETS[trained_for].operators}:
            with pytest.raises(ValueError, match=f"which training for target='{trained_for}' did not watch"):
                lq.convert(copy.deepcopy(model), target)
            continue
        int8 = lq.convert(copy.deepcopy(model), target)
        assert (int8(X) - expected).norm() < 0.05 * expected.norm(), target


class Joined(nn.Module):
    """What is computed of a convolution's output in some way is joined to it before a batch norm."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.function = function
        self.stem, self.norm, self.conv = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8 + channels),
            nn.Conv2d(8 + channels, 4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.conv(F.relu(self.norm(torch.cat([x, self.function(x)], 1)))).mean((2, 3))


@pytest.mark.parametrize("prepared_for", TARGETS)
@pytest.mark.parametrize(
    ("function", "channels"),
    [
        pytest.param(lambda x: x.max(1, keepdim=True)[0], 1, id="item of what a call returns"),
        pytest.param(lambda x: x > 0, 8, id="mask"),
        pytest.param(F.gelu, 8, id="no kernel"),
        pytest.param(lambda x: x.chunk(2, 1)[1], 4, id="some of it"),
    ],
)
def test_parts_of_any_kind(function: Callable[[Tensor], Tensor], channels: int, prepared_for: str) -> None:
    """Not each of them can be rounded; that is no error, whichever target it is."""
    model = randomize_batch_norm(Joined(function, channels)).eval()
    expected = model(X).detach()
    lq.calibrate(lq.prepare(model, X[:2], target=prepared_for), [X])
    for target in TARGETS.values():
        int8 = lq.convert(copy.deepcopy(model), target)
        assert (int8(X) - expected).norm() < 0.05 * expected.norm(), target
