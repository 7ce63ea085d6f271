"""Sums: with a factor, with a bound, broadcast, of one operand twice, of a tensor in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import TARGET, as_tensors, check, check_program, through_file
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import sqnr

X = noise(8, 12, seed=1)


def _transposed_residual(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(self.b(x) + x.transpose(2, 3)).mean((2, 3))


def _permuted_residual(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x)).permute(0, 3, 2, 1)
    return F.relu(self.b(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1) + x).mean((1, 2))


def _token_residual(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x)).flatten(2).transpose(1, 2)
    return (self.fc(x) + x).mean(1)


def _add_with_alpha(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.a(x), self.skip(x), alpha=2).mean((2, 3))


def _sub_with_alpha(self: Any, x: Tensor) -> Tensor:
    return F.relu(torch.sub(self.a(x), self.skip(x), alpha=0.5)).mean((2, 3))


def _method_with_alpha(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.skip(x).add(self.a(x), alpha=-1.5)).mean((2, 3))


def _add_with_alpha_onto_the_input(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(torch.add(self.b(x), x, alpha=2)).mean((2, 3))


def _add_with_alpha_of_the_convolution(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return torch.add(x, self.b(x), alpha=3).mean((2, 3))


def _add_in_place_with_alpha(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    y = self.b(x)
    y.add_(x, alpha=2)
    return F.relu_(y).mean((2, 3))


def _add_with_alpha_and_a_float_operand(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.a(x), torch.sigmoid(self.skip(x)), alpha=2).mean((2, 3))


def _add_a_constant_with_alpha(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.a(x), self.b.bias[:, None, None], alpha=2).mean((2, 3)) + self.b(self.a(x)).mean((2, 3))


def _broadcast_add(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(self.b(x) + x.mean((2, 3), keepdim=True)).mean((2, 3))


def _broadcast_convolution(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(self.b(F.adaptive_avg_pool2d(x, 1)) + x).mean((2, 3))


def _broadcast_channel(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(self.b(x) + F.relu(x.amax(1, keepdim=True))).mean((2, 3))


def _broadcast_row(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(self.b(x)[:, :, :1] + x).mean((2, 3))


def _broadcast_batch(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return F.relu(self.b(x) + x[:1]).mean((2, 3))


def _sum_of_a_constant(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.b(F.relu(self.a(x) + 0.5)) + torch.ones(8, 1, 1)).mean((2, 3))


def _sum_relu6(self: Any, x: Tensor) -> Tensor:
    return F.relu6(self.a(x) * 3 + self.skip(x) + self.skip(x)).mean((2, 3))


def _conv_sum_relu6(self: Any, x: Tensor) -> Tensor:
    return F.relu6(self.a(x) + self.skip(x)).mean((2, 3))


def _conv_sum_hardtanh(self: Any, x: Tensor) -> Tensor:
    return F.hardtanh(self.a(x) + self.skip(x), -0.5, 0.75).mean((2, 3))


def _conv_sum_clamp(self: Any, x: Tensor) -> Tensor:
    return (self.a(x) + self.skip(x)).clamp(max=0.5).mean((2, 3))


def _convolution_of_its_own_sum(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    return self.b(x + x).mean((2, 3))


def _same_operand_twice(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    y = self.b(x)
    return F.relu(y + y + x).mean((2, 3))


FORWARDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "transposed residual": (_transposed_residual, ("a", "b")),
    "permuted residual": (_permuted_residual, ("a", "b")),
    "token residual": (_token_residual, ("a", "fc")),
    "add with alpha": (_add_with_alpha, ("a", "skip")),
    "sub with alpha": (_sub_with_alpha, ("a", "skip")),
    "method with alpha": (_method_with_alpha, ("a", "skip")),
    "add with alpha onto the input": (_add_with_alpha_onto_the_input, ("a", "b")),
    "add with alpha of the convolution": (_add_with_alpha_of_the_convolution, ("a", "b")),
    "add with alpha and a float operand": (_add_with_alpha_and_a_float_operand, ("a", "skip")),
    "add a constant with alpha": (_add_a_constant_with_alpha, ("a", "b")),
    "add in place with alpha": (_add_in_place_with_alpha, ("a", "b")),
    "broadcast add": (_broadcast_add, ("a", "b")),
    "broadcast convolution": (_broadcast_convolution, ("a", "b")),
    "broadcast channel": (_broadcast_channel, ("a", "b")),
    "broadcast row": (_broadcast_row, ("a", "b")),
    "sum of a constant": (_sum_of_a_constant, ("a", "b")),
    "sum + ReLU6": (_sum_relu6, ("a", "skip")),
    "conv + sum + ReLU6": (_conv_sum_relu6, ("a", "skip")),
    "conv + sum + Hardtanh": (_conv_sum_hardtanh, ("a", "skip")),
    "conv + sum + clamp": (_conv_sum_clamp, ("a", "skip")),
    "sum with itself": (_convolution_of_its_own_sum, ("a", "b")),
    "one operand twice": (_same_operand_twice, ("a", "b")),
}


def network(name: str) -> nn.Module:
    forward, layers = FORWARDS[name]
    every = {
        "a": conv(3, 8),
        "b": conv(8, 8),
        "skip": conv(3, 8, 1),
        "fc": nn.Linear(8, 8),
    }
    return Forward(forward, **{layer: every[layer] for layer in layers})


@pytest.mark.parametrize("name", FORWARDS)
def test_sums(name: str) -> None:
    check(network(name), X)


@pytest.mark.parametrize("name", FORWARDS)
def test_sums_after_a_program(name: str, tmp_path: Path) -> None:
    check_program(network(name), X, tmp_path / "int8.pt2")


def test_a_batch_wise_broadcast_is_right_for_its_batch(tmp_path: Path) -> None:
    # The first sample alone means something else here than in its batch.
    model = Forward(_broadcast_batch, a=conv(3, 8), b=conv(8, 8)).eval()
    expected = model(X)
    lq.calibrate(lq.prepare(model, X, target=TARGET), [X])
    int8 = lq.convert(model)
    assert sqnr(int8(X), expected) > 20
    assert sqnr(through_file(int8, tmp_path / "int8.pt2")(X), expected) > 20


@pytest.mark.parametrize("target", lq.TARGETS)
@pytest.mark.parametrize("kind", [nn.ReLU6, nn.Hardtanh, nn.ReLU, F.relu6])
def test_the_report_of_a_bounded_sum(kind: Any, target: str) -> None:
    bound = kind() if isinstance(kind, type) else kind

    def forward(self: Any, x: Tensor) -> Tensor:
        x = bound(self.a(x))
        return bound(self.norm(self.b(x)) + x).mean((2, 3))

    children = {"bound": bound} if isinstance(bound, nn.Module) else {}
    model = Forward(forward, a=conv(3, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8), **children).eval()
    lq.prepare(model, X, target=target)
    assert "add" in str(lq.report(model))
    report = lq.convert(lq.calibrate(model, [X])).report
    assert "add" in str(report)
    assert lq.QuantizationReport.from_dict(report.to_dict()) == report


FILES = ["add with alpha", "broadcast add", "broadcast convolution", "transposed residual", "conv + sum + ReLU6"]


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.in_turns("ending")
def test_files(name: str, ending: str, tmp_path: Path) -> None:
    model = network(name).eval()
    expected = model(X)
    lq.calibrate(lq.prepare(model, X, target=TARGET), [X])
    loaded = through_file(model, tmp_path / f"int8.{ending}", "auto" if ending == "pt2" else "onnxruntime")
    assert sqnr(as_tensors(loaded(X)), expected) > 20
    assert sqnr(as_tensors(loaded(X[:1])), expected[:1]) > 20
