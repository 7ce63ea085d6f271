"""The recipes about calibration as a user runs them, at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from lq.numerics.calibrators import CALIBRATORS
from lq.recipes import bench_calibration, compare_calibrators
from lq.recipes.blocks.config import main

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.mark.parametrize("network", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.thorough)])
def test_compare_calibrators(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        f"network={network}",
        "data.name=shapes10",
        "data.max_train=64",
        "data.max_test=40",
        "data.batch_size=16",
        "train.epochs=1",
        "num_batches=3",
        "accelerator=cpu",
        "progress=false",
        f"output_dir={tmp_path}",
    ]
    recipe = compare_calibrators
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)
    printed = capsys.readouterr().out
    for calibrator in CALIBRATORS:
        assert calibrator in printed
    assert "float" in printed
    assert "calibrator='auto' takes" in printed
    assert (tmp_path / "statistics.npz").exists()
    assert (tmp_path / "checkpoints" / "float.ckpt").exists()


def test_bench_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["networks=[resnet18]", "rounds=1", "batch_size=2"]
    recipe = bench_calibration
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)
    printed = capsys.readouterr().out
    for contender in ("float forward", "min/max", "histogram", "torch.ao"):
        assert contender in printed


def test_bench_calibration_names_the_networks(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = bench_calibration
    with pytest.raises(SystemExit, match="2"):
        main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=["networks=[vgg7]"])
    assert "networks='vgg7' is unknown; choose from 'resnet18', 'resnet50'" in capsys.readouterr().err
