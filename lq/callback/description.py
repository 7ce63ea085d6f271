"""What the user's data say about the model's inputs and outputs, for the metadata of exported files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer


def class_names(trainer: Trainer) -> list[str] | None:
    """Names of the classes, by label: the datamodule's ``classes``, or None."""
    names = getattr(_datamodule(trainer), "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        return None
    return list(names)


def normalization(trainer: Trainer) -> dict[str, list[float]] | None:
    """Mean and standard deviation of each channel, for images in [0, 1]: the datamodule's ``mean`` and ``std``."""
    values: dict[str, Any] = {name: getattr(_datamodule(trainer), name, None) for name in ("mean", "std")}
    try:
        return {name: [float(number) for number in value] for name, value in values.items()}
    except TypeError:
        return None


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
