"""What recipes share: the groups of their configs, and the objects these stand for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn

from lq.callback import QuantizationCallback, QuantizationResult
from lq.config import ConfigError, field
from lq.data import CIFAR10, DatasetNotFoundError, Shapes10
from lq.models import Classifier
from lq.models.schedules import ScheduleName
from lq.targets import TARGETS


@dataclass
class DataConfig:
    """Which images, and how they are fed."""

    name: Literal["cifar10", "shapes10"] = field("cifar10", help="data set; shapes10 is built in and needs no files")
    dir: str = field("data/cifar10", help="CIFAR-10: torchvision's files, or a folder or zip of train|test/CLASS/*.jpg")
    download: bool = field(False, help="fetch CIFAR-10 into dir where it is not there")
    fallback: bool = field(True, help="go on with shapes10 where CIFAR-10 cannot be had; false makes that an error")
    batch_size: int = field(128, help="images per step")
    num_workers: int = field(0, help="loader processes; the data are in memory, so few are needed")
    max_train: int | None = field(None, help="use only so many training images")
    max_test: int | None = field(None, help="use only so many test images")


@dataclass
class RunConfig:
    """What a run of any recipe is told."""

    output_dir: str = field("runs", help="folder for checkpoints, INT8 model and TensorBoard logs")
    seed: int = field(0, help="seed of everything")
    accelerator: str = field("auto", help="cpu, gpu or auto")
    precision: str = field("32-true", help="of training, for example 16-mixed")
    progress: bool = field(True, help="show progress bars")


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


@dataclass
class QuantConfig:
    """How the model is taken to INT8."""

    target: str = field("x86", help="engine family the quantizers are placed for", choices=tuple(TARGETS))
    calibration_batches: int = field(32, help="training batches that PTQ takes its ranges from")
    calibrator: str | None = field(
        None, help="minmax, moving_average, percentile, percentile:99.9, mse, entropy; by default the best one for PTQ"
    )
    export: list[str] = field([], help="formats to write beside int8.pt2: onnx, aoti")
    epochs: int = field(1, help="QAT: passes over the data with fake-quantizers")
    lr: float = field(0.002, help="QAT: peak learning rate, one cycle")


def image_data(config: DataConfig, seed: int) -> CIFAR10 | Shapes10:
    """The data module; where CIFAR-10 is not to be had, Shapes10, and a notice that cannot be overlooked.

    Raises:
        ConfigError: where CIFAR-10 is not to be had and ``config.fallback`` is off.
    """
    if config.name == "cifar10":
        data = CIFAR10(
            config.dir,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            download=config.download,
            seed=seed,
            max_train=config.max_train,
            max_test=config.max_test,
        )
        try:
            data.prepare_data()
            return data
        except DatasetNotFoundError as error:
            if not config.fallback:
                raise ConfigError(f"data.dir={config.dir!r}: {error}") from error
            line = "=" * 88
            print(
                f"{line}\nCIFAR-10 IS NOT AT {config.dir!r}: THIS RUN USES THE BUILT-IN Shapes10 INSTEAD.\n"
                f"Its accuracies say nothing about CIFAR-10. Set data.dir=... or data.download=true for CIFAR-10,\n"
                f"or data.fallback=false to make this an error.\n{line}",
                file=sys.stderr,
            )
    return Shapes10(
        train_size=config.max_train or 12_800,
        test_size=config.max_test or 4_000,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        seed=seed,
    )


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


def float_checkpoint(config: RunConfig) -> ModelCheckpoint:
    """Keeps the trained float model in ``checkpoints/float.ckpt``."""
    folder = Path(config.output_dir) / "checkpoints"
    return ModelCheckpoint(dirpath=folder, filename="float", enable_version_counter=False)


def epochs(config: TrainConfig, data: CIFAR10 | Shapes10) -> int:
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


def callback(config: QuantConfig, mode: Literal["ptq", "qat"], output_dir: str) -> QuantizationCallback:
    """The callback that a recipe's quantization group stands for."""
    return QuantizationCallback(
        mode=mode,
        target=config.target,
        calibration_batches=config.calibration_batches,
        calibrator=config.calibrator,
        export=config.export,  # type: ignore[arg-type]
        output_dir=output_dir,
    )


def load_float_weights(module: nn.Module, path: str) -> None:
    """Load a checkpoint of a Trainer, or a bare state dict of the network, into a LightningModule with ``.model``.

    Raises:
        ConfigError: where the file does not exist, is no checkpoint, or does not fit the network.
    """
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        if not any(key.startswith("model.") for key in state):
            state = {f"model.{key}": value for key, value in state.items()}
        module.load_state_dict(state)
    except FileNotFoundError as error:
        raise ConfigError(f"ckpt={path!r}: no such file") from error
    except Exception as error:
        raise ConfigError(f"ckpt={path!r} cannot be loaded: {error}") from error


def print_result(result: QuantizationResult, data: str, notes: dict[str, str]) -> None:
    """The one table a recipe ends with, and where its files lie."""
    print(f"\nData: {data}")
    print(result)
    for name, value in notes.items():
        print(f"{name + ':':20s} {value}")
