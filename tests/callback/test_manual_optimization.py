"""Steps that optimize by hand: they are looked at before there is an optimizer, and nothing of that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.classifiers import Wrapped, images
from helpers.modes import both_modes
from helpers.modules import Manual
from helpers.runs import (
    StopBehind,
    assert_same,
    every_epoch,
    interrupted,
    module,
    quantization,
    state_of,
    train_data,
    trainer,
    val_data,
)
from lq import Int8Module


class One(Wrapped):
    """One optimizer and one scheduler, and whatever a step may ask for before it calls the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.steps += 1
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.global_step / self.trainer.num_training_batches)
        self.log("rate", optimizer.param_groups[0]["lr"], on_step=True, prog_bar=True, sync_dist=True, batch_size=3)
        self.log_dict({"step": float(self.global_step), "epoch": float(self.trainer.current_epoch)}, logger=False)
        assert len(self.trainer.optimizers) == 1
        assert self.trainer.max_epochs is not None and self.trainer.train_dataloader is not None
        logits, y = self.logits(batch)
        loss = F.cross_entropy(logits, y)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        if self.trainer.is_last_batch:
            scheduler.step()

    def on_train_end(self) -> None:
        self.trained_steps = self.steps

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total + 1)]


class Closure(One):
    """The network is called by the optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()

        def closure() -> Tensor:
            logits, y = self.logits(batch)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Asks(Wrapped):
    """Automatic optimization, and a step that reads the optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("momentum", self.optimizers().param_groups[0]["momentum"])  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


class Adversarial(Wrapped):
    """A generator of noise, which trains first, and the classifier that learns to withstand it and is quantized."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.model = Wrapped().model
        self.generator = nn.Conv2d(3, 3, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        x, y = batch
        self.toggle_optimizer(first)
        noise = self.generator(x).tanh()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        first.zero_grad()
        self.manual_backward(noise.square().mean())
        first.step()
        schedule, _ = self.lr_schedulers()
        schedule.step()
        loss = F.cross_entropy(self(x + 0.01 * noise.detach()), y)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.untoggle_optimizer(first)
        with second.toggle_model(sync_grad=True):
            loss = F.cross_entropy(self(x + 0.01 * noise.detach()), y)
            self.manual_backward(loss)
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(part.parameters(), 0.1, 0.9) for part in (self.generator, self.model)]
        return optimizers, [torch.optim.lr_scheduler.ConstantLR(each, 1.0) for each in optimizers]


CLASSES = {One: {}, Closure: {}, Asks: {}, Manual: {}, Adversarial: {"module": "model"}}


@both_modes
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.support("Training", "Manual optimization: one optimizer, closures, GANs; schedulers; gradients by hand")
def test_all_go_through(cls: Any, mode: str, tmp_path: Path) -> None:
    model = module(cls)
    trainer(tmp_path, quantization(tmp_path, mode=mode, **CLASSES[cls]), epochs=4).fit(model, train_data(), val_data())
    assert isinstance(model.model, Int8Module)
    assert lq.load(tmp_path / "int8" / "int8.pt2")(images(4)[0]).shape == (4, 4)
    assert trainer(tmp_path).validate(model, val_data(), verbose=False)[0]["val_acc"] >= 0.9


@pytest.mark.parametrize("cls", CLASSES)
def test_being_looked_at_changes_no_run(cls: Any, tmp_path: Path) -> None:
    """PTQ with overrides looks at a step before training; what is trained is what is trained without."""
    states = []
    for callbacks in ((), (quantization(tmp_path, overrides={"8": None}, **CLASSES[cls]),)):
        model = module(cls)
        run = trainer(tmp_path, *callbacks, epochs=2)
        run.fit(model, train_data())
        assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()) or (
            callbacks  # INT8 weights have none
        )
        kept = model._lq_unit.unit if callbacks else model.model
        states.append(kept.state_dict() | {"steps": torch.tensor(getattr(model, "trained_steps", 0))})
    without, with_it = states
    assert_same({k: v for k, v in with_it.items() if k in without}, without)


def test_resumes_exactly(tmp_path: Path) -> None:
    whole = module(One)
    trainer(tmp_path / "a", quantization(tmp_path / "a", mode="qat", convert=False), epochs=3).fit(whole, train_data())
    folder = tmp_path / "b"
    callback = quantization(folder, mode="qat", convert=False)
    interrupted(trainer(folder, callback, StopBehind(9), every_epoch(folder), epochs=3), module(One), train_data())
    again = module(One, seed=1)
    run = trainer(folder, quantization(folder, mode="qat", convert=False), every_epoch(folder), epochs=3)
    run.fit(again, train_data(), ckpt_path="last")
    assert_same(state_of(again), state_of(whole))


def test_by_hand_from_a_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path, every_epoch(tmp_path), epochs=2).fit(module(Manual), train_data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    result = lq.quantize_checkpoint(path, Manual, train_data(), target="x86_avx2", evaluate=False, analyze=False)
    assert lq.load(result.artifact)(images(4)[0]).shape == (4, 4)


def test_a_step_that_cannot_be_looked_at_says_what_it_was_called_for(tmp_path: Path) -> None:
    class Backward(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.generator(batch[0]).mean().backward()
            super().training_step(batch, batch_idx)

    run = trainer(tmp_path, quantization(tmp_path, mode="qat", module="model"))
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        run.fit(module(Backward), train_data())
    if hasattr(caught.value, "__notes__"):  # from Python 3.11 on
        assert "lq called training_step on one batch, without gradients" in caught.value.__notes__[0]
        assert "self.manual_backward" in caught.value.__notes__[0]
