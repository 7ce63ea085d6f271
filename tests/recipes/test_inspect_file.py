"""`python -m lq.recipes.inspect_file`: any file that lq writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import lq
from helpers.classifiers import Wrapped
from helpers.finished_run import BROKEN, FinishedRun
from helpers.modes import both_modes
from helpers.page_reader import read
from helpers.runs import every_epoch, module, quantization, train_data, trainer, val_data
from lq.recipes import inspect_file
from lq.recipes.blocks.config import main
from lq.timing.benchmark import Benchmark, BenchmarkRow


def inspected(*arguments: object) -> None:
    main(inspect_file.Config, inspect_file.run, inspect_file.plan, argv=[str(argument) for argument in arguments])


def test_result(ptq_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspected(ptq_run.int8 / "int8.json", f"output_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert "PTQ for x86_avx2" in printed
    assert "conv + batch_norm + relu" in printed
    page = tmp_path / "int8.json.html"
    assert f"written: {page}" in printed
    assert read(page.read_text()).texts["strong"][0] == BROKEN


def test_network_with_the_result_beside_it(ptq_run: FinishedRun, tmp_path: Path) -> None:
    inspected(ptq_run.int8 / "int8.pt2", f"output_dir={tmp_path}")
    assert "Advice" in read((tmp_path / "int8.pt2.html").read_text()).texts["h2"]


def test_networks_alone(ptq_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ptq_run.int8 / "int8.pt2", tmp_path / "copy.pt2")
    files = [tmp_path / "copy.pt2"]
    try:
        lq.export(_prepared(), tmp_path / "copy.onnx")
        files.append(tmp_path / "copy.onnx")
    except lq.MissingRuntimeError:
        pass
    inspected(*files)
    for file in files:
        reader = read(file.with_name(f"{file.name}.html").read_text())
        assert reader.texts["h2"] == ["Layers", "Settings"]
        assert any(cell.startswith("input: float32 any×3×") for cell in reader.texts["td"])
    assert "layers in INT8" in capsys.readouterr().out


def _prepared() -> torch.nn.Module:
    network = lq.prepare(Wrapped().model.eval(), torch.randn(2, 3, 8, 8), target="x86_avx2")
    return lq.calibrate(network, [torch.randn(8, 3, 8, 8)])


@both_modes
def test_checkpoint(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), every_epoch(tmp_path), epochs=1)
    run.fit(module(), train_data(), val_data())
    if mode == "ptq":
        run.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")  # of the INT8 model
    inspected(tmp_path / "checkpoints" / "last.ckpt", f"output_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert "8 quantizers" in printed  # one of them watches the result
    assert f"mode: {mode}" in printed
    cells = read((tmp_path / "last.ckpt.html").read_text()).texts["td"]
    assert {"input", "0.weight", "moving_average" if mode == "qat" else "minmax"} <= set(cells)


def test_time_on_every_runtime(ptq_run: FinishedRun, tmp_path: Path) -> None:
    rows = (
        BenchmarkRow("float", "eager", 1, 2, 7.9, 8.0, 126.0, None, 300.0, 44.8, None),
        BenchmarkRow("int8.onnx", "openvino", 1, 2, 0.9, 1.0, 1111.0, 8.8, 100.0, 11.6, 0.99),
    )
    Benchmark(rows, {}, "cpu").save_csv(tmp_path / "benchmark.csv")
    inspected(ptq_run.int8 / "int8.json", f"output_dir={tmp_path}", f"benchmark={tmp_path / 'benchmark.csv'}")
    reader = read((tmp_path / "int8.json.html").read_text())
    assert "Runtimes" in reader.texts["h2"]
    assert {"openvino", "0.9", "8.80×"} <= set(reader.texts["td"])


def test_what_is_no_file_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "float.ckpt")
    (tmp_path / "text.ckpt").write_text("text")
    (tmp_path / "other.json").write_text("{}")
    for name, said in (
        ("nowhere.pt2", "no such file"),
        ("float.ckpt", "it holds a float model"),
        ("text.ckpt", "it is not a checkpoint, or is damaged"),
        ("other.json", "not what lq writes to int8.json"),
    ):
        with pytest.raises(SystemExit):
            inspected(tmp_path / name)
        assert said in capsys.readouterr().err
