"""What kernels make of operators between them, in process and from a file."""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

import lq
from helpers.exact import assert_kernels_are_exact
from helpers.networks import DenseBlock, randomize_batch_norm
from helpers.patterns import Forward, conv
from helpers.quantized import calibrated, noise
from lq.deployment.formats import Format
from lq.graph.capture.signature import CallSignature
from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE, constant_qparams
from lq.int8.integers import quantize_normalized
from lq.int8.onednn import Packed, lower
from lq.int8.plans import KEPT, Plans
from lq.util.cpu import has_onednn_int8

X = noise(4, seed=1)
pytestmark = pytest.mark.skipif(not has_onednn_int8(), reason="no oneDNN INT8 kernels on this machine")

aten = torch.ops.aten
BINARY = torch.ops.onednn.qconv2d_pointwise.binary


def _transposed_residual(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    return self.fc(F.relu(self.b(y) + y.transpose(2, 3)).mean((2, 3)))


def _max_pool1d(self: Any, x: Tensor) -> Tensor:
    y = F.max_pool1d(F.relu(self.a(x.flatten(2))), 3, 2, padding=1)
    return self.fc(F.relu(self.b(y)).mean(2))


def _max_pool3d(self: Any, x: Tensor) -> Tensor:
    y = F.max_pool3d(F.relu(self.a(x[:, :, None].expand(-1, -1, 4, -1, -1))), 2)
    return self.fc(F.relu(self.b(y)).mean((2, 3, 4)))


def _adaptive_max_pool2d(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.relu(self.b(F.adaptive_max_pool2d(F.relu(self.a(x)), (4, 8)))).mean((2, 3)))


def _values_and_places(self: Any, x: Tensor) -> Tensor:
    y, places = F.adaptive_max_pool2d(F.relu(self.a(x)), 4, return_indices=True)
    return self.fc(F.relu(self.b(y)).mean((2, 3))) + places.sum((1, 2, 3))[:, None] * 1e-6


def _broadcast_sum(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    pooled = F.relu(self.c(F.adaptive_avg_pool2d(y, 1)))
    return self.fc(self.d(F.relu(self.b(y) + pooled)).mean((2, 3))) + self.e(pooled).mean((2, 3))


def _broadcast_convolution(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    return self.fc(self.d(F.relu(self.c(F.adaptive_avg_pool2d(y, 1)) + y)).mean((2, 3)))


def _alpha(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    return self.fc(self.d(F.relu(torch.add(self.b(y), y, alpha=2))).mean((2, 3)))


def _sum_relu6(self: Any, x: Tensor) -> Tensor:
    y = F.relu6(self.a(x) * 4)
    return self.fc(F.relu6(self.b(y) + y).mean((2, 3)))


def _twice(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


def _concat(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    parts = [F.relu(self.b(y)), self.c(y), F.avg_pool2d(y, 3, 1, 1), y]
    return self.fc(self.d(F.max_pool2d(torch.cat(parts, 1), 2)).mean((2, 3)))


def _plain(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def _signed(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.b(self.a(x)).mean((2, 3)))


def networks() -> dict[str, nn.Module]:
    """Networks for images ``(N, 3, 16, 16)`` with ten outputs."""

    def network(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> nn.Module:
        two_convolutions: dict[str, nn.Module] = {"a": conv(3, 8), "b": conv(8, 8), "fc": nn.Linear(8, 10)}
        return Forward(forward, **(two_convolutions | layers)).eval()

    circular: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    return {
        "transposed_residual": network(_transposed_residual),
        "max_pool1d": network(_max_pool1d, a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 8, 3)),
        "max_pool3d": network(_max_pool3d, a=nn.Conv3d(3, 8, 3, padding=1), b=nn.Conv3d(8, 8, 3, padding=1)),
        "adaptive_max_pool2d": network(_adaptive_max_pool2d),
        "values_and_places": network(_values_and_places),
        "broadcast_sum": network(_broadcast_sum, c=conv(8, 8, 1), d=conv(8, 8), e=conv(8, 10, 1)),
        "broadcast_convolution": network(_broadcast_convolution, c=conv(8, 8, 1), d=conv(8, 8)),
        "concat": network(_concat, c=conv(8, 8, 1), d=conv(32, 8)),
        "alpha": network(_alpha, d=conv(8, 8)),
        "sum_relu6": network(_sum_relu6),
        "twice": network(_twice),
        "circular": network(_plain, a=nn.Conv2d(3, 8, 3, **circular), b=nn.Conv2d(8, 8, 3, **circular)),
        "signed_input": network(_signed, b=nn.Conv2d(8, 8, 3, stride=2, padding=(2, 1), dilation=2)),
    }


#: What torch's exporter to ONNX has known since 2.13.
NEWER_IN_ONNX = ("adaptive_max_pool2d", "values_and_places")
EXPORTS_ADAPTIVE_MAX_POOLS = TorchVersion(torch.__version__) >= "2.13"


@pytest.mark.parametrize("name", networks())
def test_kernels_in_process_and_from_files(name: str, tmp_path: Path) -> None:
    model = calibrated(networks()[name], X)
    int8 = lq.convert(model)
    assert_kernels_are_exact(int8, X)
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert isinstance(loaded, lq.Int8Module)
    assert_kernels_are_exact(loaded, X)
    loaded.execution = int8.execution = "simulation"
    torch.testing.assert_close(loaded(X), int8(X))
    if name in NEWER_IN_ONNX and not EXPORTS_ADAPTIVE_MAX_POOLS:
        with pytest.raises(ValueError, match="adaptive_max_pool2d"):
            lq.export(model, tmp_path / "int8.onnx")
    else:
        assert not lq.export(model, tmp_path / "int8.onnx").unreadable


def test_integers_stay_on_a_narrow_grid() -> None:
    model = networks()["circular"]
    lq.calibrate(lq.prepare(model, X, target="x86_avx2", overrides={"a": {"activation_bits": 4}}), [X])
    assert_kernels_are_exact(lq.convert(model), 3 * X)  # beyond the range that was calibrated


def test_a_layer_that_is_called_twice_has_two_names(tmp_path: Path) -> None:
    lq.export(calibrated(networks()["twice"], X), tmp_path / "int8.onnx", verify=False)
    names = [node.name for node in onnx.load(tmp_path / "int8.onnx").graph.node if node.op_type == "Conv"]
    assert names == ["a", "b", "b:2"]


def test_kernels_write_the_integers_of_a_concatenation() -> None:
    """Which are those of the simulation, with a layer's output among the parts that others read as well."""
    model = calibrated(networks()["concat"], X, target="x86")
    int8 = lq.convert(model)
    lowered = lower(constant_qparams(int8.graph, int8), int8, [X])
    written = [node for node in lowered.graph.nodes if "pointwise" in str(node.target)]
    in_float = [node for node in written if torch.float32 in node.args]
    assert len(written) == 5 and len(in_float) == 1  # the last layer
    assert lowered.unfused == {} and lowered.float_ops == []


def test_a_sum_is_clamped_on_integers() -> None:
    lowered = lq.convert(calibrated(networks()["sum_relu6"], X)).kernels()
    assert BINARY in [node.target for node in lowered.graph.nodes]
    assert lowered.unfused == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("alpha", "added in float: the sum has alpha=2"),
        ("broadcast_convolution", r"added in float: the convolution gives the shape \(2, 8, 1, 1\), the other"),
    ],
)
def test_what_does_not_fuse_is_told(name: str, reason: str, tmp_path: Path) -> None:
    lq.export(calibrated(networks()[name], X), tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert isinstance(loaded, lq.Int8Module)
    (told,) = loaded.kernels().unfused.values()
    assert re.match(reason, told)


def test_sizes_in_any_order_and_few_plans() -> None:
    int8 = lq.convert(calibrated(networks()["broadcast_sum"], X))
    single = int8(X[:1])
    torch.testing.assert_close(int8(X)[:1], single)
    for shape in ((1, 3, 16, 16), (7, 3, 16, 16), (2, 3, 20, 12), (1, 3, 16, 16), (3, 3, 9, 9), (5, 3, 8, 8)):
        x = torch.randn(shape)
        assert_kernels_are_exact(int8, x)
        assert torch.equal(int8(x), int8(x))  # the call that makes the plan, and one that uses it
    plans = int8._compiled["kernels"]
    assert isinstance(plans, Plans)
    for size in range(1, KEPT + 3):
        int8(X[:1].repeat(size, 1, 1, 1))
    assert len(plans) == KEPT


def test_plans_share_weights() -> None:
    int8 = lq.convert(calibrated(networks()["broadcast_sum"], X))
    graph, packed = constant_qparams(int8.graph, int8), Packed()
    two, three, again = (lower(graph, int8, [X[:size]], packed=packed) for size in (2, 3, 2))
    weights = [name for name in two.constants if name.endswith("_weight")]
    assert weights and all(two.constants[name] is three.constants[name] is again.constants[name] for name in weights)
    del two, three, again
    assert len(packed) == 0  # no plan, no weights


def test_threads_share_what_one_of_them_makes() -> None:
    made: list[int] = []
    started = threading.Barrier(4)

    def make(inputs: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
        made.append(len(inputs[0]))
        return (lambda x: x + 1), inputs[0] + 1

    plans = Plans(make, kept=2)

    def call() -> None:
        started.wait()
        for _ in range(20):
            assert torch.equal(plans(X), X + 1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [4]
    for size in (1, 2, 1, 4):  # the least recently called was dropped: 4, and then 2
        plans(X[:size])
    assert made == [4, 1, 2, 4]


class ExportedForms(nn.Module):
    """Buffers for a graph of ATen operators."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-64, 65, (8, 8, 3), dtype=torch.int8, generator=generator))
        self.register_buffer("scale", torch.rand(8, generator=generator) * 0.01 + 0.001)
        self.register_buffer("zero_point", torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("dims", "pool", "args", "gives_places"),
    [
        (1, aten.max_pool1d.default, ([2],), False),
        (1, aten.max_pool1d.default, ([3], [2], [1]), False),
        (1, aten.adaptive_max_pool1d.default, ([5],), True),
        (2, aten.max_pool2d.default, ([2, 2],), False),
        (2, aten.max_pool2d_with_indices.default, ([3, 3], [2, 2], [1, 1]), True),
        (2, aten.adaptive_max_pool2d.default, ([3, 4],), True),
        (3, aten.max_pool3d.default, ([2, 2, 2], [1, 1, 1]), False),
        (3, aten.adaptive_max_pool3d.default, ([3, 3, 4],), True),
    ],
)
def test_pools_as_exported(dims: int, pool: Any, args: tuple[Any, ...], gives_places: bool) -> None:
    """dequantize → pool → quantize on one grid is the pool of the integers."""
    root, graph = ExportedForms(), fx.Graph()
    root.weight = root.weight.reshape(8, 8, 3, *[1] * (dims - 1))
    grid = (0.05, 100, 0, 255, torch.uint8)
    value = graph.call_function(QUANTIZE, (graph.placeholder("x"), *grid))
    value = graph.call_function(pool, (graph.call_function(DEQUANTIZE, (value, *grid)), *args))
    if gives_places:
        value = graph.call_function(operator.getitem, (value, 0))
    value = graph.call_function(QUANTIZE, (value, *grid))
    value = graph.call_function(DEQUANTIZE, (value, *grid))
    weight = (graph.get_attr("weight"), graph.get_attr("scale"), graph.get_attr("zero_point"))
    weight_node = graph.call_function(DEQUANTIZE_WEIGHT, (*weight, 0, -127, 127, torch.int8))
    convolution = getattr(aten, f"conv{dims}d").default
    graph.output(graph.call_function(convolution, (value, weight_node, None, [1] * dims)))
    x = torch.randn(2, 8, *[8] * dims)
    lowered = lower(graph, root, [x])
    targets = [getattr(node.target, "__name__", str(node.target)) for node in lowered.graph.nodes]
    assert [name for name in targets if "quantize" in name] == ["quantize_activation"]
    expected = fx.GraphModule(root, graph)(x)
    torch.testing.assert_close(lowered.outputs, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


class PreActivated(nn.Module):
    """Batch norms with nothing before them to fold them into, as in a DenseNet; one is read twice."""

    def __init__(self, clamp: nn.Module, function: Callable[[Tensor], Tensor], **settings: Any) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 1)
        self.b, self.clamp, self.function = nn.Conv2d(8, 8, 3), clamp, function
        self.norm, self.again = nn.BatchNorm2d(11, **settings), nn.BatchNorm2d(8)
        for norm in (self.norm, self.again):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.2, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1, 1), nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Values of the stem are some of its maxima: on its grid, where the image is on another one.
        parts = [F.max_pool2d(self.stem(x), 3, 1, 1), x]
        x = self.a(self.clamp(self.norm(self.function(torch.cat(parts, 1)))))
        y = self.again(F.max_pool2d(x, 2))
        return self.b(F.relu(y)).mean((2, 3)) + y.mean((2, 3))


@pytest.mark.parametrize("clamp", [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("reads_integers", [True, False])
def test_batch_norms_give_integers(clamp: nn.Module, affine: bool, reads_integers: bool) -> None:
    model = PreActivated(clamp, (lambda x: x) if reads_integers else torch.sin, affine=affine)
    int8 = lq.convert(calibrated(model.eval(), X, target="x86_avx2"))
    kernels = [node.target for node in lower(constant_qparams(int8.graph, int8), int8, [X]).graph.nodes]
    assert kernels.count(quantize_normalized) == (0 if reads_integers else 1)  # `again` is read in float, too
    assert kernels.count(torch.ops.onednn.qconv2d_pointwise.default) == (4 if reads_integers else 3)
    assert_kernels_are_exact(int8, X)


def test_features_are_integers_from_layer_to_layer() -> None:
    """What is only joined and normalized between kernels is not computed in float, and each part keeps its grid."""
    model = randomize_batch_norm(DenseBlock()).eval()
    int8 = lq.convert(calibrated(model, X, target="x86_avx2"))
    kernels = [node.target for node in lower(constant_qparams(int8.graph, int8), int8, [X]).graph.nodes]
    assert kernels.count(torch.ops.onednn.qconv2d_pointwise.default) == 4 + 3
    assert kernels.count(aten.cat.default) == 2 + 1
    assert aten.batch_norm.default not in kernels and aten.relu.default not in kernels
    assert_kernels_are_exact(int8, X)
    expected = model(X)
    assert (int8(X) - expected).norm() < 0.03 * expected.norm()


class WithASize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3)

    def forward(self, x: Tensor, size: Any = (4, 4)) -> Tensor:
        return F.adaptive_avg_pool2d(self.b(F.relu(self.a(x))), size).mean((2, 3))


def test_linear_layers_on_positions_for_no_samples() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU()]
    float_model = Forward(
        lambda self, x: self.fc(self.a(x).permute(0, 2, 3, 1)), a=nn.Sequential(*layers), fc=nn.Linear(8, 5)
    ).eval()
    int8 = lq.convert(calibrated(float_model, X, target="x86"))
    assert int8(X[:0]).shape == (0, 14, 14, 5)


def test_numpy_batches() -> None:
    model = lq.prepare(WithASize().eval(), X.numpy())
    lq.calibrate(model, [X.numpy(), X])
    int8 = lq.convert(model)
    assert torch.equal(int8(X.numpy()), int8(X))


def test_arguments_are_told_apart_by_what_is_in_them() -> None:
    signature = CallSignature(WithASize.forward)
    inputs, settings = signature.bind((X.numpy(),), {"size": [4, 4]})
    assert isinstance(inputs["x"], Tensor)
    assert settings == {"size": [4, 4]}


def test_an_engine_that_cannot_read_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart from a wrong file: it is said, the other engine judges."""
    openvino = pytest.importorskip("openvino")

    def fails(self: Any, path: str) -> None:
        raise RuntimeError("no such operator here")

    monkeypatch.setattr(openvino.Core, "read_model", fails)
    with pytest.warns(UserWarning, match="openvino cannot run the file: no such operator here"):
        result = lq.export(calibrated(networks()["twice"], X), tmp_path / "int8.onnx")
    assert result.unreadable == {"openvino": "no such operator here"}
    assert [found.runtime for found in result.verifications] == ["onnxruntime"]
    assert "openvino cannot run it: no such operator here" in str(result)
    monkeypatch.setattr(Format, "installed_runtimes", lambda self: ("openvino",))
    with (
        pytest.warns(UserWarning, match="openvino cannot run"),
        pytest.raises(ValueError, match="none of the engines that are installed can run the file.*verify=False"),
    ):
        lq.export(calibrated(networks()["twice"], X), tmp_path / "other.onnx")
    assert list(tmp_path.iterdir()) == [tmp_path / "int8.onnx"]


def test_containers_of_results_are_the_callers_own() -> None:
    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        y = F.relu(self.a(x))
        return {"out": self.b(y), "features": [y, self.b(y)]}

    float_model = Forward(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 5, 3)).eval()
    int8 = lq.convert(calibrated(float_model, X, target="x86"))
    for _ in range(2):  # the first call makes the plan, the second one runs it
        results = int8(X)
        results["more"] = results["features"].pop()
        assert type(results) is dict and type(results["features"]) is list
