"""ONNX files: what is in them, and what engines make of them."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.networks import WideResidual, randomize_batch_norm
from helpers.quantized import TARGET, calibrated, noise
from lq.deployment import formats
from lq.util.cpu import has_vnni

X = noise(8, seed=1)

RUNTIMES = ("onnxruntime", "openvino")


def calibrated_network(model: nn.Module | None = None, x: Tensor = X, target: str = TARGET) -> nn.Module:
    return calibrated(randomize_batch_norm(WideResidual() if model is None else model), x, target=target)


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def optimized(path: Path, tmp_path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Further levels lay tensors out for this CPU, under names that depend on it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


LABELS = [f"class {index}" for index in range(10)]
PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "range": "[0, 1]"}


class Files:
    """One calibrated model, exported for several targets: ``{None: ..., "tensorrt": ...}``."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = calibrated_network()
        self.output = self.model(X)
        self.state = copy.deepcopy(self.model.state_dict())
        targets = (None, "x86_avx2", "onnxruntime", "tensorrt", "xnnpack")
        self.paths = {target: folder / f"{target}.onnx" for target in targets}
        self.results = {
            target: lq.export(
                self.model,
                path,
                target=target,
                labels=LABELS,
                preprocessing=PREPROCESSING,
                verify=target is None,
            )
            for target, path in self.paths.items()
        }

    def proto(self, target: str | None = None) -> onnx.ModelProto:
        return onnx.load(self.paths[target])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("onnx"))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_engines_compute_what_the_simulation_does(runtime: str, files: Files) -> None:
    found = next(found for found in files.results[None].verifications if found.runtime == runtime)
    assert found.relative_difference < 0.05
    int8 = lq.convert(files.model)
    int8.execution = "simulation"
    loaded = lq.load(files.paths[None], runtime)
    for size in (1, 3, 8):
        difference = (loaded(X[:size]) - int8(X[:size])).square().mean().sqrt()
        assert difference < 0.05 * int8(X).square().mean().sqrt()


def test_weights_biases_and_batch(files: Files) -> None:
    file, model = files.proto(), files.model
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 18)]
    values, made_by = initializers(file), makers(file)
    int8 = lq.convert(model)
    layers = [node for node in file.graph.node if node.op_type in ("Conv", "Gemm")]
    assert {node.name for node in layers} == {"stem", "conv1", "conv2", "down.0", "fc"}
    for node in layers:
        x, weight, bias = (made_by[name] for name in node.input)
        assert {x.op_type, weight.op_type, bias.op_type} == {"DequantizeLinear"}
        assert values[weight.input[0]].dtype == np.int8
        np.testing.assert_array_equal(values[weight.input[0]], int8.state_dict()[f"{node.name}.weight"].numpy())
        assert values[bias.input[0]].dtype == np.int32
        # The scale of a sum of products, which is what the bias is added to.
        products = values[x.input[1]] * values[weight.input[1]]
        np.testing.assert_allclose(values[bias.input[1]], products, rtol=1e-6)
        real = values[bias.input[0]] * values[bias.input[1]].astype(np.float64)
        np.testing.assert_allclose(real, int8.state_dict()[f"{node.name}.bias"].numpy(), atol=products.max())
    shape = file.graph.input[0].type.tensor_type.shape
    assert [axis.dim_param or axis.dim_value for axis in shape.dim] == ["batch", 3, 16, 16]
    # Nothing of the machine that wrote it.
    assert b".py" not in files.paths[None].read_bytes()


def test_onnx_runtime_runs_every_layer_and_sum_in_int8(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=10)
    model = calibrated_network(network, torch.randn(2, 3, 32, 32))
    lq.export(model, tmp_path / "int8.onnx", verify=False)
    found = optimized(tmp_path / "int8.onnx", tmp_path)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (convolutions, 8, 1)
    assert not found.keys() & {"Conv", "Add", "Gemm", "Relu", "FusedConv", "ConvInteger"}
    # One position is left in layer4: the rest of a 3x3 kernel meets padding there, and is not in the file.
    weight = initializers(onnx.load(tmp_path / "int8.onnx"))["layer4.1.conv2.weight"]
    whole = lq.convert(model).state_dict()["layer4.1.conv2.weight"]
    np.testing.assert_array_equal(weight, whole[:, :, 1:2, 1:2].numpy())


def test_residual_adds_are_placed_as_the_target_says(files: Files) -> None:
    quantized = {}
    for target in files.paths:
        file = files.proto(target)
        (add,) = [node for node in file.graph.node if node.op_type == "Add"]
        quantized[target] = sorted(makers(file)[name].op_type for name in add.input)
    both, fused = ["DequantizeLinear"] * 2, ["Conv", "DequantizeLinear"]
    assert quantized == {None: both, "x86_avx2": fused, "onnxruntime": both, "tensorrt": fused, "xnnpack": both}


