"""Python around the layers: checks of types, loops, attributes that change and dice that are thrown."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import check, check_float, check_int8, check_qat, right_or_refused
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import Call, assert_same, assert_same_step, seed, training_step

X = noise(8, 12, seed=1)


def normalise(x: Tensor) -> Tensor:
    return (x - 0.4) / 0.3


def _isinstance(self: Any, x: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        x = normalise(x)
    return self.b(F.relu(self.a(x))).mean((2, 3))


def _type_is(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(F.relu(x) if type(x) is Tensor else -x).mean((2, 3))


def _hasattr(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(normalise(x) if not hasattr(x, "node") and x.is_floating_point() else x).mean((2, 3))


def _dimensions(self: Any, x: Tensor) -> Tensor:
    x = x if x.dim() == 4 and x.ndim == len(x.shape) else x[None]
    return self.b(F.relu(self.a(x))).mean(tuple(range(2, x.dim())))


def _asserts(self: Any, x: Tensor) -> Tensor:
    assert x.dim() == 4 and x.shape[1] == 3, "not an image"
    if x.dtype not in (torch.float32, torch.float16):
        raise TypeError("not floating point")
    torch._assert(x.shape[2] == x.shape[3], "not square")
    return self.b(F.relu(self.a(x))).mean((2, 3))


def _suppressed(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    with contextlib.suppress(AttributeError):
        x = x.no_such_method()
    try:
        x = F.relu(x)
    finally:
        x = self.b(x)
    return x.mean((2, 3))


def _generated(self: Any, x: Tensor) -> Tensor:
    def stages(x: Tensor) -> Iterator[Tensor]:
        for layer in (self.a, self.b):
            x = F.relu(layer(x))
            yield x

    return torch.cat([stage.mean((2, 3)) for stage in stages(x)], 1)


def _partial(self: Any, x: Tensor) -> Tensor:
    activation = functools.partial(F.leaky_relu, negative_slope=0.3)
    return functools.reduce(lambda y, layer: activation(layer(y)), (self.a, self.b), x).mean((2, 3))


def _listed(self: Any, x: Tensor) -> Tensor:
    features = [x]
    while len(features) < 3:
        features.append(F.relu((self.a, self.b)[len(features) - 1](features[-1])))
    return sum(feature.mean((2, 3))[:, :3] for feature in features)  # type: ignore[return-value]


def _float_context(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    with torch.autocast("cpu", enabled=False):
        return self.b(x.float()).mean((2, 3))


FORWARDS = {
    "isinstance": _isinstance,
    "hasattr": _hasattr,
    "dimensions": _dimensions,
    "asserts": _asserts,
    "suppressed errors": _suppressed,
    "generator": _generated,
    "functools": _partial,
    "list": _listed,
    "autocast off": _float_context,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_python_in_a_forward(name: str) -> None:
    check(Forward(FORWARDS[name], a=conv(3, 8), b=conv(8, 8)), X)


def test_what_asks_for_a_tensors_very_type_is_refused_where_no_module_holds_it() -> None:
    # What exports a forward is a subclass of Tensor.
    with pytest.raises(
        lq.CaptureError, match=r"the graph captured from Forward does not compute what its forward does"
    ):
        lq.prepare(Forward(_type_is, a=conv(3, 8), b=conv(8, 8)).eval(), X)


class Containers(nn.Module):
    """Lists and dicts of modules, an activation that is a partial, and a module that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(conv(i, 8) for i in (3, 8, 8))
        self.branches = nn.ModuleDict({"left": conv(8, 8, 1), "right": nn.Identity(), "add": conv(8, 8)})
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(1.5))])
        self.act = functools.partial(F.leaky_relu, negative_slope=0.2)
        self.downsample = None
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, stage in enumerate(self.stages):
            x = self.act(stage(x) if index else stage(x) * self.scales[0])
        y: Any = 0
        for name, branch in self.branches.items():
            y = y + branch(x) if name != "right" else y + branch(x) * self.scales[1]
        if self.downsample is not None:
            y = self.downsample(y)
        return self.fc(y.mean((2, 3)))


def test_containers() -> None:
    check(Containers(), X)


