"""Small real runs, and ways to interrupt and to compare them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from helpers.classifiers import Wrapped, images
from helpers.quantized import TARGET
from lq import Int8Module, QuantizationCallback
from lq.util.modes import evaluating

BATCHES = 4


class ShuffledByEpoch(Sampler[int]):
    """An order for each epoch that does not depend on what ran before, as DistributedSampler has."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class StatefulLoader:
    """Shuffled by epoch, and it knows where it was: what Lightning needs to go on within an epoch."""

    def __init__(self, seed: int = 0) -> None:
        self.batches = list(train_data(seed))
        self.epoch = self.position = 0
        self._resumed = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed or self.position == len(self):
            self.position = 0
        self._resumed = False
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(self):
            self.position += 1
            yield self.batches[order[self.position - 1]]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self._resumed = state["position"], True


def train_data(seed: int = 0) -> DataLoader[Any]:
    data = TensorDataset(*images(16 * BATCHES, seed))
    return DataLoader(data, batch_size=16, sampler=ShuffledByEpoch(len(data)))


def val_data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(64, seed=1)), batch_size=32)


def quantization(folder: Path, **kwargs: Any) -> QuantizationCallback:
    """A callback that measures, rehearses and compares nothing, unless it is told to: that is tested elsewhere."""
    calibrator = None if kwargs.get("mode") == "qat" else "minmax"
    settings = {"target": TARGET, "output_dir": str(folder / "int8"), "calibrator": calibrator}
    settings |= {"evaluate": False, "analyze": False, "rehearse": False}
    return QuantizationCallback(**settings | kwargs)


def trainer(folder: Path, *callbacks: Callback, epochs: int = 2, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings | kwargs,
    )


def module(cls: type[LightningModule] = Wrapped, seed: int = 0) -> Any:
    """A new module, with the weights that belong to ``seed``."""
    seed_everything(seed, verbose=False)
    return cls()


class InterruptionError(Exception):
    """What stops a run in these tests."""


class StopBehind(Callback):
    """Raises behind so many training batches of this run."""

    def __init__(self, batches: int, error: BaseException | None = None) -> None:
        self.left = batches
        self.error = error or InterruptionError()

    def on_train_batch_end(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class Recorder(Callback):
    """The metrics of each epoch's validation."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.epochs[trainer.current_epoch] = {k: float(v) for k, v in trainer.callback_metrics.items()}


def every_epoch(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        **{"dirpath": folder / "checkpoints", "save_last": True, "save_top_k": -1, "enable_version_counter": False}
        | kwargs
    )


def state_of(pl_module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in pl_module.state_dict().items()}


def is_int8(model: torch.nn.Module) -> bool:
    """Whether the model holds an INT8 network."""
    return any(isinstance(module, Int8Module) for module in model.modules())


def weights(path: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def converted_from(run: Trainer, model: LightningModule, folder: Path) -> dict[str, torch.Tensor]:
    """The float weights that the INT8 network was made of."""
    assert is_int8(model)
    run.save_checkpoint(folder / "after.ckpt")
    return weights(folder / "after.ckpt")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def logits(pl_module: Any) -> Tensor:
    with evaluating(pl_module), torch.no_grad():
        found: Tensor = pl_module(images(32, seed=5)[0])
    return found


def interrupted(run: Trainer, *args: Any, error: type[BaseException] = InterruptionError, **kwargs: Any) -> None:
    with pytest.raises(error):
        run.fit(*args, **kwargs)
