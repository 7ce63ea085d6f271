"""Quantization-aware training: straight-through gradients, ranges, and the network that comes out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.networks import Residual
from lq.numerics.functional import choose_qparams
from lq.numerics.quantizer import WeightQuantizer

ACTIVATION, WEIGHT = lq.TARGETS["x86_avx2"].activation, lq.TARGETS["x86_avx2"].weight


class StraightThrough(torch.autograd.Function):
    """Rounds to a grid; the gradient passes where the value is within the grid (Jacob et al. 2018, section 3)."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, low, high):  # type: ignore[no-untyped-def]
        q = torch.round(x * (1 / scale)) + zero_point
        ctx.save_for_backward((q >= low) & (q <= high))
        return (q.clamp(low, high) - zero_point) * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.saved_tensors[0], None, None, None, None


def rounded(x: Tensor) -> Tensor:
    scale, zero_point = choose_qparams(x.detach().min(), x.detach().max(), ACTIVATION)
    return StraightThrough.apply(x, scale, zero_point, 0, 255)


def rounded_weight(w: Tensor) -> Tensor:
    scale = w.detach().abs().flatten(1).amax(1).div(64).reshape(-1, *[1] * (w.dim() - 1))
    return StraightThrough.apply(w, scale, 0, -64, 64)


def test_a_step_is_the_step_of_a_straight_through_reference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    twin = copy.deepcopy(model).train()
    lq.prepare(model, torch.randn(2, 3, 8, 8), mode="qat", target="x86_avx2").train()
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10

    loss = F.cross_entropy(model(x), y)
    loss.backward()
    conv, norm, _, _, fc = twin
    h = torch.relu(norm(F.conv2d(rounded(x), rounded_weight(conv.weight), conv.bias)))
    reference = F.cross_entropy(F.linear(rounded(h).flatten(1), rounded_weight(fc.weight), fc.bias), y)
    reference.backward()

    torch.testing.assert_close(loss, reference)
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(model[1].running_var, norm.running_var)


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that tells four patterns apart."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    y = torch.arange(64) % 4
    x = torch.randn(4, 3, 16, 16, generator=generator)[y] + 0.5 * torch.randn(64, 3, 16, 16, generator=generator)
    model = lq.prepare(Residual(), x[:2], mode="qat", target="x86_avx2").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def test_the_int8_network_is_the_trained_one() -> None:
    model, x, y = trained()
    int8 = lq.convert(model)
    logits = model(x)
    assert (logits.argmax(1) == y).float().mean() > 0.9
    assert torch.equal(int8(x).argmax(1), logits.argmax(1))
    int8.execution = "simulation"
    assert ((int8(x) - logits).abs() > 1e-3 * logits.abs().max()).float().mean() < 0.1
    state = int8.state_dict()
    for name, quantizer in lq.quantizers(model).items():
        if isinstance(quantizer, WeightQuantizer):
            # The integers that training rounded to, up to the sign of the batch norm's weight.
            q = torch.round(model.get_parameter(name) / quantizer.scale.reshape(-1, *[1] * (state[name].dim() - 1)))
            assert torch.equal(state[name].float().abs(), q.abs())
        elif quantizer.rounds:
            assert torch.equal(state[f"{name}.scale"], quantizer.scale)
        else:
            assert f"{name}.scale" not in state


def test_validation_moves_no_range() -> None:
    model, x, _ = trained()
    model(x)  # the weights' scales follow the last step of the optimizer
    before = copy.deepcopy(model.state_dict())
    model(x * 100)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_resumes_from_a_state_dict() -> None:
    model, x, _ = trained()
    again = lq.prepare(Residual(), x[:2], mode="qat", target="x86_avx2")
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.train()(x * 1.5), model.train()(x * 1.5))
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_range_that_is_not_finite_is_refused(value: float) -> None:
    x = torch.randn(4, 3, 16, 16)
    model = lq.prepare(Residual(), x, mode="qat").train()
    model(x)
    model(torch.full_like(x, value))
    with pytest.raises(lq.CalibrationError, match=r"the range of 'x' is not finite \(scale (nan|inf)\)"):
        lq.convert(model)
