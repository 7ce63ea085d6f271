"""The benchmark: real processes, real files; what it says of them, not how fast they are."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

import lq
from helpers.quantized import noise
from lq.models import build_small_mobilenet_v2
from lq.recipes import bench_peers
from lq.recipes import benchmark as recipe
from lq.recipes.blocks.config import main

X = noise(12, 32, seed=1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for ins, outs in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(ins, outs, 3, stride=2, padding=1), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


@pytest.fixture(scope="module")
def files(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import copy

    model = copy.deepcopy(network)
    lq.calibrate(lq.prepare(model, X, target="x86_avx2"), [X])
    folder = tmp_path_factory.mktemp("files")
    for name in ("int8.onnx", "int8.pt2"):
        lq.export(model, folder / name, verify=False)
    return [folder / "int8.onnx", folder / "int8.pt2"]


def test_every_runtime_against_float(network: nn.Module, files: list[Path], tmp_path: Path) -> None:
    found = lq.benchmark(files, float_model=network, folded=True, batch_sizes=[5], threads=[1], samples=X, seconds=0.1)
    assert not found.failures
    contenders = [("float", "eager"), ("float", "folded")]
    contenders += [("int8.onnx", "openvino"), ("int8.onnx", "onnxruntime"), ("int8.pt2", "torch")]
    assert [(row.model, row.runtime, row.batch_size) for row in found.rows] == [
        (*contender, 5) for contender in contenders
    ]
    reference = network(X).argmax(1)
    for row in found.rows:
        assert 0 < row.p50_ms <= row.p95_ms
        assert row.throughput == pytest.approx(row.batch_size / row.p50_ms * 1e3)
        assert row.memory_mb > 0
        if row.model != "float":
            path = next(path for path in files if path.name == row.model)
            assert row.file_mb == pytest.approx(path.stat().st_size / 1e6)
            classes = lq.load(path, row.runtime)(X).argmax(1)
            assert row.top1_agreement == pytest.approx(float((classes == reference).double().mean()), abs=0.1)
    float_row, folded_row = found.rows[:2]
    assert float_row.speedup == float_row.top1_agreement == folded_row.top1_agreement == 1.0
    assert folded_row.file_mb < float_row.file_mb
    text = str(found)
    assert all(word in text for word in ("openvino", "top-1 agreement", "cores"))
    found.save_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["p50_ms"]) for row in rows] == [row.p50_ms for row in found.rows]
    found.save_chart(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_fails_is_named_and_the_others_go_on(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "half.onnx").write_bytes(files[0].read_bytes()[:5000])
    found = lq.benchmark([files[0], tmp_path / "half.onnx"], runtimes=["onnxruntime"], samples=X, seconds=0.1)
    assert [(row.model, row.speedup, row.top1_agreement) for row in found.rows] == [("int8.onnx", None, None)]
    (failure,) = found.failures
    assert failure.startswith("half.onnx, onnxruntime")
    assert "half.onnx, onnxruntime, batch 1 did not run: ValueError: path=" in str(found)


def test_bad_arguments(files: list[Path]) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        lq.benchmark(["nowhere.onnx"])
    with pytest.raises(ValueError, match=r"runtimes has 'tensorrt', which is unknown; choose from 'torch', 'aoti'"):
        lq.benchmark(files, runtimes=["tensorrt"])
    with pytest.raises(ValueError, match="batch_sizes=.0. must be at least 1 each"):
        lq.benchmark(files, batch_sizes=[0])
    with pytest.raises(ValueError, match="none of the runtimes that read them is installed"):
        lq.benchmark(files, runtimes=["aoti"])
    network = nn.Flatten()
    network.hook = lambda: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="float_model is a Flatten that cannot be sent to another process"):
        lq.benchmark(files, float_model=network)


def test_recipe(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_small_mobilenet_v2(10).state_dict(), tmp_path / "float.pt")
    arguments = [
        str(files[0]),
        "network=mobilenet_v2",
        f"ckpt={tmp_path / 'float.pt'}",
        "data.name=shapes10",
        "data.max_train=64",
        "data.max_test=64",
        "num_samples=32",
        "batch_sizes=[4]",
        "runtimes=[onnxruntime]",
        "seconds=0.1",
        f"output_dir={tmp_path / 'out'}",
    ]
    main(recipe.Config, recipe.run, recipe.plan, argv=arguments)
    assert "onnxruntime" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"benchmark.csv", "benchmark.png"}
    with pytest.raises(SystemExit):
        main(recipe.Config, recipe.run, recipe.plan, argv=["nowhere.onnx"])
    assert "nowhere.onnx': no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(recipe.Config, recipe.run, recipe.plan, argv=[])
    assert "models" in capsys.readouterr().err


def test_peers_recipe_checks_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["rows=[resnet18]"], "rows='resnet18' is not NETWORK_SIZE_bBATCH with a network of torchvision"),
        (["rows=[resnet99_32_b1]"], "rows='resnet99_32_b1' is not NETWORK_SIZE_bBATCH with a network of torchvision"),
        (["peers=[tflite]"], "peers='tflite' is unknown; choose from torch_ao_eager"),
        (["ways=[twice]"], "ways='twice' is unknown; choose from 'back to back', 'after 20 ms'"),
        (["ways=[]"], "ways=[] leaves nothing to measure"),
    ):
        with pytest.raises(SystemExit):
            main(bench_peers.Config, bench_peers.run, bench_peers.plan, argv=arguments)
        assert message in capsys.readouterr().err
    main(bench_peers.Config, bench_peers.run, bench_peers.plan, argv=["--dry-run", "peers=[]"])
    assert "no peers" in capsys.readouterr().out
