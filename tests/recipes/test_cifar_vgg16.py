"""The VGG recipe as a user runs it, at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lq
from helpers.tiny_recipe import TINY
from lq.recipes import cifar_vgg16 as recipe
from lq.recipes.blocks.config import main

# Four batches a run, where Lightning would log every ten.
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def run(*argv: str) -> None:
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.usefixtures("no_rehearsal")
def test_linear_and_batch_norm_are_one_int8_layer_and_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*TINY, "model.name=RA", "model.hidden=32", f"output_dir={tmp_path}")
    assert "val_acc" in capsys.readouterr().out
    int8 = lq.load(tmp_path / "int8" / "int8.pt2")
    assert isinstance(int8, lq.Int8Module)
    assert int8(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
    assert len(int8.report.int8_layers) == 8 + 2
    assert "linear + batch_norm + relu" in {layer.kind for layer in int8.report.int8_layers}
    assert not any("BatchNorm" in layer.kind for layer in int8.report.float_layers)

    checkpoint = tmp_path / "checkpoints" / "float.ckpt"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 0
    run(*TINY, "model.name=RA", "model.hidden=32", "train.epochs=2", f"resume={checkpoint}", f"output_dir={tmp_path}")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["model.name=vgg12"], "model.name"), (["model.dropout=1.5"], r"model.dropout=1.5 must be in \[0, 1\)")],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*argv)
    assert message.replace("\\", "") in capsys.readouterr().err


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    run("--dry-run", "model.name=vgg11")
    assert "train vgg11 in float" in capsys.readouterr().out
