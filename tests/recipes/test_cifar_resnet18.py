"""The recipe as a user runs it, at tiny size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import lq
from helpers.tiny_recipe import TINY
from lq.models import Classifier, build_resnet
from lq.recipes import cifar_resnet18 as recipe
from lq.recipes.blocks.config import main
from lq.recipes.blocks.training import load_float_weights

# Four batches a run, where Lightning would log every ten.
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def run(*argv: str) -> None:
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)


def test_trains_quantizes_and_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [f"data.dir={tmp_path / 'nowhere'}", f"output_dir={tmp_path}"]
    run(*TINY, "quant.analyze=true", "quant.max_drop=100", "data.name=cifar10", *folders)
    printed = capsys.readouterr()
    assert "CIFAR-10 IS NOT AT" in printed.err
    assert "Data: Shapes10" in printed.out
    for row in ("val_acc", "size", "p50, ms", "INT8, in process", "recommended: ", "INT8 model", "TensorBoard"):
        assert row in printed.out
    int8 = lq.load(tmp_path / "int8" / "int8.pt2")
    assert int8(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
    assert len(int8.report.int8_layers) == 21  # 20 convolutions and the classifier
    assert list(tmp_path.glob("tensorboard/version_*/events*"))
    tuning = json.loads((tmp_path / "results.json").read_text())["result"]["tuning"]
    assert (tuning["metric_name"], len(tuning["steps"])) == ("val_acc", 1)
    assert "What each layer does to the model" in (tmp_path / "int8" / "int8.html").read_text()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_float_weights_of_a_trainer_or_of_the_network_alone(prefix: str, tmp_path: Path) -> None:
    network = build_resnet("resnet18", num_classes=10)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state} if prefix else state, tmp_path / "float.ckpt")
    module = Classifier(build_resnet("resnet18", num_classes=10), 10)
    load_float_weights(module, str(tmp_path / "float.ckpt"))
    assert all(torch.equal(value, module.model.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data.dir=nowhere", "data.fallback=false"], r"data\.dir='nowhere'"),
        (["data.batchsize=3"], r"data\.batch_size"),
        (["mode=int8"], r"mode.*ptq.*qat"),
        (["quant.target=arm"], r"quant\.target.*x86"),
        (["quant.export=[tflite]", "data.name=shapes10"], r"quant: export=\['tflite'\]"),
        (["quant.overrides={fc: {bits: 3}}", "data.name=shapes10"], r"quant: overrides: 'fc' .*'bits'"),
        (["mode=qat", "quant.max_drop=1", *TINY], r"quant: max_drop=1\.0 is for mode='ptq'"),
        (["mode=qat", "quant.distillation=2", *TINY], r"quant\.distillation=2\.0 must be in"),
        (["ckpt=nowhere.ckpt", "data.name=shapes10"], r"ckpt='nowhere\.ckpt': no such file"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*argv)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*TINY, f"output_dir={tmp_path / 'run'}", "--dry-run")
    assert "train ResNet-18 in float" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    printed = capsys.readouterr().out
    for key in ("mode", "quant.target", "data.fallback", "train.epochs"):
        assert key in printed


@pytest.mark.usefixtures("no_rehearsal")
def test_fine_tuning_of_a_checkpoint_with_a_teacher_overrides_and_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build_resnet("resnet18", num_classes=10).state_dict(), tmp_path / "bare.pt")
    run(
        *TINY,
        f"ckpt={tmp_path / 'bare.pt'}",
        "mode=qat",
        "quant.distillation=0.5",
        "quant.schedule=cosine",
        "quant.warmup=0.1",
        "quant.overrides={layer4: {weight_bits: 6}, layer1.0.conv1: null}",
        "benchmark=[1]",
        f"output_dir={tmp_path}",
    )
    printed = capsys.readouterr().out
    assert "bare.pt" in printed and "float before QAT" in printed
    int8 = lq.load(tmp_path / "int8" / "int8.pt2")
    assert isinstance(int8, lq.Int8Module)
    assert [layer.name for layer in int8.report.float_layers if "overrides" in layer.reason] == ["layer1.0.conv1"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["config"]["quant"]["distillation"] == 0.5
    assert found["result"]["mode"] == "qat"
    assert set(found["float_before_qat"]) >= {"val_acc", "val_loss"}
    assert [(row["model"], row["runtime"]) for row in found["engines"]["rows"]] == [
        ("float", "eager"),
        ("float", "folded"),
        ("int8.pt2", "torch"),
    ]
