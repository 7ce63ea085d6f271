"""A Trainer that does nothing but run, for what the data's tests fit."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer


def small_trainer(folder: Path, *callbacks: Callback, max_epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
