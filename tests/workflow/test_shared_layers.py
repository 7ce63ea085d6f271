"""Layers that several networks have in common: an activation that is a default argument or an attribute of a class."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.quantized import noise

X = noise(4, seed=1)


class Block(nn.Module):
    activation = nn.ReLU()

    def __init__(self, channels: int, last: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3)
        self.act, self.last = self.activation, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.conv(x)))  # type: ignore[no-any-return]


def network(last: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Block(3, last), Block(8, last), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def error(model: nn.Module, expected: Tensor, x: Tensor) -> float:
    return float((model(x) - expected).detach().norm() / expected.norm())


@pytest.mark.parametrize("last", [nn.MaxPool2d(2), nn.SiLU()])
def test_networks_that_share_layers_do_not_see_each_other(last: nn.Module) -> None:
    one, other, plain = (network(last, seed) for seed in (0, 1, 2))
    loud = 9 * X
    expected, expected_of_other, expected_of_plain = one(X).detach(), other(loud).detach(), plain(loud)
    for model, x in ((one, X), (other, loud)):
        lq.calibrate(lq.prepare(model, X, target="x86_avx2"), [x])
    # Each has the ranges of its own data, and they are in nobody else's way.
    assert error(one, expected, X) < 0.05 and error(other, expected_of_other, loud) < 0.05
    assert error(lq.convert(one), expected, X) < 0.05
    assert error(lq.convert(other), expected_of_other, loud) < 0.05
    assert torch.equal(plain(loud), expected_of_plain)
    twin = copy.deepcopy(other)
    assert error(twin, expected_of_other, loud) < 0.05
    assert len({id(followed.root) for followed in twin[0].act.forward.all()}) == 1  # the twin's alone
    lq.unprepare(one)
    assert torch.equal(one(X), expected) and error(other, expected_of_other, loud) < 0.05
    lq.unprepare(other)
    assert torch.equal(other(loud), expected_of_other)
    assert "forward" not in Block.activation.__dict__


def test_training_sees_the_data_of_its_own_network() -> None:
    """A teacher that is not quantized runs beside it."""
    student, teacher = network(nn.Identity(), 0), network(nn.Identity(), 1)
    expected = teacher(9 * X)
    lq.prepare(student, X, mode="qat", target="x86_avx2").train()
    student(X)
    ranges = {name: value.clone() for name, value in student.state_dict().items()}
    assert torch.equal(teacher(9 * X), expected)
    assert all(torch.equal(value, ranges[name]) for name, value in student.state_dict().items())


def test_what_networks_share_keeps_none_of_them_in_memory() -> None:
    last = nn.SiLU()
    one, other = network(last, 0), network(last, 1)
    expected = other(X).detach()
    for model in (one, other):
        lq.calibrate(lq.prepare(model, X, target="x86_avx2"), [X])
    gone = weakref.ref(one)
    del one, model
    gc.collect()
    assert gone() is None
    again = pickle.loads(pickle.dumps(other))
    assert len([*again[0].act.forward.all()]) == 1
    for prepared in (other, again):
        assert error(lq.convert(prepared), expected, X) < 0.05
    del other, again, prepared
    gc.collect()
    assert torch.equal(last(X), nn.functional.silu(X))
    third = network(last, 1)
    lq.calibrate(lq.prepare(third, X, target="x86_avx2"), [X])
    assert error(lq.convert(third), expected, X) < 0.05
