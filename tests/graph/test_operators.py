"""Operators between the convolutions that run in INT8 kernels of their own where the engine has such kernels."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lq
from helpers.patterns import Forward, conv
from helpers.quantized import calibrated, noise
from lq.graph.qdq import DEQUANTIZE_BUFFER
from lq.schemes.targets import ONNXRUNTIME, X86_AVX2, Target

X = noise(8, 12)

#: With weights of 7 bits, with which kernels are exact on every CPU.
EXACT_ONNXRUNTIME = replace(ONNXRUNTIME, weight=X86_AVX2.weight)


def dense(x: Tensor, layer: nn.Module) -> Tensor:
    """Two layers whose outputs go to a concatenation each, and to one that both go to."""
    first = layer(x)
    second = layer(torch.cat([x, first], 1)[:, 8:24])
    return torch.cat([torch.cat([torch.sigmoid(x), first], 1), first, second], 1)


#: What is between the convolutions ``a`` and ``b``, with the names of its operators in a report.
OPERATORS: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "silu": (lambda self, x: F.silu(x), {"silu"}),
    "hardswish": (lambda self, x: F.hardswish(x), {"hard_swish"}),
    "sigmoid": (lambda self, x: torch.sigmoid(x), {"sigmoid"}),
    "hardsigmoid": (lambda self, x: F.hardsigmoid(x), {"hard_sigmoid"}),
    "leaky_relu": (lambda self, x: F.leaky_relu(x, 0.2), {"leaky_relu"}),
    "average": (lambda self, x: F.avg_pool2d(x, 2), {"avg_pool"}),
    "gate": (
        lambda self, x: x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True))),
        {"avg_pool", "sigmoid", "mul"},
    ),
    "gate_of_hardsigmoid": (
        lambda self, x: operator.mul(F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1))), x),
        {"avg_pool", "hard_sigmoid", "mul"},
    ),
    "concat": (lambda self, x: torch.cat([x, F.relu(self.squeeze(x))], 1), {"concat"}),
    "concat_of_pieces": (lambda self, x: torch.cat([*x.chunk(2, 1), self.squeeze(x)[:, 2:]], 1), {"concat"}),
    "dense": (lambda self, x: dense(x, self.squeeze), {"concat"}),
    "padded": (lambda self, x: F.pad(F.relu(self.squeeze(x)), (0, 1, 1, 2)), set()),
    "sum_of_three": (lambda self, x: x + self.squeeze(x) + F.max_pool2d(x, 3, 1, 1), {"add"}),
    "norm_first": (lambda self, x: F.relu(self.norm(F.max_pool2d(x, 2))), {"batch_norm + relu"}),
}


def network(between: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(self.b(between(self, self.a(x))).mean((2, 3)))

    torch.manual_seed(0)
    layers = {"a": conv(3, 16), "squeeze": conv(16, 16, 1), "norm": nn.BatchNorm2d(16), "b": nn.LazyConv2d(8, 1)}
    model = Forward(forward, **layers, fc=nn.Linear(8, 10))
    with torch.no_grad():
        model(X)  # statistics, and the channels of `b`
    return model.eval()


class _Keeping(fx.Interpreter):
    """Keeps what each dequantize node gives, by the name of the quantizer."""

    def __init__(self, int8: lq.Int8Module, kept: dict[str, Tensor]) -> None:
        super().__init__(int8, graph=int8.graph)
        self.kept = kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and n.target is DEQUANTIZE_BUFFER:
            self.kept[str(n.args[1].target).removesuffix(".scale")] = value  # type: ignore[union-attr]
        return value


def calibrated_network(
    between: Callable[[Any, Tensor], Tensor], target: str | Target, **settings: Any
) -> tuple[nn.Module, Tensor]:
    model = network(between)
    with torch.no_grad():
        expected = model(X)
    return calibrated(model, X, example=X[:2], target=target, calibrator="minmax", **settings), expected


@pytest.mark.parametrize("name", OPERATORS)
def test_in_int8(name: str) -> None:
    between, kinds = OPERATORS[name]
    model, expected = calibrated_network(between, EXACT_ONNXRUNTIME)
    rows = {row.kind: row.precision for row in lq.report(model).layers}
    assert {kind: rows.get(kind) for kind in kinds} == dict.fromkeys(kinds, "int8")
    outputs = lq.convert(model)(X)
    assert (outputs - expected).norm() < 0.03 * expected.norm()
    # What the converted network rounds is what the prepared one does, but for the gates within an operator.
    with torch.no_grad():
        assert (outputs - model(X)).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", OPERATORS)
def test_on_onnx_runtime(name: str, tmp_path: Path) -> None:
    """Of the optimized graph nothing computes in float."""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, _ = calibrated_network(OPERATORS[name][0], X86_AVX2)
    written = lq.export(model, tmp_path / "int8.onnx", format="onnxruntime")
    assert [verification.runtime for verification in written.verifications] == ["onnxruntime"]
    assert written.verifications[0].relative_difference < 0.02
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    moves = {"Transpose", "Reshape", "Split", "Slice", "Flatten", "MaxPool", "NhwcMaxPool", "Squeeze"}
    inside = {"QuantizeLinear", "QGemm"}
    assert not [kind for kind in counts if not kind.startswith("QLinear") and kind not in moves | inside], counts
    assert counts["QuantizeLinear"] == 1  # of the input


def test_hard_swish_is_exact_but_for_its_rounding() -> None:
    """Each of the 256 integers of the input, through the INT8 operator, against arithmetic in float64."""
    model = nn.Sequential(conv(3, 16), nn.Hardswish(), conv(16, 4))
    with torch.no_grad():
        model[0].weight *= 8
    lq.calibrate(lq.prepare(model.eval(), X[:2], target="onnxruntime"), [X], calibrator="minmax")
    int8 = lq.convert(model)
    seen: dict[str, Tensor] = {}
    _Keeping(int8, seen).run(X)
    x, y = seen["0"].double(), seen["1"].double()
    gate = torch.round((x + 3).clamp(0, 6) * 255 / 6) / 255
    step = float(lq.quantizers(model)["1"].scale)
    assert x.min() < -3 and x.max() > 3
    torch.testing.assert_close(y, x * gate, atol=0.502 * step, rtol=0)
    torch.testing.assert_close(y, F.hardswish(x), atol=0.502 * step + float(x.abs().max()) / 510, rtol=0)


def test_elsewhere_the_convolution_does_it() -> None:
    """Where an engine fuses the operator into the convolution, no rounding comes between the two."""
    model, _ = calibrated_network(OPERATORS["silu"][0], "x86")
    (row,) = (row for row in lq.report(model).layers if row.name == "silu")
    assert row.precision == "float"
    assert not lq.quantizers(model)["a"].rounds


def test_overrides_name_operators() -> None:
    model, _ = calibrated_network(OPERATORS["silu"][0], "onnxruntime", overrides={"silu": None})
    (row,) = (row for row in lq.report(model).layers if row.name == "silu")
    assert row.precision == "float"
    lq.convert(model)


def test_training_watches_what_its_target_rounds(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    between = OPERATORS["silu"][0]
    model = lq.prepare(network(between), X[:2], target=X86_AVX2, mode="qat").train()
    model(X)
    with pytest.raises(ValueError, match="train with target='onnxruntime', or write format='onnx'"):
        lq.export(model.eval(), tmp_path / "int8.onnx", format="onnxruntime")
    with pytest.raises(ValueError, match="train with target='onnxruntime', or write format='onnx'"):
        lq.convert(model, "onnxruntime")
    model = lq.prepare(network(between), X[:2], target=EXACT_ONNXRUNTIME, mode="qat").train()
    model(X).sum().backward()
    written = lq.export(model.eval(), tmp_path / "int8.onnx", format="onnxruntime")
    assert written.verifications[0].relative_difference < 0.02
