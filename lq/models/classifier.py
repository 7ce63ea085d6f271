"""The LightningModule that trains and evaluates a float image classifier, or the INT8 network that replaced it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lq.models.schedules import SCHEDULES, ScheduleName, lr_factor

OptimizerName = Literal["sgd", "adamw"]

#: Of the softmax in which a teacher's outputs are compared: usual for few classes.
_TEMPERATURE = 2.0


class Classifier(LightningModule):
    """Trains any network that maps images ``(N, C, H, W)`` to logits ``(N, num_classes)``.

    Logs ``train_loss``; ``val_loss`` and ``val_acc``; ``test_loss`` and ``test_acc``; with more than five classes also
    the top-5 accuracies ``val_acc5`` and ``test_acc5``. Losses of validation and test are plain cross entropies,
    comparable across runs with different label smoothing.

    A network that returns a tuple in train mode (GoogLeNet, Inception v3) is taken to return its logits first and
    logits of auxiliary heads after them.

    Args:
        model: the network, at ``self.model`` from then on. It may be changed or replaced at any time.
        num_classes: number of classes.
        lr: peak learning rate.
        momentum: momentum of SGD, or the first beta of AdamW.
        weight_decay: weight decay, of all parameters unless ``decay_norm_and_bias`` is False.
        decay_norm_and_bias: whether parameters with fewer than two dimensions decay as well.
        nesterov: Nesterov momentum, for SGD.
        optimizer: ``"sgd"`` or ``"adamw"``.
        schedule: learning rate per optimizer step, see :func:`lq.models.schedules.lr_factor`.
        warmup: fraction of all steps in which the learning rate rises; None is 0.3 for ``"onecycle"``, else 0.
        milestones: where ``schedule="step"`` drops, as fractions of all steps.
        gamma: what ``schedule="step"`` multiplies the learning rate by at a milestone.
        label_smoothing: of the training loss.
        aux_weight: weight of each auxiliary head's loss.
        teacher: a float network that this one imitates as well (Hinton et al., "Distilling the Knowledge in a Neural
            Network", 2015), such as a copy of ``model`` from before quantization-aware training: the training loss is
            ``(1 - d) * cross_entropy + d * T**2 * KL(teacher || model)`` with both softmaxes at temperature ``T = 2``.
            It is not a submodule: not trained, not in checkpoints, always in evaluation mode.
        distillation: ``d``, the weight of the teacher in the loss.
        channels_last: keep weights and inputs in the channels-last memory format, which CPU convolutions prefer
            (ResNet-18 at 32x32 trains 1.3 times as fast). Converts the weights of ``model`` in place; inputs that are
            not ``(N, C, H, W)`` pass unchanged.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> classifier = Classifier(network, num_classes=10, lr=0.05)
        >>> classifier(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    _teacher: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        decay_norm_and_bias: bool = True,
        nesterov: bool = False,
        optimizer: OptimizerName = "sgd",
        schedule: ScheduleName = "onecycle",
        warmup: float | None = None,
        milestones: Sequence[float] = (0.5, 0.75),
        gamma: float = 0.1,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.3,
        teacher: nn.Module | None = None,
        distillation: float = 0.5,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} must be an nn.Module, for example build_resnet('resnet18').")
        _check_choice("optimizer", optimizer, get_args(OptimizerName))
        _check_choice("schedule", schedule, SCHEDULES)
        _check("num_classes", num_classes, num_classes >= 1, "at least 1")
        _check("lr", lr, 0 < lr < math.inf, "positive and finite")
        _check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _check("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "non-negative and finite")
        has_momentum = optimizer == "sgd" and momentum > 0
        _check("nesterov", nesterov, has_momentum or not nesterov, "False without SGD's momentum")
        _check("warmup", warmup, warmup is None or 0 <= warmup < 1, "None or a fraction of all steps in [0, 1)")
        _check("milestones", milestones, all(0 < m < 1 for m in milestones), "fractions of all steps in (0, 1)")
        _check("gamma", gamma, 0 < gamma <= 1, "in (0, 1]")
        _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)")
        _check("aux_weight", aux_weight, 0 <= aux_weight < math.inf, "non-negative and finite")
        _check("distillation", distillation, 0 <= distillation <= 1, "in [0, 1]")
        if teacher is not None and (not isinstance(teacher, nn.Module) or teacher is model):
            raise TypeError(
                f"teacher={type(teacher).__name__} must be an nn.Module other than model: copy.deepcopy(model)"
            )
        # As a tuple, or a ListConfig from a recipe would make the checkpoint unreadable with weights_only=True.
        milestones = tuple(float(milestone) for milestone in milestones)
        self.save_hyperparameters(ignore=["model", "teacher"])

        self.model = model
        self.num_classes = num_classes
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.decay_norm_and_bias = decay_norm_and_bias
        self.nesterov = nesterov
        self.optimizer: OptimizerName = optimizer
        self.schedule: ScheduleName = schedule
        self.warmup = (0.3 if schedule == "onecycle" else 0.0) if warmup is None else warmup
        self.milestones = milestones
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.aux_weight = aux_weight
        # Bypasses nn.Module, which would train it and write it into checkpoints.
        self.__dict__["_teacher"] = None if teacher is None else teacher.eval().requires_grad_(False)
        self.distillation = distillation
        self.channels_last = channels_last
        if channels_last:
            _to_channels_last(model)
        self.val_metrics = _accuracies("val", num_classes)
        self.test_metrics = _accuracies("test", num_classes)

    def forward(self, x: Tensor) -> Any:
        """What the network returns for a batch: logits ``(N, num_classes)``, or a tuple that starts with them."""
        return self.model(self._in_memory_format(x))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._build_optimizer()
        total_steps = self._total_steps()

        def factor(step: int) -> float:
            return lr_factor(self.schedule, step, total_steps, self.warmup, self.milestones, self.gamma)

        # A function and not an object: LambdaLR would write an object's state into checkpoints, and the length of the
        # run that was interrupted would override the length of the one that resumes it.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits, aux = self._logits(x)
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        for head in aux:
            loss = loss + self.aux_weight * F.cross_entropy(head, y, label_smoothing=self.label_smoothing)
        if self._teacher is not None:
            loss = (1 - self.distillation) * loss + self.distillation * self._distance_to_teacher(x, logits)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_metrics, batch)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(x)[0]

    def _in_memory_format(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def _distance_to_teacher(self, x: Tensor, logits: Tensor) -> Tensor:
        """``T**2`` times the Kullback-Leibler divergence of the softmax at temperature ``T`` from the teacher's."""
        assert self._teacher is not None
        with torch.no_grad():
            wanted, _ = _split(self._teacher(self._in_memory_format(x)))
        log_p, log_q = (F.log_softmax(values / _TEMPERATURE, dim=1) for values in (wanted, logits))
        return _TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def _logits(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The network's logits, and those of its auxiliary heads."""
        logits, aux = _split(self(x))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"the network returned logits of shape {tuple(logits.shape)}; expected (N, {self.num_classes}), "
                f"from num_classes={self.num_classes}."
            )
        return logits, aux

    def _evaluate(self, stage: str, metrics: nn.ModuleDict, batch: Sequence[Tensor]) -> None:
        x, y = batch
        logits, _ = self._logits(x)
        self.log(f"{stage}_loss", F.cross_entropy(logits, y), prog_bar=True, batch_size=len(y), sync_dist=True)
        for name, metric in metrics.items():
            metric = cast(MulticlassAccuracy, metric)
            metric.update(logits, y)
            self.log(name, metric, prog_bar=True, batch_size=len(y))

    def _build_optimizer(self) -> Optimizer:
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in self.parameters():
            (decayed if self.decay_norm_and_bias or parameter.ndim > 1 else plain).append(parameter)
        groups = [
            {"params": parameters, "weight_decay": weight_decay}
            for parameters, weight_decay in ((decayed, self.weight_decay), (plain, 0.0))
            if parameters
        ]
        if self.optimizer == "sgd":
            return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
        return AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if 0 <= total < math.inf:
            return int(total)
        if self.schedule == "constant" and self.warmup == 0:
            return 0
        raise ValueError(
            f"schedule={self.schedule!r} needs the number of optimizer steps, which this Trainer does not know: "
            "pass it max_steps (or max_epochs, with data of known length), or use schedule='constant' with warmup=0."
        )


def _split(output: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and the logits of the auxiliary heads that the network returned."""
    if isinstance(output, Tensor):
        return output, ()
    if isinstance(output, tuple) and output and all(isinstance(item, Tensor | None) for item in output):
        logits, *aux = output
        if logits is not None:
            return logits, tuple(head for head in aux if head is not None)
    raise TypeError(f"the network returned {type(output).__name__}; expected logits, or a tuple that starts with them.")


def _accuracies(stage: str, num_classes: int) -> nn.ModuleDict:
    # Micro: the share of images that are right; torchmetrics' default averages over classes.
    # Without checks, which would wait for the GPU on every batch: the shape is checked and the loss checks the labels.
    metrics = {f"{stage}_acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False)}
    if num_classes > 5:
        metrics[f"{stage}_acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
    return nn.ModuleDict(metrics)


def _to_channels_last(model: nn.Module) -> None:
    # Not model.to(memory_format=...), which fails on the five-dimensional weights of a 3D convolution.
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r} must be {expected}.")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.")
