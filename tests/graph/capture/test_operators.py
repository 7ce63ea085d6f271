"""Operators in company: those that crashed at conversion, at the first INT8 forward, or after a file was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import TARGET, as_tensors, check, check_program, through_file
from helpers.networks import randomize_batch_norm
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import sqnr

X = noise(8, 12, seed=1)


class SqueezeExcite(nn.Module):
    """Gates a tensor; the block lends it its ReLU."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.reduce, self.relu, self.expand = nn.Conv2d(8, 4, 1), relu, nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(self.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class SharedReluBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.a, self.b, self.gate = conv(8, 8), conv(8, 8), SqueezeExcite(self.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.gate(self.b(self.relu(self.a(x)))) + x)


def _max_pool1d(self: Any, x: Tensor) -> Tensor:
    x = F.max_pool1d(F.relu(self.a(x)).flatten(2), 3, stride=2)
    return self.one(x).mean(2)


def _max_pool3d(self: Any, x: Tensor) -> Tensor:
    x = F.max_pool3d(F.relu(self.a(x)), (2, 3, 3), stride=(2, 2, 2))
    return self.narrow(x).mean((2, 3))


def _adaptive_max_pool2d(self: Any, x: Tensor) -> Tensor:
    return self.b(F.adaptive_max_pool2d(F.relu(self.a(x)), (5, 4))).mean((2, 3))


def _adaptive_max_pool1d(self: Any, x: Tensor) -> Tensor:
    return self.one(F.adaptive_max_pool1d(F.relu(self.a(x)).flatten(2), 7)).mean(2)


def _pool_with_indices(self: Any, x: Tensor) -> Tensor:
    x, indices = F.max_pool2d(F.relu(self.a(x)), 2, return_indices=True)
    return self.b(F.max_unpool2d(x, indices, 2)).mean((2, 3))


def _reductions_between(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    best, _ = x.max(dim=3, keepdim=True)
    return self.b(best.expand_as(x)).amax((2, 3)) + self.b(x.amin(2, keepdim=True) + x).mean((2, 3))


def _cat_of_one(self: Any, x: Tensor) -> Tensor:
    return self.b(torch.cat([F.relu(self.a(x))], 1)).mean((2, 3))


def _stack_and_unbind(self: Any, x: Tensor) -> Tensor:
    first, second = torch.stack([F.relu(self.a(x)), self.skip(x)]).unbind(0)
    return (self.b(first) + second).mean((2, 3))


FORWARDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "max_pool1d": (_max_pool1d, ("a", "one")),
    "max_pool3d": (_max_pool3d, ("a", "narrow")),
    "adaptive_max_pool2d": (_adaptive_max_pool2d, ("a", "b")),
    "adaptive_max_pool1d": (_adaptive_max_pool1d, ("a", "one")),
    "pool with indices": (_pool_with_indices, ("a", "b")),
    "reductions between": (_reductions_between, ("a", "b")),
    "cat of one": (_cat_of_one, ("a", "b")),
    "stack and unbind": (_stack_and_unbind, ("a", "b", "skip")),
}


def network(name: str) -> nn.Module:
    forward, layers = FORWARDS[name]
    every = {
        "a": conv(3, 8),
        "b": conv(8, 8),
        "skip": conv(3, 8, 1),
        "one": nn.Conv1d(8, 8, 3),
        "narrow": conv(4, 8),
    }
    return Forward(forward, **{layer: every[layer] for layer in layers})


@pytest.mark.parametrize("name", FORWARDS)
def test_operators(name: str) -> None:
    check(network(name), X)


@pytest.mark.parametrize("name", FORWARDS)
def test_operators_after_a_program(name: str, tmp_path: Path) -> None:
    check_program(network(name), X, tmp_path / "int8.pt2")


def test_a_relu_shared_with_squeeze_and_excitation() -> None:
    blocks = (SharedReluBlock(), SharedReluBlock())
    check(nn.Sequential(conv(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)), X)


def test_one_relu_for_the_whole_network() -> None:
    relu = nn.ReLU(inplace=True)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = (conv(3, 8), relu, conv(8, 8), nn.BatchNorm2d(8), relu, SqueezeExcite(relu), conv(8, 8), relu, *pool)
    check(randomize_batch_norm(nn.Sequential(*layers)), X)


def _padded(mode: str, layers: int = 1) -> nn.Module:
    padded = [nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode=mode) for _ in range(layers)]
    return nn.Sequential(conv(3, 8), nn.ReLU(), *padded, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def _twice() -> nn.Module:
    again = conv(8, 8)
    layers = (conv(3, 8), nn.ReLU(), again, nn.ReLU(), again, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32, 10))


FILES = {
    "layer twice": _twice,
    "circular": lambda: _padded("circular"),
    "circular twice": lambda: _padded("circular", 2),
    "reflect": lambda: _padded("reflect"),
    "replicate": lambda: _padded("replicate"),
}


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.in_turns("ending")
def test_files(name: str, ending: str, tmp_path: Path) -> None:
    model = FILES[name]().eval()
    expected = model(X)
    lq.calibrate(lq.prepare(model, X, target=TARGET), [X])
    loaded = through_file(model, tmp_path / f"int8.{ending}", "auto" if ending == "pt2" else "onnxruntime")
    assert sqnr(as_tensors(loaded(X)), expected) > 20
    assert sqnr(as_tensors(loaded(X[:1])), expected[:1]) > 20
