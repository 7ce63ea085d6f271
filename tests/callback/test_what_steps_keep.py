"""What steps and hooks keep on the module: lq calls them, and leaves there what the training left."""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor, nn

from helpers.classifiers import Wrapped
from helpers.fits import fit, quantization
from helpers.modes import both_modes


class Keeps(Wrapped):
    """Keeps what people keep, much of it made when it is first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(4, 3))
        self.outputs: list[Tensor] = []
        self.history: dict[str, list[float]] = defaultdict(list)
        self.last = deque([0.0], maxlen=3)
        self.best = 0.0
        self.epochs_seen: set[int] = set()

    @functools.cached_property
    def board(self) -> Any:
        return self.logger.experiment  # type: ignore[union-attr]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not hasattr(self, "queue"):
            self.queue, self.pointer = torch.zeros(8, 3), 0
            self.projection = nn.Identity()
            self.register_buffer("offset", torch.ones(1))
        self.queue[self.pointer % 8] = batch[0][0].mean((1, 2))
        self.recent[self.pointer % 4] = batch[0][0].mean((1, 2))
        self.pointer += 1
        self.board.add_scalar("pointer", self.pointer, self.global_step)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits, y = self.logits(batch)
        accuracy = (logits.argmax(1) == y).float().mean()
        self.outputs.append(accuracy)
        self.log("val_acc", accuracy)

    def on_validation_epoch_end(self) -> None:
        accuracy = torch.stack(self.outputs).mean().item()
        self.outputs.clear()
        self.history["val_acc"].append(accuracy)
        self.last.append(accuracy)
        self.best = max(self.best, accuracy)
        self.epochs_seen.add(self.current_epoch)


def kept(model: Keeps) -> dict[str, Any]:
    values = {name: getattr(model, name) for name in ("outputs", "history", "last", "best", "epochs_seen", "pointer")}
    return {**values, "queue": model.queue.tolist(), "recent": model.recent.tolist(), "offset": model.offset.tolist()}


def trained(folder: Path, mode: Any, **settings: Any) -> Keeps:
    seed_everything(0, verbose=False)
    model, callback = Keeps(), None if mode is None else quantization(folder, mode=mode, rehearse=True, **settings)
    fit(model, folder, callback, logger=TensorBoardLogger(folder), num_sanity_val_steps=0)
    assert callback is None or callback.result is not None
    return model


@pytest.mark.support("Modules", "State that steps keep on the module, or make the first time: lq leaves no trace in it")
@both_modes
def test_what_is_kept_is_what_the_training_left(mode: Any, tmp_path: Path) -> None:
    plain, model = trained(tmp_path / "plain", None), trained(tmp_path / "lq", mode)
    assert type(model.board) is type(plain.board)
    assert model._modules.keys() - {"int8"} == plain._modules.keys() and model._buffers.keys() == plain._buffers.keys()
    if mode == "ptq":
        assert kept(model) == kept(plain)
    else:  # which trains something else, on the same images
        assert all(kept(model)[name] == kept(plain)[name] for name in ("outputs", "pointer", "queue", "recent"))
        assert len(model.history["val_acc"]) == len(plain.history["val_acc"]) == len(model.last) - 1


class KeepsItsOptimizer(Wrapped):
    """Asks for its optimizer once."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.optimizer is None:
            self.optimizer = self.optimizers()
        self.optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizer.step()


@both_modes
def test_an_optimizer_that_is_kept_steps(mode: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = KeepsItsOptimizer()
    before = model.model[-1].weight.detach().clone()
    callback = quantization(tmp_path, mode=mode, rehearse=True)
    trainer = fit(model, tmp_path, callback)
    assert model.optimizer is trainer.strategy._lightning_optimizers[0]
    assert callback.result is not None and callback.result.int8_side.metrics["val_acc"] > 0.4
    assert not torch.equal(model.state_dict()["model.8.weight"], before)


class Gathers(Wrapped):
    """Reads at the end of a validation what the training has gathered, and skips that in the sanity check."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        assert "train_loss" in self.trainer.logged_metrics
        self.log("gap", torch.stack(self.losses).mean() - self.trainer.callback_metrics["train_loss"])
        self.losses.clear()


@both_modes
def test_a_validation_that_needs_the_training(mode: Any, tmp_path: Path) -> None:
    callback = quantization(tmp_path, mode=mode, rehearse=True)
    with pytest.warns(UserWarning, match=r"Gathers is validated as in a sanity check \(trainer.sanity_checking\)"):
        fit(Gathers(), tmp_path, callback)
    assert callback.result is not None
    assert {"val_acc", "val_loss"} <= callback.result.int8_side.metrics.keys()


class Remote(Logger):
    """A logger without files."""

    name = "remote"
    version = 3
    tags = ("a", "b")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class AsksItsLogger(Wrapped):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        logger: Any = self.logger
        assert not hasattr(logger, "run_dir") and logger.save_dir is None
        assert logger.version == 3 and logger.tags[1] == "b" and isinstance(logger, Remote)
        Path(getattr(logger, "run_dir", None) or self.trainer.default_root_dir).joinpath("images")


def test_a_logger_has_what_it_has(tmp_path: Path) -> None:
    callback = quantization(tmp_path, rehearse=True)
    fit(AsksItsLogger(), tmp_path, callback, logger=Remote())
    assert callback.result is not None
