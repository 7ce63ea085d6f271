"""The run itself: where it writes, and on what device it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from lq.recipes.blocks.config import field


@dataclass
class RunConfig:
    """The config of a run, for any recipe."""

    output_dir: str = field("runs", help="folder for checkpoints, INT8 model and TensorBoard logs")
    seed: int = field(0, help="seed of everything")
    accelerator: str = field("auto", help="cpu, gpu or auto")
    precision: str = field("32-true", help="of training, for example 16-mixed")
    progress: bool = field(True, help="show progress bars")


def make_trainer(config: RunConfig, max_epochs: int, callbacks: list[Callback], logger: Logger | bool) -> Trainer:
    """The Trainer of a run, on one device; checkpoints only where a callback writes them."""
    return Trainer(
        max_epochs=max_epochs,
        accelerator=config.accelerator,
        devices=1,
        precision=config.precision,  # type: ignore[arg-type]
        callbacks=callbacks,
        logger=logger,
        default_root_dir=config.output_dir,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )


def device_of(config: RunConfig) -> torch.device:
    """The device for what a recipe runs without a Trainer."""
    wants_gpu = config.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")
