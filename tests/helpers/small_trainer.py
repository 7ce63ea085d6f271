"""A Trainer that does nothing but run, for what the data's tests fit, and what a loader gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader


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


def labels_of(loader: DataLoader[Any]) -> list[int]:
    """The labels of an epoch, in its order."""
    return [label for _, labels in loader for label in labels.tolist()]
