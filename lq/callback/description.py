"""What is to be told of a run: what the data say of the model's inputs and outputs, and what was set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from lq.callback.settings import QuantizationSettings
from lq.callback.steps.batches import validation_dataloaders
from lq.util.cpu import cpu_name
from lq.util.distribution import package_version


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


def run_settings(settings: QuantizationSettings, trainer: Any, paths: Sequence[str]) -> dict[str, Any]:
    """What was set, on which data and machine, as JSON values.

    Args:
        settings: of the callback.
        trainer: whose data it was.
        paths: of what was quantized in the LightningModule.
    """
    name = type(trainer.lightning_module).__name__
    values: dict[str, Any] = {
        "module": ", ".join(f"{name}.{path}" if path else name for path in paths),
        "overrides": settings.overrides.as_dict(),
        "training data": _data_name(trainer.train_dataloader, trainer),
        "validation data": _data_name(validation_dataloaders(trainer), trainer),
    }
    if settings.mode == "ptq":
        source = settings.calibration_dataloader
        values["calibration data"] = "training data" if source is None else _data_name(source, trainer)
        for name in ("calibration_batches", "calibration_samples"):
            limit = getattr(settings, name)
            values[name] = "no limit" if limit is None else limit
    else:
        values["epochs"] = trainer.current_epoch
        for name in ("observer_freeze", "batch_norm_freeze"):
            values[name] = getattr(settings, name)
    values["machine"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    values["versions"] = {"lq": package_version(), "torch": str(torch.__version__)}
    values["written"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return values


def _data_name(loader: Any, trainer: Any) -> str:
    """Class and length of the data set, or of each, as far as they can be told."""
    loaders = loader.iterables if isinstance(loader, CombinedLoader) else loader
    several = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    names = [_set_name(each) for each in (several if isinstance(several, (list, tuple)) else [several])]
    if loader is None or not names:
        return "none"
    name, datamodule = "; ".join(names), _datamodule(trainer)
    return name if datamodule is None else f"{type(datamodule).__name__} ({name})"


def _set_name(loader: Any) -> str:
    dataset = getattr(loader, "dataset", loader)
    name = type(dataset).__name__
    with suppress(Exception):  # a length is the user's own code
        name += f", {len(dataset)} samples"
    return name


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