def test_one_set_of_scales(files: Files) -> None:
    scales = {}
    for target in (None, "x86_avx2", "onnxruntime"):
        file = files.proto(target)
        values = initializers(file)
        scales[target] = {
            node.output[0]: (float(values[node.input[1]]), int(values[node.input[2]]))
            for node in file.graph.node
            if node.op_type == "QuantizeLinear"
        }
    assert scales[None] == scales["onnxruntime"]
    assert scales["x86_avx2"].items() < scales["onnxruntime"].items()
    quantizers = lq.quantizers(files.model)
    for name, (scale, zero_point) in scales[None].items():
        quantizer = quantizers.get(name.removesuffix(".quantized"))
        if quantizer is not None:  # else integers that were moved and are quantized once more
            assert (scale, zero_point) == (float(quantizer.scale), int(quantizer.zero_point))


def test_tensorrt_explicit_quantization(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=10)
    model = calibrated_network(network, torch.randn(4, 3, 32, 32))
    result = lq.export(model, tmp_path / "int8.onnx", target="tensorrt", verify=False)
    assert result.target == "tensorrt"
    file = onnx.load(tmp_path / "int8.onnx")
    values, made_by = initializers(file), makers(file)
    for node in file.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
        if node.op_type in ("Conv", "Gemm"):
            x, weight = (made_by[name] for name in node.input[:2])
            assert x.op_type == "DequantizeLinear"
            assert weight.op_type == "DequantizeLinear"
            assert values[weight.input[1]].shape == (len(values[weight.input[0]]),)
            assert [attribute.i for attribute in weight.attribute if attribute.name == "axis"] == [0]
            # TensorRT's parser takes no integers for a bias.
            assert len(node.input) < 3 or values[node.input[2]].dtype == np.float32
        if node.op_type == "Add":
            # The convolution adds on its way out; what it adds comes in as integers.
            assert sorted(made_by[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]


@pytest.mark.parametrize("target", ["tensorrt", "xnnpack"])
def test_signed_activations_on_onnx_runtime(target: str, files: Files) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(files.paths[target], options, providers=["CPUExecutionProvider"])
    int8 = lq.convert(files.model, target)
    int8.execution = "simulation"
    (actual,) = session.run(None, {"x": X.numpy()})
    assert np.square(actual - int8(X).numpy()).mean() < 0.02**2 * np.square(int8(X).numpy()).mean()


def test_metadata(files: Files, tmp_path: Path) -> None:
    properties = {entry.key: entry.value for entry in files.proto().metadata_props}
    assert properties["labels"].split("\n") == LABELS
    assert properties["lq.target"] == TARGET
    for runtime in RUNTIMES:
        metadata = lq.load(files.paths[None], runtime).metadata
        assert metadata is not None
        assert metadata.labels == tuple(LABELS)
        assert metadata.preprocessing == PREPROCESSING
        assert metadata.target == TARGET
    with pytest.raises(ValueError, match="(?s)preprocessing=.* must be a mapping of JSON values"):
        lq.export(files.model, tmp_path / "int8.onnx", preprocessing={"mean": X})


class DeadChannels(nn.Module):
    """Channels whose weights are next to nothing, with biases of every size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        with torch.no_grad():
            self.conv.weight[0] = 0
            self.conv.weight[1] *= 1e-9
            self.conv.weight[2] *= 1e-12
            self.conv.bias.copy_(torch.tensor([3.0, -2.0, 50.0, 1e-20, 0.0, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def test_biases_of_dead_channels_fit_in_32_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = lq.export(calibrated_network(DeadChannels()), tmp_path / "int8.onnx")
    assert all(found.relative_difference < 0.02 for found in result.verifications)
    file = onnx.load(tmp_path / "int8.onnx")
    assert np.abs(initializers(file)["conv.bias.quantized"].astype(np.int64)).max() <= 2**30 + 1


class Structured(nn.Module):
    """Takes a dict and a tensor, gives a dict with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, batch: dict[str, Tensor], extra: Tensor) -> dict[str, Any]:
        x = F.relu(self.conv(batch["image"])).mean((2, 3)) + batch["index"][:, None]
        return {"logits": self.fc(x + extra), "features": [x]}


def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    def arguments(size: int) -> dict[str, Any]:
        batch = {"image": X[:size], "index": torch.arange(size)}
        return {"batch": batch, "extra": torch.ones(size, 8)}

    model = Structured().eval()
    lq.calibrate(lq.prepare(model, arguments(8), target=TARGET), [arguments(8)])
    lq.export(model, tmp_path / "int8.onnx")
    int8 = lq.convert(model)
    for runtime in RUNTIMES:
        loaded = lq.load(tmp_path / "int8.onnx", runtime)
        for size in (8, 1, 3):
            call, expected = arguments(size), int8(**arguments(size))
            for actual in (loaded(**call), loaded(call["batch"], call["extra"])):
                torch.testing.assert_close(actual["logits"], expected["logits"], atol=0.05, rtol=0.05)
                torch.testing.assert_close(actual["features"], expected["features"], atol=0.05, rtol=0.05)
        with pytest.raises(TypeError, match="takes the inputs batch, extra; got 1 positional"):
            loaded(X)
        with pytest.raises(TypeError, match="nested as"):
            loaded({"image": X, "other": torch.arange(8)}, torch.ones(8, 8))


