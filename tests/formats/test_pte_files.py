"""``.pte`` files as bytes, and what is done where ExecuTorch is not installed: none of this needs it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import flatbuffers
import onnx
import pytest
import torch
from lightning.pytorch import Trainer
from onnx import numpy_helper
from torch import nn

import lq
from helpers.classifiers import Wrapped, loader
from helpers.networks import Gated, WideResidual, randomize_batch_norm
from helpers.quantized import calibrated, noise
from lq.deployment.formats import read_metadata
from lq.formats.executorch.read import CHECKSUM, NO_CHECKSUM, check_file, read_texts, with_checksum
from lq.graph.qdq import QUANTIZE_BUFFER

X = noise(8, seed=1)


def network(kind: type[nn.Module] = WideResidual) -> nn.Module:
    return randomize_batch_norm(kind())


def pte(**texts: str) -> bytes:
    """A program with methods that return texts, and one that returns nothing; written by the flatbuffers package."""
    builder = flatbuffers.Builder(0)
    plans = []
    for name, text in {"forward": None, **texts}.items():
        values = []
        if text is not None:
            content = builder.CreateString(text)
            builder.StartObject(1)
            builder.PrependUOffsetTRelativeSlot(0, content, 0)
            string = builder.EndObject()
            builder.StartObject(2)
            builder.PrependUint8Slot(0, 6, 0)  # KernelTypes.String
            builder.PrependUOffsetTRelativeSlot(1, string, 0)
            values.append(builder.EndObject())
        value_vector, called = vector(builder, values), builder.CreateString(name)
        builder.StartObject(10)
        builder.PrependUOffsetTRelativeSlot(0, called, 0)
        builder.PrependUOffsetTRelativeSlot(2, value_vector, 0)
        plans.append(builder.EndObject())
    plan_vector = vector(builder, plans)
    builder.StartObject(8)
    builder.PrependUOffsetTRelativeSlot(1, plan_vector, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ET12")
    return bytes(builder.Output())


def vector(builder: Any, items: list[int]) -> int:
    builder.StartVector(4, len(items), 4)
    for item in reversed(items):
        builder.PrependUOffsetTRelative(item)
    return int(builder.EndVector())


def test_texts_are_read_without_running_anything(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(pte(lq="{}", other="ärger"))
    assert read_texts(path) == {"lq": "{}", "other": "ärger"}
    check_file(path)  # one from elsewhere, without a checksum


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    whole = with_checksum(pte(**{"lq": "{}", CHECKSUM: NO_CHECKSUM}))
    path = tmp_path / "model.pte"
    path.write_bytes(whole)
    check_file(path)
    unnoticed = []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x21]) + whole[at + 1 :])
        try:
            check_file(path)
        except ValueError:
            continue
        unnoticed.append(path.read_bytes())
    # None but where the file no longer says that it has a checksum.
    assert len(unnoticed) < 150
    for content in unnoticed:
        path.write_bytes(content)
        assert CHECKSUM not in read_texts(path)


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    whole = with_checksum(pte(**{"lq": "{}", CHECKSUM: NO_CHECKSUM}))
    path = tmp_path / "model.pte"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"model\.pte' is not an ExecuTorch program, or is damaged|is damaged: its"
        ):
            lq.load(path, "executorch")
        with pytest.raises(ValueError, match=r"model\.pte' is no INT8 network written by lq, or is damaged"):
            read_metadata(path)


def test_programs_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(pte(get_vocab_size="32000"))
    with pytest.raises(ValueError, match="it does not describe its inputs: lq did not write it"):
        read_metadata(path)
    with pytest.raises(ValueError, match="runtime='openvino' does not read .* an ExecuTorch program; choose 'exec"):
        lq.load(path, "openvino")


@pytest.fixture
def no_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    real = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "executorch" else real(name, *args)

    monkeypatch.setattr("lq.deployment.formats.find_spec", find_spec)
    for name in [name for name in sys.modules if name.partition(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)


@pytest.mark.usefixtures("no_executorch")
def test_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(lq.MissingRuntimeError, match=r"needs executorch, .*'lightning-quantization\[executorch\]'"):
        lq.export(calibrated(network(), X), tmp_path / "int8.pte")
    callback = lq.QuantizationCallback(export=["executorch"], output_dir=str(tmp_path))
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False)
    with pytest.raises(lq.MissingRuntimeError, match="needs executorch"):  # and not after hours of training
        trainer.fit(Wrapped(), loader(), loader())
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "int8.pte"
    path.write_bytes(with_checksum(pte(**{"lq": "{}", CHECKSUM: NO_CHECKSUM})))
    with pytest.raises(lq.MissingRuntimeError, match=r"an ExecuTorch program, and no runtime .*\[executorch\]'"):
        lq.load(path)
    with pytest.raises(lq.MissingRuntimeError, match=r"ExecuTorch is not installed; .*\[executorch\]'"):
        lq.load(path, "executorch")


def test_names_of_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path='.*model\.pt2' must end in \.pte for format='executorch'"):
        lq.export(calibrated(network(), X), tmp_path / "model.pt2", format="executorch")


# The target: XNNPACK computes from integers to integers.


WEIGHTED = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
CLAMPS = (torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default)


@pytest.mark.parametrize("kind", [WideResidual, Gated])
@pytest.mark.parametrize("prepared_for", ["x86", "xnnpack"])
def test_all_that_is_weighted_gives_integers(kind: type[nn.Module], prepared_for: str) -> None:
    int8 = lq.convert(calibrated(network(kind), X, target=prepared_for), "xnnpack")
    weighted = [node for node in int8.graph.nodes if node.target in WEIGHTED]
    assert len(weighted) == len([m for m in kind().modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    for node in weighted:
        (user,) = node.users
        if user.target in CLAMPS:
            (user,) = user.users
        assert user.target is QUANTIZE_BUFFER
    # The network's result lies on a grid of 256 values.
    int8.execution = "simulation"
    scale = int8.get_buffer("fc.scale")
    steps = int8(X) / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    # What other targets do with it is as before: results are not rounded.
    other = lq.convert(calibrated(network(kind), X, target=prepared_for), "x86")
    assert "fc.scale" not in other.state_dict()


def test_the_ranges_of_results_are_their_own() -> None:
    model = lq.recalibrate(calibrated(network(), X), "minmax")
    scale = lq.convert(model, "xnnpack").get_buffer("fc.scale")
    with torch.no_grad():
        outputs = lq.unprepare(model)(X)
    torch.testing.assert_close(scale, (outputs.max().clamp(min=0) - outputs.min().clamp(max=0)) / 255)


def test_training_for_another_target_says_what_it_did_not_watch(tmp_path: Path) -> None:
    model = lq.prepare(Gated(), X, mode="qat", target="x86")
    model.train()(X)
    model.eval()
    with pytest.raises(ValueError, match="is rounded for XNNPACK, which training for target='x86' did not watch: tra"):
        lq.convert(model, "xnnpack")
    # A network in which only convolutions, ReLUs and sums are goes anywhere.
    model = lq.prepare(WideResidual(), X, mode="qat", target="x86")
    model.train()(X)
    assert "fc.scale" in lq.convert(model.eval(), "xnnpack").state_dict()


@pytest.mark.parametrize("format", ["onnx", "onnxruntime"])
def test_onnx_for_arm(format: Any, tmp_path: Path) -> None:
    """ONNX Runtime's ARM kernels multiply signed bytes, and add them; float scores come out."""
    path = tmp_path / "arm.onnx"
    lq.export(calibrated(network(), X, target="xnnpack"), path, format=format)
    model = onnx.load(path)
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    quantizes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {str(values[node.input[2]].dtype) for node in quantizes} == {"int8"}
    assert any(values[node.input[2]] != 0 for node in quantizes)  # affine
    (add,) = (node for node in model.graph.node if node.op_type == "Add")
    assert [made_by[name].op_type for name in add.input] == ["DequantizeLinear"] * 2
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert [made_by[name].op_type for name in node.input] == ["DequantizeLinear"] * 3
            assert values[made_by[node.input[1]].input[0]].dtype == "int8"
    assert made_by[model.graph.output[0].name].op_type == "Gemm"
