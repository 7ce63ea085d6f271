"""What float and INT8 predict for the same validation images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lq.callback.description import class_names, normalization
from lq.callback.steps.batches import validation_batches
from lq.callback.steps.evaluation import is_overridden
from lq.callback.steps.running import unit_arguments
from lq.callback.steps.stages import StagedUnit
from lq.charts.predictions import Predictions
from lq.graph.ops import WEIGHTED_MODULES
from lq.int8.module import Int8Module
from lq.util.modes import evaluating
from lq.workflow.prepare import unprepared

_log = logging.getLogger("lq")

#: As much of the validation data as is looked at.
MAX_BATCHES, MAX_SAMPLES = 16, 2048

#: Images that are kept of those whose prediction changed, and their longest side, pixels.
MAX_IMAGES, MAX_SIDE = 12, 96


class _NoClassifierError(Exception):
    """Why there are no predictions to compare."""


@torch.no_grad()
def compare_predictions(
    trainer: Any, staged: StagedUnit, int8: Int8Module, engines: Mapping[str, Callable[..., Any]] | None = None
) -> tuple[Predictions | None, dict[str, float]]:
    """Classes by the float unit and by ``int8``, for the first validation batches; None for what is no classifier.

    That is the case where batches are other than ``(images, labels)``, the unit does not return ``(N, C)``, or what
    it returns is not what decides. The log says which.

    Args:
        trainer: the Trainer, for its validation data.
        staged: the unit, prepared.
        int8: its INT8 network.
        engines: others that take the same arguments, by name.

    Returns:
        The predictions, and of each of ``engines`` that ran on all batches the share of the samples, in [0, 1], to
        which it gives the class that the float unit does.
    """
    try:
        return _compare(trainer, staged, int8, engines or {})
    except _NoClassifierError as reason:
        _log.debug("lq: no predictions of float and INT8 to compare: %s", reason)
        return None, {}


def _compare(
    trainer: Any, staged: StagedUnit, int8: Int8Module, engines: Mapping[str, Callable[..., Any]]
) -> tuple[Predictions, dict[str, float]]:
    pl_module, unit = staged.pl_module, staged.unit
    if not is_overridden("validation_step", pl_module):
        raise _NoClassifierError("there is no validation_step")
    if staged.parts or staged.calls.get("validation_step", 1) != 1:
        raise _NoClassifierError("the network is not called once, as a whole")
    if _layers_beside(staged):
        raise _NoClassifierError("there are layers after or beside the unit that is quantized")
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    kept: list[Tensor] = []
    classes = 0
    agreeing = dict.fromkeys(engines, 0)
    with unprepared(unit), evaluating(pl_module):
        for index, batch in enumerate(validation_batches(trainer, pl_module)):
            if index == MAX_BATCHES or sum(len(row[0]) for row in results) >= MAX_SAMPLES:
                break
            images, labels = _images_and_labels(batch)
            args, kwargs = unit_arguments(staged, batch, "validation_step")
            logits = (unit(*args, **kwargs), int8(*args, **kwargs))
            if not all(isinstance(out, Tensor) and out.shape[:-1] == labels.shape for out in logits):
                raise _NoClassifierError("the unit does not return a tensor of shape (N, C)")
            classes = logits[0].shape[1]
            if classes < 2 or int(labels.max()) >= classes or int(labels.min()) < 0:
                raise _NoClassifierError("the labels are no indices of the unit's outputs")
            before, after = (out.argmax(1).cpu() for out in logits)
            results.append((labels.cpu(), before, after))
            for name in list(agreeing):
                try:
                    agreeing[name] += int((engines[name](*args, **kwargs).argmax(1).cpu() == before).sum())
                except Exception as error:
                    _log.debug("lq: no predictions of %s: %s", name, error)
                    del agreeing[name]
            kept.extend(images[index] for index in (before != after).nonzero()[: MAX_IMAGES - len(kept), 0].tolist())
    if not results:
        raise _NoClassifierError("there are no validation data")
    labels, before, after = (torch.cat(column) for column in zip(*results, strict=True))
    names = class_names(trainer)
    predictions = Predictions(
        labels=labels,
        float_classes=before,
        int8_classes=after,
        num_classes=classes,
        changed=(before != after).nonzero()[:MAX_IMAGES, 0],
        images=_pictures(kept, normalization(trainer)),
        names=names if names is not None and len(names) == classes else None,
    )
    return predictions, {name: count / len(labels) for name, count in agreeing.items()}


def _layers_beside(staged: StagedUnit) -> bool:
    inside = set(staged.unit.modules())
    return any(isinstance(m, WEIGHTED_MODULES) and m not in inside for m in staged.pl_module.modules())


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise _NoClassifierError("the batches are not (images, labels)")
    images, labels = batch
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(images) or not len(labels):
        raise _NoClassifierError("the labels are no integers of shape (N,)")
    return images, labels.long()


def _pictures(images: list[Tensor], normalization: dict[str, list[float]] | None) -> Tensor | None:
    """``(K, C, H, W)`` in [0, 1], of what the network is given; None for what is no image."""
    if any(image.dim() != 3 or image.shape[0] not in (1, 3) or image.shape != images[0].shape for image in images):
        return None
    if not images:
        return torch.empty(0, 3, 1, 1)
    batch = torch.stack(images).detach().float().cpu()
    if normalization is not None and len(normalization["mean"]) == len(normalization["std"]) == batch.shape[1]:
        std, mean = (torch.tensor(normalization[name]).reshape(-1, 1, 1) for name in ("std", "mean"))
        batch = batch * std + mean
    elif batch.min() < 0 or batch.max() > 1:
        low, high = (ends(batch, (1, 2, 3), keepdim=True) for ends in (torch.amin, torch.amax))
        batch = (batch - low) / (high - low).clamp(min=1e-12)
    if max(batch.shape[2:]) > MAX_SIDE:
        share = MAX_SIDE / max(batch.shape[2:])
        batch = F.interpolate(batch, scale_factor=share, mode="area")
    return batch.clamp(0, 1)
