"""A layer of the user's own, quantized by registering one function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.modes import both_modes
from helpers.quantized import TARGET, noise
from lq.graph.capture import registry


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


class Gated(nn.Module):
    """Scales a convolution's weight by a gain, in code that depends on data."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, 3, 3) * 0.2)
        self.gain = nn.Parameter(torch.rand(out, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        return F.conv2d(x, self.weight * self.gain, padding=1)


def compute(layer: Gated, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight * layer.gain, padding=1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Gated(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def layers_of(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.precision for layer in lq.report(model).layers}


def test_without_it_the_layer_stays_in_float_with_the_reason() -> None:
    model = lq.prepare(network(), noise(8, 8))
    (layer,) = (layer for layer in lq.report(model).layers if layer.name == "0")
    assert layer.precision == "float"
    assert "control flow" in layer.reason or "bool" in layer.reason


def test_with_it_the_layer_runs_in_int8() -> None:
    lq.register_layer(Gated, compute)
    model = lq.prepare(network(), noise(8, 8), target="x86_avx2")
    assert set(layers_of(model).values()) == {"int8", "float"}  # the pooling
    assert sum(precision == "int8" for precision in layers_of(model).values()) == 3
    lq.calibrate(model, [noise(8, 8)])
    int8 = lq.convert(model)
    expected = network()(noise(8, 8))
    error = (int8(noise(8, 8)) - expected).square().mean()
    assert expected.square().mean() / error > 100
    assert [layer for layer in lq.report(int8).layers if "batch_norm" in layer.kind]


def test_it_trains() -> None:
    lq.register_layer(Gated, compute)
    model = lq.prepare(network(), noise(8, 8), mode="qat").train()
    loss = model(noise(8, 8)).square().mean()
    loss.backward()
    assert model[0].gain.grad is not None
    assert model[0].gain.grad.abs().sum() > 0


def test_a_function_that_computes_something_else_is_refused() -> None:
    lq.register_layer(Gated, lambda layer, x: F.conv2d(x, layer.weight, padding=1))
    with pytest.raises(ValueError, match=r"registered for Gated the model computes something else.*lq.register_layer"):
        lq.prepare(network(), noise(8, 8))


def test_subclasses_are_registered_on_their_own() -> None:
    class Other(Gated):
        pass

    lq.register_layer(Gated, compute)
    model = network()
    model[0] = Other(3, 8)
    assert layers_of(lq.prepare(model, noise(8, 8)))["0"] == "float"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, compute), "cls=3 must be a subclass of nn.Module"), ((Gated, "conv"), "forward='conv' must be a function")],
)
def test_bad_arguments(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lq.register_layer(*arguments)


class FrozenBatchNorm2d(nn.Module):
    """As in DETR, whose epsilon is a number in its forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


@both_modes
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_the_batch_norm_of_detectors_is_folded(norm: Any, mode: Any) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4, norm_layer=norm)
    for part in model.modules():
        if isinstance(part, norm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 32, 32)
    expected = model.eval()(x)
    prepared = lq.prepare(model, x, target=TARGET, mode=mode)
    if mode == "ptq":
        lq.calibrate(prepared, [x])
    else:
        prepared.train()(x).sum().backward()
        assert prepared.conv1.weight.grad is not None and torch.isfinite(prepared.conv1.weight.grad).all()
    int8 = lq.convert(prepared.eval())
    assert (int8(x) - expected).norm() < 0.1 * expected.norm()
    assert int8.report is not None and int8.report.int8_layers[0].kind == "conv + batch_norm + relu"
    assert [layer.name for layer in int8.report.float_layers] == ["avgpool"]
