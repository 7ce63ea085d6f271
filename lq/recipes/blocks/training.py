"""Training in float."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lq.data import Shapes10
from lq.errors import ConfigError
from lq.models import Classifier
from lq.models.schedules import ScheduleName
from lq.recipes.blocks.config import field
from lq.recipes.blocks.data import ImageData
from lq.recipes.blocks.trainer import RunConfig
from lq.util.archives import check_torch_archive


@dataclass
class TrainConfig:
    """How the float model is trained."""

    epochs: int | None = field(None, help="passes over the data; by default 20 for CIFAR-10 and 3 for Shapes10")
    lr: float = field(0.05, help="peak learning rate of SGD")
    momentum: float = field(0.9, help="momentum of SGD")
    nesterov: bool = field(True, help="Nesterov's momentum")
    weight_decay: float = field(5e-4, help="weight decay")
    schedule: ScheduleName = field("onecycle", help="the learning rate's curve")
    warmup: float | None = field(None, help="share of the steps in which it rises; by default 0.3 for onecycle, else 0")


def float_checkpoint(config: RunConfig) -> ModelCheckpoint:
    """Keeps the trained float model in ``checkpoints/float.ckpt``."""
    folder = Path(config.output_dir) / "checkpoints"
    return ModelCheckpoint(dirpath=folder, filename="float", enable_version_counter=False)


def epochs(config: TrainConfig, data: ImageData) -> int:
    """Passes over the data of float training."""
    if config.epochs is not None:
        return config.epochs
    return 3 if isinstance(data, Shapes10) else 20


def classifier(config: TrainConfig, network: nn.Module, num_classes: int) -> Classifier:
    """The LightningModule that trains a network as the recipe's training group says."""
    return Classifier(
        network,
        num_classes,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        schedule=config.schedule,
        warmup=config.warmup,
    )


def load_float_weights(module: nn.Module, path: str) -> None:
    """Load a checkpoint of a Trainer, or a bare state dict of the network, into a LightningModule with ``.model``.

    Raises:
        ConfigError: where the file does not exist, is not a checkpoint, or does not fit the network.
    """
    try:
        check_torch_archive(Path(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        if not any(key.startswith("model.") for key in state):
            state = {f"model.{key}": value for key, value in state.items()}
        module.load_state_dict(state)
    except FileNotFoundError as error:
        raise ConfigError(f"ckpt={path!r}: no such file") from error
    except Exception as error:
        raise ConfigError(f"ckpt={path!r} cannot be loaded: {error}") from error
