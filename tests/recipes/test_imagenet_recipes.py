"""The ImageNet recipes as a user runs them, on a small folder of images and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from PIL import Image

from lq.recipes import imagenet_resnet18, imagenet_resnet50
from lq.recipes.blocks.config import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # 8-bit weights on a CPU without VNNI: said where the tests run on one.
    pytest.mark.filterwarnings(r"ignore:[\s\S]*(The file is right|has no VNNI)"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537", "n01484850"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 256, (240, 320, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.JPEG")
    return tmp_path / "images"


def run(recipe: ModuleType, folder: Path, output: Path, *argv: str) -> dict:
    tiny = [f"data.dir={folder}", "data.batch_size=3", "data.num_workers=0", "data.calibration_images=4"]
    tiny += ["model.name=resnet18", "model.weights=null", "accelerator=cpu", "progress=false", f"output_dir={output}"]
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=[*tiny, *argv])
    return json.loads((output / "results.json").read_text())


def test_before_and_after_saving(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["target=x86_avx2", "overrides={layer4: {weight_bits: 6}, layer1.0.conv1: null}", "calibrator=minmax"]
    argv += ["benchmark=[]"]
    found = run(imagenet_resnet18, folder, tmp_path / "run", *argv)
    assert "layer1.0.conv1" in capsys.readouterr().out
    networks = [row["network"] for row in found["rows"]]
    assert networks[0] == "float" and networks[-1] == "INT8, loaded from the file"
    assert found["rows"][2]["top1"] == found["rows"][3]["top1"]
    assert found["agreement"]["saved_against_loaded"] == 0
    # On CPUs without VNNI, too: the weights have 7 bits.
    assert found["agreement"]["debug_against_int8"] < 0.05


def test_the_best_calibrator_goes_to_tensorrt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["calibrators=[minmax,percentile:99.99]"]
    found = run(imagenet_resnet50, folder, tmp_path / "run", *argv)
    assert set(found["top1"]["scores"]) == {"minmax", "percentile:99.99"}
    assert found["calibrator"] in found["top1"]["scores"]
    printed = capsys.readouterr().out
    assert "layer4.1.conv2.weight" in printed
    # TensorRT wants symmetric activations, and a quantizer of its own on each residual.
    activations = [row for row in found["ranges"] if not row["name"].endswith("weight") and row["rounds"]]
    assert all(abs(row["low"][0] + row["high"][0]) < 0.02 * row["high"][0] for row in activations)
    graph = onnx.load(tmp_path / "run" / "int8.onnx").graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 20
    assert (tmp_path / "run" / "statistics.npz").exists()


@pytest.mark.usefixtures("no_rehearsal")
def test_fine_tuning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(imagenet_resnet50, folder, tmp_path / "run", "mode=qat", "quant.schedule=step", "quant.analyze=false")
    assert "float before QAT" in capsys.readouterr().out
    assert found["result"]["mode"] == "qat"
    assert (tmp_path / "run" / "int8" / "int8.onnx").exists()


@pytest.mark.parametrize("recipe", [imagenet_resnet18, imagenet_resnet50])
def test_mistakes_are_one_line(recipe: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["data.dir=nowhere"], [f"data.dir={folder}", "model.weights=V9"]):
        with pytest.raises(SystemExit, match="2"):
            main(recipe.Config, recipe.run, recipe.plan, argv=argv)
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("recipe", [imagenet_resnet18, imagenet_resnet50])
def test_dry_run(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    main(recipe.Config, recipe.run, recipe.plan, argv=["--dry-run"])
    assert "data/imagenet" in capsys.readouterr().out
