"""Hooks: whatever ran beside a forward still runs, and what a hook leaves on a module is read there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import check, check_float, check_int8, check_qat, right_or_refused
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import Call, assert_same, training_step

X = noise(8, 12, seed=1)


def sequential() -> nn.Sequential:
    pool = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), *pool, nn.Linear(32, 10))


def _triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3


def _shift_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.add_(1)


def _clip_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0].clamp(-0.5, 0.5)


def _halve_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def _with_keywords(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return output + args[0].mean()


def _input_with_keywords(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
    return (args[0] + 1,), kwargs


@pytest.mark.parametrize("layer", ["0", "3", "7"])
def test_forward_hooks_on_layers(layer: str) -> None:
    model = sequential()
    model.get_submodule(layer).register_forward_hook(_triple)
    check(model, X)


@pytest.mark.parametrize("layer", ["0", "3", "7"])
def test_forward_pre_hooks_on_layers(layer: str) -> None:
    model = sequential()
    model.get_submodule(layer).register_forward_pre_hook(_clip_input)
    model.get_submodule(layer).register_forward_pre_hook(_halve_input)
    check(model, X)


@pytest.mark.parametrize("layer", ["", "0", "1", "5"])
def test_hooks_that_write_in_place_on_any_module(layer: str) -> None:
    model = sequential()
    model.get_submodule(layer).register_forward_hook(_shift_in_place)
    check(model, X)


def test_hooks_with_keywords_on_the_root_and_a_layer() -> None:
    model = sequential()
    model[3].register_forward_hook(_with_keywords, with_kwargs=True)
    model.register_forward_pre_hook(_input_with_keywords, with_kwargs=True)
    check(model, X)


def test_a_hook_that_is_always_called() -> None:
    model = sequential()
    model[3].register_forward_hook(_triple, always_call=True, prepend=True)
    model[3].register_forward_hook(_shift_in_place)
    check(model, X)


def test_hooks_fire_once_a_call_and_see_real_tensors() -> None:
    seen: list[Any] = []
    model = sequential().eval()
    model[3].register_forward_hook(lambda module, args, output: seen.append((type(output), output.shape)))
    lq.prepare(model, X)
    seen.clear()
    model(X)
    model(X[:3])
    assert seen == [(Tensor, (8, 8, 12, 12)), (Tensor, (3, 8, 12, 12))]


def test_a_hook_taken_off_after_preparation() -> None:
    model = sequential().eval()
    handle = model[3].register_forward_hook(_triple)
    lq.prepare(model, X)
    handle.remove()
    assert_same(model(X), lq.unprepare(copy.deepcopy(model))(X), "output without the hook")


def test_a_hook_put_on_after_preparation_is_followed_or_refused() -> None:
    model = lq.prepare(sequential().eval(), X)
    model[3].register_forward_hook(_triple)
    expected = lq.unprepare(copy.deepcopy(model))(X)
    assert_same(model(X), expected, "output with a late hook")
    right_or_refused(lambda: lq.convert(lq.calibrate(model, [X]))(X), expected)


class Features:
    """What many style and distillation codes do: a hook keeps a layer's output, and the forward reads it."""

    def __init__(self) -> None:
        self.value: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.value = output


class ReadsFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = conv(3, 8), conv(8, 8), nn.Linear(16, 10)
        self.features = Features()
        self.stem.register_forward_hook(self.features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)))
        return self.fc(torch.cat([x.mean((2, 3)), self.features.value.amax((2, 3))], 1))


class KeepsOnModule(ReadsFeatures):
    """The same through an attribute of the module itself, and a method as the hook."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        self.body.register_forward_pre_hook(self.keep)

    def keep(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.kept = args[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)))
        assert self.kept is not None
        return self.fc(torch.cat([x.mean((2, 3)), self.kept.mean((2, 3)) * 2], 1))


class KeepsList(ReadsFeatures):
    """A list that every forward empties and hooks fill."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        for layer in (self.stem, self.body):
            layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        self.body(F.relu(self.stem(x)))
        return self.fc(torch.cat(self.kept, 1))


@pytest.mark.parametrize("kind", [ReadsFeatures, KeepsOnModule, KeepsList])
def test_values_that_a_hook_left(kind: type[nn.Module]) -> None:
    check(kind(), X)


def test_values_that_a_hook_left_outside_of_the_prepared_module() -> None:
    # The features are read by the code around the prepared backbone, as segmentation heads and losses do.
    model = sequential().eval()
    kept = Features()
    model[4].register_forward_hook(kept)
    model(X)
    expected = kept.value.clone()
    lq.prepare(model, X)
    kept.value = None
    model(X)
    assert_same(kept.value, expected, "feature")


def test_hooks_survive_until_int8_and_back() -> None:
    model = sequential()
    model[3].register_forward_hook(_triple)
    eager = copy.deepcopy(model).eval()
    lq.prepare(model.eval(), X, target="x86_avx2")
    lq.calibrate(model, [X])
    check_int8(lq.convert(model), Call((X,)), eager)
    assert_same(lq.unprepare(model)(X), eager(X), "output of the float model")
    assert len(model[3]._forward_hooks) == 1


class Gradients:
    """A backward hook that counts and scales."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []

    def full(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        self.shapes.append([g.shape for g in outputs])
        return tuple(None if g is None else g * 0.5 for g in inputs)

    def pre(self, module: nn.Module, outputs: Any) -> Any:
        self.shapes.append([g.shape for g in outputs])
        return tuple(g * 2 for g in outputs)


@pytest.mark.parametrize("layer", ["0", "2", "3"])
def test_full_backward_hooks(layer: str) -> None:
    for name in ("full", "pre"):
        model = sequential()
        model[2].inplace = False
        hook = Gradients()
        register = "register_full_backward_hook" if name == "full" else "register_full_backward_pre_hook"
        getattr(model.get_submodule(layer), register)(getattr(hook, name))
        check_float(model, X)
        hook.shapes.clear()  # preparation trains a step to compare, too
        for state in range(3):
            training_step(model, Call((X,)), state)
        assert hook.shapes == [[(8, 8, 12, 12)]] * 3  # as many as training steps: not lost, not doubled


def test_backward_hooks_in_qat() -> None:
    model = sequential()
    model[3].register_full_backward_hook(Gradients().full)
    check_qat(model, X)


def test_hooks_on_tensors() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 10)
        return self.b(x).mean((2, 3))

    check(Forward(forward, a=conv(3, 8), b=conv(8, 8)), X)


def test_hooks_on_parameters() -> None:
    model = sequential()
    model[3].weight.register_hook(lambda gradient: gradient * 0)
    lq.prepare(model, X, mode="qat").train()
    model(X).sum().backward()
    assert not model[3].weight.grad.any()
    assert model[0].weight.grad.any()
