"""A few epochs with fake-quantizers after training has ended, for what calibration alone does not keep."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.modules.batchnorm import _BatchNorm

from lq.callback.steps.attributes import same_attributes
from lq.callback.steps.batches import train_dataloaders
from lq.callback.steps.evaluation import REPEATED, as_it_is, one_device, plain_trainer_class
from lq.callback.steps.seen import SeesTheTrainer, seeing
from lq.util.modes import keeping_modes
from lq.util.quiet import quiet

#: Of the learning rate that the optimizers begin with. Quantization-aware fine-tuning of converged networks takes
#: about 1/100 of it (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 4;
#: torchvision's quantized references: 0.0001 after 0.1 and less).
LEARNING_RATE_SHARE = 0.01


class _Gently(Callback):
    """Scales the learning rates of all optimizers, which are constant where Lightning steps the schedulers, and keeps
    the statistics of batch norm: those of a few batches would be worse than those that training ended with."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # Warm-ups begin low, and say so by these.
                highest = max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
                group["lr"] = highest * LEARNING_RATE_SHARE
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [lr * LEARNING_RATE_SHARE for lr in config.scheduler.base_lrs]
        if pl_module.automatic_optimization:
            trainer.strategy.lr_scheduler_configs = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for submodule in pl_module.modules():
            if isinstance(submodule, _BatchNorm):
                submodule.eval()


def _batches_in_an_epoch(trainer: Any) -> int | float:
    """As in the training, also of data without an end, which ``max_steps`` or a time had ended."""
    limit: int | float = trainer.limit_train_batches
    if math.isfinite(trainer.num_training_batches) or isinstance(limit, int):
        return limit
    seen = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return max(1, seen // max(1, trainer.current_epoch)) if seen else limit


def fine_tune(trainer: Any, pl_module: Any, epochs: int, seconds: float | None = None) -> None:
    """Train a module whose unit is prepared for some epochs more, on one device, by its own ``training_step``.

    A Trainer of its own does it, with the precision, clipping and accumulation of ``trainer`` and without its
    callbacks and loggers. The module sees ``trainer``, at its last epoch and step: what its steps do in other ways
    in the first epochs, they do not do again.

    Args:
        trainer: the Trainer, after training.
        pl_module: the LightningModule.
        epochs: how many.
        seconds: after how many it ends sooner; None for no limit.
    """
    rank_zero_info(f"lq: training with fake-quantizers for {epochs} epochs, at 1/100 of the learning rate")
    try:
        with (
            quiet(*REPEATED),
            as_it_is(pl_module),
            keeping_modes(pl_module),
            same_attributes(pl_module, tensors=False),
            seeing(pl_module, trainer),
            torch.compiler.set_stance("force_eager"),
        ):
            pl_module.on_train_end = pl_module.on_fit_end = lambda: None  # that was: people save what they trained
            tuner = plain_trainer_class(trainer)(
                **one_device(trainer),
                max_epochs=epochs,
                max_time=None if seconds is None else timedelta(seconds=seconds),
                # The weights are in float32 by now, whatever they were trained in.
                precision=trainer.precision if str(trainer.precision).endswith("-mixed") else "32-true",
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                limit_train_batches=_batches_in_an_epoch(trainer),
                limit_val_batches=0,
                callbacks=[SeesTheTrainer(trainer, trains=True), _Gently()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=trainer.progress_bar_callback is not None,
                enable_model_summary=False,
            )
            tuner.fit(pl_module, train_dataloaders=train_dataloaders(trainer))
    finally:
        pl_module.cpu()
