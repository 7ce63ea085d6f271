"""Loading: one callable for every engine, and a clear word where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lightning.pytorch import Trainer
from onnx import TensorProto, helper

import lq
from helpers.classifiers import Wrapped, loader
from helpers.networks import WideResidual, randomize_batch_norm
from helpers.quantized import calibrated, noise
from lq.formats.onnx.read import CHECKSUM

X = noise(8, seed=1)

RUNTIMES = {"torch": "int8.pt2", "onnxruntime": "int8.onnx", "openvino": "int8.onnx"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = calibrated(randomize_batch_norm(WideResidual()), X)
    folder = tmp_path_factory.mktemp("files")
    for name in ("int8.pt2", "int8.onnx"):
        lq.export(model, folder / name, labels=list("abcdefghij"))
    return folder


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_arrays_and_tensors_in_tensors_out(runtime: str, folder: Path) -> None:
    model = lq.load(folder / RUNTIMES[runtime], runtime)
    assert model.runtime == runtime
    assert model.metadata is not None
    assert model.metadata.labels == tuple("abcdefghij")
    expected = model(X)
    assert isinstance(expected, torch.Tensor)
    assert expected.shape == (8, 10)
    assert expected.dtype == torch.float32
    for x in (X.numpy(), X.double(), X.numpy().astype(np.float64), X.clone().requires_grad_()):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x=X), expected)
    # Channels last, as images come; a view into a larger batch.
    assert torch.equal(model(X.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(model(X[::2]), expected[::2])
    # What was returned stays what it was when the model runs again.
    kept = expected.clone()
    model(X * 2)
    assert torch.equal(expected, kept)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_wrong_inputs(runtime: str, folder: Path) -> None:
    model = lq.load(folder / RUNTIMES[runtime], runtime)
    for shape in ((8, 4, 16, 16), (3, 16, 16), (8, 3)):
        with pytest.raises(ValueError, match=r"input 'x' must have the shape \(any, 3, .*got \("):
            model(torch.zeros(shape))
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(TypeError, match="input 'x' must be float32, got u?int"):
            model(X.to(dtype))
    with pytest.raises(TypeError, match="takes the inputs x; got 2 positional"):
        model(X, X)
    with pytest.raises(TypeError, match="takes the inputs x; got 0 positional arguments and y"):
        model(y=X)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads(runtime: str, folder: Path) -> None:
    before = torch.get_num_threads()
    one = lq.load(folder / RUNTIMES[runtime], runtime, threads=1)
    assert one.threads == 1
    torch.testing.assert_close(one(X), lq.load(folder / RUNTIMES[runtime], runtime)(X))
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads=0 must be at least 1"):
        lq.load(folder / RUNTIMES[runtime], runtime, threads=0)


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if these packages were not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name in packages else real(name, *args)

    monkeypatch.setattr("lq.deployment.formats.find_spec", find_spec)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_auto_takes_what_is_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lq.load(folder / "int8.pt2").runtime == "torch"
    assert lq.load(folder / "int8.onnx").runtime == "openvino"
    hide(monkeypatch, "openvino")
    assert lq.load(folder / "int8.onnx").runtime == "onnxruntime"
    with pytest.raises(lq.MissingRuntimeError, match=r"OpenVINO is not installed.*lightning-quantization\[openvino\]'"):
        lq.load(folder / "int8.onnx", "openvino")
    hide(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(lq.MissingRuntimeError, match=r"\[openvino\]' or pip install .*\[onnx\]'"):
        lq.load(folder / "int8.onnx")


def test_exporting_without_the_extra(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = lq.load(folder / "int8.pt2")
    assert isinstance(int8, lq.Int8Module)
    hide(monkeypatch, "onnxscript")
    with pytest.raises(lq.MissingRuntimeError, match=r"needs onnx and onnxscript .*'lightning-quantization\[onnx\]'"):
        lq.export(int8, tmp_path / "int8.onnx")
    callback = lq.QuantizationCallback(export=["onnx"], output_dir=str(tmp_path))
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False)
    with pytest.raises(lq.MissingRuntimeError, match="needs onnx and onnxscript"):  # and not after hours of training
        trainer.fit(Wrapped(), loader(), loader())
    assert list(tmp_path.iterdir()) == []


def test_choices(folder: Path) -> None:
    with pytest.raises(ValueError, match="runtime='tensorrt' is unknown; choose one of 'auto', 'torch', 'aoti'"):
        lq.load(folder / "int8.onnx", "tensorrt")
    with pytest.raises(ValueError, match="runtime='torch' does not read .* an ONNX model; choose 'openvino' or"):
        lq.load(folder / "int8.onnx", "torch")
    with pytest.raises(ValueError, match="runtime='openvino' does not read .* a torch.export program; choose 'torch'"):
        lq.load(folder / "int8.pt2", "openvino")
    with pytest.raises(FileNotFoundError, match="no such file"):
        lq.load(folder / "nowhere.onnx")


@pytest.mark.parametrize(("runtime", "engine"), [("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_onnx_files_that_no_engine_takes(runtime: str, engine: str, folder: Path, tmp_path: Path) -> None:
    whole = (folder / "int8.onnx").read_bytes()
    unknown = onnx.load(folder / "int8.onnx")
    unknown.graph.node[0].op_type = "Unheard"
    unknown.metadata_props.remove(next(entry for entry in unknown.metadata_props if entry.key == CHECKSUM))
    (tmp_path / "operator.onnx").write_bytes(unknown.SerializeToString())
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("hello")
    for name in ("operator", "half", "text"):
        message = rf"path='.*{name}\.onnx' is not an ONNX model that {engine} can run: it is damaged, or has an opset"
        with pytest.raises(ValueError, match=message):
            lq.load(tmp_path / f"{name}.onnx", runtime)


def test_an_opset_from_the_future(folder: Path, tmp_path: Path) -> None:
    future = onnx.load(folder / "int8.onnx")
    future.opset_import[0].version = 999
    (tmp_path / "future.onnx").write_bytes(future.SerializeToString())
    with pytest.raises(ValueError, match=r"future\.onnx' is not an ONNX model that ONNX Runtime can run: .*opset"):
        lq.load(tmp_path / "future.onnx", "onnxruntime")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx_files_from_elsewhere(runtime: str, tmp_path: Path) -> None:
    """No metadata of ours: names, shapes and types are those of the file."""
    a, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "ab")
    total, product = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("total", "product"))
    nodes = [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    graph = helper.make_graph(nodes, "elsewhere", [a, b], [total, product])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(file, tmp_path / "elsewhere.onnx")
    model = lq.load(tmp_path / "elsewhere.onnx", runtime)
    x, y = torch.rand(2, 4), torch.rand(2, 4)
    actual = model(x, b=y)
    assert isinstance(actual, tuple)
    torch.testing.assert_close(actual, (x + y, x * y))
    with pytest.raises(ValueError, match=r"input 'b' must have the shape \(any, 4\), got \(2, 5\)"):
        model(x, torch.rand(2, 5))
