"""Steps ask their Trainer, loggers, optimizers and datamodule: where lq calls them, they are those of the training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import lq
from helpers.classifiers import Wrapped, loader
from helpers.fits import quantization

EPOCHS = 2


class Data(LightningDataModule):
    """Scales its batches, and flips those of training, in a hook of its own."""

    num_classes = 4

    def setup(self, stage: str) -> None:
        self.times_set_up = getattr(self, "times_set_up", 0) + 1

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(seed=1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        assert self.trainer is not None
        return (-x if self.trainer.training else x * 4), y


class Asks(Wrapped):
    """Does in its hooks what people do in theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def ask(self) -> None:
        trainer: Any = self.trainer
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        logger: Any = self.logger
        assert isinstance(trainer, Trainer) and isinstance(logger, TensorBoardLogger)
        assert isinstance(self.loggers[1], CSVLogger)
        assert isinstance(trainer.optimizers[0], torch.optim.Optimizer)
        assert trainer.checkpoint_callback.best_model_path is not None
        assert Path(logger.log_dir).is_relative_to(trainer.default_root_dir)
        assert trainer.datamodule.num_classes == 4 and trainer.datamodule.times_set_up == 1
        assert math.isfinite(trainer.num_training_batches) and len(trainer.train_dataloader) == 4
        self.seen.append(
            (
                self.current_epoch / trainer.max_epochs,
                trainer.estimated_stepping_batches,
                optimizer.param_groups[0]["lr"],
                scheduler.get_last_lr(),
                trainer.lr_scheduler_configs[0].interval,
                trainer.my_settings,
                trainer.accumulate_grad_batches,
            )
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.training and not self.trainer.validating
        self.ask()
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:  # a warm-up
            group["lr"] = min(0.1, 0.05 * (1 + self.global_step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.trainer.training
        super().validation_step(batch, batch_idx)
        self.ask()
        logger: Any = self.logger
        logger.experiment.add_image("first", batch[0][0], self.global_step)
        self.loggers[1].log_metrics({"own": float(batch[0].mean())}, step=self.global_step)

    def on_validation_epoch_end(self) -> None:
        assert "val_acc" in self.trainer.callback_metrics
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / f"own-{self.global_step}.ckpt")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [StepLR(optimizer, 3)]


def trained(folder: Path, callback: lq.QuantizationCallback | None) -> tuple[Asks, Trainer]:
    seed_everything(0, verbose=False)
    model = Asks()
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val_acc", mode="max")
    trainer: Any = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[checkpoint, *([] if callback is None else [callback])],
        logger=[TensorBoardLogger(folder, "board"), CSVLogger(folder, "csv")],
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.my_settings = {"a": 1}
    trainer.fit(model, datamodule=Data())
    return model, trainer


def own_metrics(folder: Path) -> list[str]:
    header, *rows = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("own")
    return [row.split(",")[column] for row in rows if row.split(",")[column]]


@pytest.mark.support("Modules", "Steps that ask the Trainer, its loggers, optimizers, datamodule for anything")
@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_steps_see_the_training(mode: Any, tmp_path: Path) -> None:
    plain, plain_trainer = trained(tmp_path / "plain", None)
    callback = quantization(tmp_path, mode=mode, rehearse=True)
    model, trainer = trained(tmp_path / "lq", callback)
    result = callback.result
    assert result is not None
    # Nothing is seen that the training does not see.
    assert {repr(each) for each in model.seen} <= {repr(each) for each in plain.seen}
    # What the steps write is written in training alone.
    assert len(own_metrics(tmp_path / "lq")) == len(own_metrics(tmp_path / "plain"))
    names = [sorted(file.name for file in (tmp_path / run).glob("own-*.ckpt")) for run in ("plain", "lq")]
    assert names[0] == names[1]
    assert model.trainer is trainer
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    assert datamodule.trainer is trainer and datamodule.times_set_up == 1
    if mode == "ptq":
        plain_best: Any = plain_trainer.checkpoint_callback
        best: Any = trainer.checkpoint_callback
        assert result.float_side.metrics["val_acc"] == float(plain_best.best_model_score)
        expected = torch.load(plain_best.best_model_path, weights_only=True)["state_dict"]
        found = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