def test_a_network_from_a_file_goes_on_to_onnx(tmp_path: Path) -> None:
    model = calibrated_network()
    lq.export(lq.convert(model), tmp_path / "int8.pt2", labels=["a", "b"])
    loaded = lq.load(tmp_path / "int8.pt2")
    assert isinstance(loaded, lq.Int8Module)
    lq.export(loaded, tmp_path / "int8.onnx")
    again = lq.load(tmp_path / "int8.onnx")
    assert again.metadata is not None
    assert again.metadata.labels == ("a", "b")
    torch.testing.assert_close(again(X), loaded(X), atol=0.05, rtol=0.05)


def test_another_opset(files: Files, tmp_path: Path) -> None:
    lq.export(files.model, tmp_path / "int8.onnx", opset=21)
    assert onnx.load(tmp_path / "int8.onnx").opset_import[0].version == 21


@pytest.mark.parametrize("wrong", ["scale", "weight", "bias", "last layer"])
def test_a_file_that_differs_is_refused_with_the_first_layer_that_does(
    wrong: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = files.model, tmp_path / "int8.onnx"
    path.write_bytes(files.paths[None].read_bytes())
    before = path.read_bytes()

    def tampered(*args: Any, **kwargs: Any) -> Any:
        file = files.proto()
        made_by, values = makers(file), {value.name: value for value in file.graph.initializer}
        node = next(n for n in file.graph.node if n.name == ("fc" if wrong == "last layer" else "conv2"))
        source, index = {"scale": (0, 1), "weight": (1, 0), "bias": (2, 0), "last layer": (2, 0)}[wrong]
        found = made_by[node.input[source]]
        value = numpy_helper.to_array(values[found.input[index]])
        changed = value * np.float32(1.1) if wrong == "scale" else np.roll(value, 1, 0)
        file.graph.initializer.append(numpy_helper.from_array(changed.astype(value.dtype), "tampered"))
        found.input[index] = "tampered"
        return file

    monkeypatch.setattr(formats, "to_onnx", tampered)
    where = "in its last layer" if wrong == "last layer" else r"in the layer that ends in '(bn2|relu_2)'"
    with pytest.raises(lq.ExportMismatchError, match=where):
        lq.export(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    lq.export(model, path, verify=False)  # as asked for


def test_the_model_is_left_as_it_was(files: Files) -> None:
    assert torch.equal(files.model(X), files.output)
    assert all(torch.equal(value, files.state[key]) for key, value in files.model.state_dict().items())


def test_bad_arguments(files: Files, tmp_path: Path) -> None:
    model = files.model
    int8 = lq.convert(model)
    for path, arguments, message in (
        ("int8.bin", {}, r"path='.*int8\.bin' must end in \.pt2 or \.onnx"),
        ("int8.onnx", {"format": "pt2"}, r"must end in \.pt2 for format='pt2'"),
        ("int8.onnx", {"format": "tflite"}, "format='tflite' is unknown; choose one of 'pt2', 'aoti', 'onnx'"),
        (
            "int8.onnx",
            {"target": "arm"},
            "target='arm' is unknown; choose one of 'auto', 'x86', 'x86_avx2'",
        ),
        ("int8.onnx", {"samples": {"y": X}}, "samples must be inputs of the network, x; got y"),
        ("int8.onnx", {"opset": 999}, "opset=999 is not supported by torch's exporter"),
        ("int8.onnx", {"opset": 17}, "opset=17 is not supported by torch's exporter here, which wrote opset 18"),
    ):
        with pytest.raises(ValueError, match=message):
            lq.export(model, tmp_path / path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="converted for 'x86_avx2' and holds no other ranges; export the prepared"):
        lq.export(int8, tmp_path / "int8.onnx", target="tensorrt")
    with pytest.raises(ValueError, match="have no range yet"):
        lq.export(lq.prepare(WideResidual(), X), tmp_path / "int8.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(has_vnni(), reason="this CPU's kernels do not overflow")
def test_8_bit_weights_on_a_cpu_without_vnni(tmp_path: Path) -> None:
    """The file is right and stays; that this machine's engines overflow with it is said."""
    model = randomize_batch_norm(WideResidual()).eval()
    x = X + 5  # one sign: nothing cancels in the sums
    lq.calibrate(lq.prepare(model, x, target="onnxruntime"), [x])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = lq.export(model, tmp_path / "int8.onnx")
    off = [found for found in result.verifications if found.relative_difference > 0.1]
    assert len([w for w in caught if "16 bits, which 8-bit weights overflow" in str(w.message)]) == len(off)
    assert result.path.exists()
