"""Gradients that are not the chain rule's over the graph: cut off, reversed, passed straight through, recomputed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lq
from helpers.capture_checks import check, check_float, check_qat
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import Call, assert_same_step, training_step

X = noise(8, 12, seed=1)


class Reverse(torch.autograd.Function):
    """Gradient reversal (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return -ctx.factor * gradient, None


class StraightThrough(torch.autograd.Function):
    """A step function whose gradient is the identity's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient


class SwishByHand(torch.autograd.Function):
    """A memory-saving activation, as model zoos have it: forward and backward written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s)))


class Backbone(nn.Module):
    """A head on features; how the backbone is called differs from test to test."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU())
        self.neck, self.head = conv(8, 8), nn.Linear(8, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.neck(self.features(x))).mean((2, 3)))


class NoGrad(Backbone):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.backbone(x)


class NoGradDecorated(Backbone):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class SetGradEnabled(Backbone):
    """Fine-tunes from a step on; before it the backbone is frozen."""

    fine_tune = False

    def features(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.fine_tune and torch.is_grad_enabled()):
            return self.backbone(x)


class Detached(Backbone):
    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x).detach()


class PartlyFrozen(Backbone):
    """Only the first convolution is under no_grad, and gradients are enabled again inside."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone[0](x)
            with torch.enable_grad():
                return self.backbone[1:](x)


class StopGradientBranch(Backbone):
    """The same features in two branches, one of which is cut off: bootstrapped and distilled heads do so."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(F.relu(self.neck(x)).mean((2, 3)) + self.neck(x.detach()).mean((2, 3)))


class NoGradTeacher(Backbone):
    """A parameter used twice, once without gradient."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        with torch.no_grad():
            teacher = super().forward(x + 0.1)
        return out, teacher


class Reversed(Backbone):
    def features(self, x: Tensor) -> Tensor:
        return Reverse.apply(self.backbone(x), 0.5)


class Straight(Backbone):
    def features(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return x + StraightThrough.apply(x - 0.3)


class HandWritten(Backbone):
    def features(self, x: Tensor) -> Tensor:
        return SwishByHand.apply(self.backbone(x))


class DetachTrick(Backbone):
    """Straight-through without a Function: ``x + (f(x) - x).detach()``."""

    def features(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return x + (torch.round(x * 4) / 4 - x).detach()


class Checkpointed(Backbone):
    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.backbone, x, use_reentrant=False) if self.training else self.backbone(x)


class CheckpointedAlways(Backbone):
    rate = 0.2

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False)

    def _run(self, x: Tensor) -> Tensor:
        return F.dropout(self.backbone(x), self.rate, self.training)


class CheckpointedInParts(Backbone):
    def features(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.backbone, 2, x, use_reentrant=False)


class CheckpointedReentrant(Backbone):
    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.backbone, x, use_reentrant=True) if self.training else self.backbone(x)


CUT = [NoGrad, NoGradDecorated, SetGradEnabled, Detached, PartlyFrozen, StopGradientBranch, NoGradTeacher]
OTHERWISE = [Reversed, Straight, HandWritten, DetachTrick]
RECOMPUTED = [Checkpointed, CheckpointedAlways, CheckpointedInParts, CheckpointedReentrant]


@pytest.mark.parametrize("kind", CUT + OTHERWISE + RECOMPUTED)
def test_float_and_int8(kind: type[nn.Module]) -> None:
    check(kind(), X)


@pytest.mark.parametrize("kind", CUT + OTHERWISE + RECOMPUTED)
def test_qat(kind: type[nn.Module]) -> None:
    model = check_qat(kind(), X)
    model.eval()
    assert len(lq.convert(model).report.int8_layers) >= 4


@pytest.mark.parametrize("kind", [NoGrad, Detached])
def test_a_frozen_backbone_gets_no_gradient_in_qat(kind: type[nn.Module]) -> None:
    model = lq.prepare(kind(), X, mode="qat").train()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name, _ in model.backbone.named_parameters())
    assert model.neck.weight.grad is not None


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_what_is_recomputed_is_rounded_as_it_was(kind: type[nn.Module]) -> None:
    # The second forward runs inside backward, long after the module's own forward returned.
    steps = []
    for cls in (Backbone, kind):
        torch.manual_seed(0)
        network = cls()
        network.rate = 0.0  # the backbone alone has no dropout
        network.backbone[1].momentum = 0.0  # checkpointing itself moves the statistics twice
        model = lq.prepare(network, X, mode="qat")
        steps.append(training_step(model, Call((X,))))
    steps[1].buffers = steps[0].buffers
    assert_same_step(steps[1], steps[0])


def test_fine_tuning_begins_by_an_attribute() -> None:
    def unfreeze(model: nn.Module, step: int) -> None:
        model.fine_tune = step >= 1

    check_qat(SetGradEnabled(), X, between=unfreeze)


def test_requires_grad_changed_after_preparation() -> None:
    model = Backbone()
    eager = copy.deepcopy(model)
    lq.prepare(model, X)
    for freeze in (True, False):
        for m in (model, eager):
            m.backbone.requires_grad_(not freeze)
        assert_same_step(training_step(model, Call((X,))), training_step(eager, Call((X,))))


def test_double_backward() -> None:
    # A gradient penalty: the gradient with respect to the image is itself differentiated.
    model = Backbone().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    eager = copy.deepcopy(model)
    lq.prepare(model, X)
    penalties = []
    for m in (model, eager):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(m.neck.weight.grad)
    torch.testing.assert_close(penalties[0], penalties[1])


def test_retained_gradients_of_an_activation() -> None:
    # Grad-CAM: the caller asks for the gradient of a feature.
    def forward(self: Any, x: Tensor) -> Any:
        feature = F.relu(self.a(x))
        return self.b(feature).mean((2, 3)), feature

    model = check_float(Forward(forward, a=conv(3, 8), b=conv(8, 8)), X)
    scores, feature = model(X)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), feature)
    assert gradient.abs().max() > 0
