"""The command that a run which ended unhappily prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lq
from helpers.modes import both_modes
from lq.recipes import quantize_checkpoint as recipe
from lq.recipes.blocks.config import main

SCRIPT = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
        self.model = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 2), batch_size=8)

    val_dataloader = train_dataloader
"""


def run(*argv: str) -> None:
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)


@pytest.fixture
def script(tmp_path: Path) -> tuple[Path, ModuleType]:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return path, module


@both_modes
def test_checkpoint_of_a_script(
    mode: str, script: tuple[Path, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, module = script
    callback = lq.QuantizationCallback(mode=mode, target="x86_avx2", convert=False)  # type: ignore[arg-type]
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="float", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="exists and is not empty"):
        trainer.fit(module.Model(), datamodule=module.Data())
    arguments = [f"ckpt={tmp_path / 'float.ckpt'}", f"model={path}:Model"]
    if mode == "ptq":
        arguments += [f"data={path}:Data", "target=x86_avx2", "calibration_batches=2"]
    run(*arguments)
    printed = capsys.readouterr().out
    assert f"{mode.upper()} for x86_avx2" in printed
    assert ("val_loss" in printed) == (mode == "ptq")
    assert lq.load(tmp_path / "int8" / "int8.pt2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt=no.ckpt", "model=a:b"], "ckpt='no.ckpt': no such file"),
        (["ckpt={here}", "model=nowhere:Model"], "model='nowhere:Model': No module named 'nowhere'"),
        (["ckpt={here}", "model=torch:Model"], "model='torch:Model': module 'torch' has no attribute 'Model'"),
        (
            ["ckpt={here}", "model=no.py:Model"],
            r"No such file.*give MODULE:NAME or FILE.py:NAME",
        ),
        (["ckpt={here}", "model=torch:nn.Linear", "target=arm"], "target"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*(argument.format(here=__file__) for argument in arguments))
    assert re.search(message, capsys.readouterr().err)


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    run("--dry-run", "ckpt=a.ckpt", "model=train.py:Model")
    assert "load a.ckpt into train.py:Model, take the ranges that are in it" in capsys.readouterr().out