class RandomDrop(nn.Module):
    """Layers dropped by Python's dice (Huang et al. 2016) and by torch's."""

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        self.stem, self.fc, self.probability = conv(3, 8), nn.Linear(8, 10), probability
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), conv(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if self.training and (random.random() if index else torch.rand(()).item()) < self.probability:
                continue
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def test_random_drop() -> None:
    check(RandomDrop(), X)


def test_random_drop_in_qat() -> None:
    check_qat(RandomDrop(), X, steps=6)


class Scheduled(nn.Module):
    """Attributes that a callback changes from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.mix, self.drop = 1.0, False, nn.Dropout(0.0)
        self.stem, self.body, self.extra, self.fc = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 10)
        self.register_buffer("warmup", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x))) * (1 - self.warmup)
        if self.mix:
            x = x + self.extra(F.relu(x))
        return self.fc(self.drop(x).mean((2, 3))) / self.temperature


def _schedule(model: nn.Module, step: int) -> None:
    model.temperature, model.mix, model.drop.p = 1.0 + step, step % 2 == 1, 0.1 * step
    model.warmup.fill_(0.1 * step)


def test_attributes_are_followed_in_qat() -> None:
    check_qat(Scheduled(), X, between=_schedule)


def test_attributes_are_followed_in_float_and_in_int8() -> None:
    model = Scheduled()
    eager = copy.deepcopy(model)
    lq.prepare(model, X, target="x86_avx2")
    for step in (1, 3, 2):
        _schedule(model, step)
        _schedule(eager, step)
        assert_same_step(training_step(model, Call((X,)), step), training_step(eager, Call((X,)), step))
        assert_same(model.eval()(X), eager.eval()(X), "output")
    # The INT8 network is that of the attributes at conversion.
    int8 = lq.convert(lq.calibrate(model, [X]))
    assert {"stem", "body", "fc"} <= {layer.name for layer in int8.report.int8_layers}
    check_int8(int8, Call((X,)), eager, model)


def test_an_attribute_brings_in_a_layer_that_preparation_did_not_see() -> None:
    model = Scheduled().eval()
    eager = copy.deepcopy(model)
    lq.prepare(model, X, target="x86_avx2")
    _schedule(model, 1)
    _schedule(eager, 1)
    right_or_refused(lambda: lq.convert(lq.calibrate(model, [X]))(X), eager(X))


def test_stochastic_depth_per_sample() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(F.relu(x))
            if not self.training:
                return x + y
            return x + y * torch.empty(len(x), 1, 1, 1).bernoulli_(0.7).div_(0.7)

    check(nn.Sequential(conv(3, 8), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), X)


def test_noise_in_training_and_not_in_evaluation() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = x + torch.randn_like(x) * 0.1
        return self.b(F.dropout(F.relu(x), 0.3, self.training)).mean((2, 3))

    check(Forward(forward, a=conv(3, 8), b=conv(8, 8)), X)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else -x


class ReadsANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / max(x.abs().max().item(), 0.1)


class LoopsOverData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 0.5:
            x = x / 2
        return x


@pytest.mark.parametrize("kind", [DataDependent, ReadsANumber, LoopsOverData])
def test_what_depends_on_data_is_a_float_leaf(kind: type[nn.Module]) -> None:
    layers = (conv(3, 8), nn.ReLU(), conv(8, 8), nn.AvgPool2d(6), nn.Flatten())
    model = nn.Sequential(*layers[:3], kind(), *layers[3:], nn.Linear(32, 10))
    eager = copy.deepcopy(model).eval()
    # A batch and its first sample take different ways, each the eager one.
    check_float(model, X)
    for x in (X, X[:1], -X, X * 10):
        seed()
        assert_same(model(x), eager(x), "output")
    model = copy.deepcopy(eager)
    lq.prepare(model, X, target="x86_avx2")
    (leaf,) = [layer for layer in lq.report(model).float_layers if layer.name == "3"]
    assert leaf.reason
    int8 = lq.convert(lq.calibrate(model, [X, -X]))
    assert {layer.name for layer in int8.report.int8_layers} >= {"0", "2", "6"}
    for x in (X, -X):
        torch.testing.assert_close(int8(x), eager(x), atol=0.06, rtol=0.1)


class Gated(nn.Module):
    """Branches on data between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        print("gated", file=sys.stderr)
        x = self.a(x)
        return self.b(x if float(x.sum()) > 0 else -x)  # type: ignore[no-any-return]


def test_what_cannot_be_captured_is_said_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """torch prints the graph up to there to the standard error stream, where the forward's own words stay."""
    with pytest.raises(lq.CaptureError, match="cannot be captured as a graph"):
        lq.prepare(Gated(), torch.randn(2, 4))
    assert set(capsys.readouterr().err.splitlines()) == {"gated"}
