"""Weights that are no plain parameters of a plain layer: computed, shared, scripted, initialised late."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import lq
from helpers.capture_checks import check, check_float, check_int8, check_qat, right_or_refused
from helpers.networks import randomize_batch_norm
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import Call, assert_same, assert_same_step, training_step

X = noise(8, 12, seed=1)


def network(body: nn.Module) -> nn.Module:
    """``body`` takes eight channels to eight, between two plain layers."""
    return nn.Sequential(conv(3, 8), nn.ReLU(), body, nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(32, 10))


class BiasFromInput(nn.Module):
    """A dynamic layer (Chen et al. 2020, "Dynamic Convolution", the bias alone): batch-free, of the image's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.project(x.mean((0, 2, 3)))
        return F.conv2d(x, self.weight, bias, padding=1)


class WeightFromInput(nn.Module):
    """Conditionally parametrised: the weight is a mixture that the batch's mean chooses (CondConv, batch of one)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8, 3, 3) * 0.1)
        self.route = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        routes = self.route(x.mean((0, 2, 3))).softmax(0)
        return F.conv2d(x, torch.einsum("e,eoihw->oihw", routes, self.experts), padding=1)


class WeightOfSample(nn.Module):
    """CondConv as timm writes it: one grouped convolution whose groups are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8 * 8 * 9) * 0.1)
        self.route = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.sigmoid(self.route(x.mean((2, 3)))) @ self.experts
        y = F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * 8, c, 3, 3), padding=1, groups=n)
        return y.view(n, 8, h, w)


class BiasReused(nn.Module):
    """The bias is also added elsewhere, and the weight also read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.bias[:, None, None] * self.conv.weight.abs().mean()


class Tied(nn.Module):
    """One weight in two layers, once transposed, as an autoencoder has it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.down(x)), self.down.weight.transpose(0, 1))


class Gained(nn.Conv2d):
    """A subclass whose weight has a gain and is centred, written over ``_conv_forward``."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, centred * self.gain, bias)


def _old_style(function: Any, layer: nn.Module) -> nn.Module:
    # Made with gradients on, the weight could not be deep-copied, which is torch's affair.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return function(layer)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def _symmetric() -> nn.Module:
    layer = conv(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _two_parametrizations() -> nn.Module:
    layer = parametrizations.weight_norm(conv(8, 8))
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _lazy() -> nn.Module:
    layer = nn.LazyConv2d(8, 3, padding=1)
    layer(torch.randn(1, 8, 4, 4))
    return layer


def _pruned() -> nn.Module:
    return _old_style(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), conv(8, 8))


def _tied_modules() -> nn.Module:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


BODIES: dict[str, tuple[Any, list[str]]] = {
    "bias of the input": (BiasFromInput, []),
    "weight of the input": (WeightFromInput, []),
    "bias reused": (BiasReused, ["2.conv"]),
    "tied and transposed": (Tied, ["2.down"]),
    "tied modules": (_tied_modules, ["2.0", "2.2"]),
    "layer twice": (lambda: nn.Sequential(*[conv(8, 8)] * 2), ["2.0"]),
    "weight_norm": (lambda: parametrizations.weight_norm(conv(8, 8)), []),
    "weight_norm, old": (lambda: _old_style(nn.utils.weight_norm, conv(8, 8)), []),
    "spectral_norm": (lambda: parametrizations.spectral_norm(conv(8, 8)), []),
    "spectral_norm, old": (lambda: _old_style(nn.utils.spectral_norm, conv(8, 8)), []),
    "parametrization of one's own": (_symmetric, []),
    "two parametrizations": (_two_parametrizations, []),
    "pruned": (_pruned, []),
    "subclass with a weight of its own": (Gained, []),
    "lazy": (_lazy, ["2"]),
}


@pytest.mark.parametrize("name", BODIES)
def test_float_and_int8(name: str) -> None:
    make, layers = BODIES[name]
    int8 = check(network(make()), X, int8=["0", "6", *layers])
    if not layers:  # computed weights: under whatever name, the third convolution runs in INT8 or has its reason
        body = [layer for layer in int8.report.layers if layer.name not in ("0", "6")]
        assert any(layer.precision == "int8" or layer.reason for layer in body)


@pytest.mark.parametrize("name", BODIES)
def test_qat(name: str) -> None:
    check_qat(network(BODIES[name][0]()), X)


def test_a_weight_per_sample_is_a_float_leaf_and_follows_the_batch() -> None:
    int8 = check(network(WeightOfSample()), X, int8=["0", "6"], leaves=["2"])
    assert int8(X[:3]).shape == (3, 10)


def test_a_parametrization_put_on_after_preparation() -> None:
    model = network(conv(8, 8)).eval()
    lq.prepare(model, X, target="x86_avx2")
    eager = lq.unprepare(copy.deepcopy(model))
    for m in (model, eager):
        parametrize.register_parametrization(m[2], "weight", Symmetric())
    assert_same(model(X), eager(X), "output")
    assert_same_step(training_step(model, Call((X,))), training_step(eager, Call((X,))))


def test_a_parametrization_removed_before_preparation() -> None:
    model = network(_symmetric())
    parametrize.remove_parametrizations(model[2], "weight")
    check(model, X)


def test_a_parametrization_removed_after_preparation() -> None:
    model = lq.prepare(network(_symmetric()).eval(), X, target="x86_avx2")
    expected = model(X)
    parametrize.remove_parametrizations(model[2], "weight")
    assert_same(model(X), expected, "output")
    assert right_or_refused(lambda: lq.convert(lq.calibrate(model, [X]))(X), expected)


def test_a_scripted_submodule() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(conv(8, 8), nn.ReLU()).eval())
    int8 = check(network(scripted), X, int8=["0", "6"], leaves=["2"], training=False)
    assert isinstance(int8, lq.Int8Module)


def test_a_scripted_function() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @torch.jit.script
        def hard_swish(x: Tensor) -> Tensor:
            return x * F.relu6(x + 3.0) / 6.0

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(hard_swish(self.a(x))).mean((2, 3))

    check_float(Forward(forward, a=conv(3, 8), b=conv(8, 8)), X, training=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_submodule() -> None:
    inner = conv(8, 8)
    model = network(torch.compile(inner, backend="eager"))
    eager = network(inner).eval()
    eager.load_state_dict({name.replace("_orig_mod.", ""): v for name, v in model.state_dict().items()})
    lq.prepare(model.eval(), X, target="x86_avx2")
    assert_same(model(X), eager(X), "output")
    check_int8(lq.convert(lq.calibrate(model, [X])), Call((X,)), eager, model)


def test_batch_norm_without_affine_and_without_statistics() -> None:
    for norm in (
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.SyncBatchNorm(8).eval(),
        nn.BatchNorm2d(8, momentum=None),
    ):
        body = randomize_batch_norm(nn.Sequential(conv(8, 8, bias=False), norm)) if norm.affine else None
        body = body or nn.Sequential(conv(8, 8, bias=False), norm)
        check(network(body), X, training=not isinstance(norm, nn.SyncBatchNorm))
