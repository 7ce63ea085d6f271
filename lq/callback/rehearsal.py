"""The conversion to INT8, rehearsed on a copy before training begins: what would fail when it has ended fails now."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info

from lq.callback.description import class_names, normalization
from lq.callback.end.accuracy import check_measured
from lq.callback.end.joining import export_joined, joined_in_step
from lq.callback.outputs import NETWORK
from lq.callback.preparation import check_batch, prepare_for_batch
from lq.callback.settings import QuantizationSettings
from lq.callback.steps.batches import first_samples
from lq.callback.steps.between import Between
from lq.callback.steps.calls import Step
from lq.callback.steps.evaluation import evaluate, judged_step
from lq.callback.steps.first_batches import first_batches_of, first_train_batches, first_validation_batches
from lq.callback.steps.looking import begin_training, begun_copy, find_as_called
from lq.callback.steps.running import run_unit
from lq.callback.steps.stages import StagedUnit, staged_unit
from lq.callback.steps.twin import twin_of, what_cannot_be_copied
from lq.callback.steps.unnoticed import can_be_read_again
from lq.deployment.formats import FORMATS
from lq.int8.module import Int8Module
from lq.util.distributed import agreed, gathered
from lq.util.modes import evaluating
from lq.util.quiet import quiet
from lq.workflow.calibrate import AUTO, calibrate_and_compare
from lq.workflow.convert import convert
from lq.workflow.prepare import activation_quantizers, is_prepared, simulate

#: Batches that are calibrated with.
BATCHES = 2

_log = logging.getLogger("lq")


def rehearse(settings: QuantizationSettings, trainer: Any, staged: StagedUnit) -> None:
    """Find now what would fail in the conversion, as far as the settings ask for it.

    Args:
        settings: say what is to be done.
        trainer: the Trainer, before training.
        staged: the unit, in float (PTQ) or prepared (QAT).

    Raises:
        Whatever would be raised when training has ended.
    """
    rehearses = settings.rehearse and not getattr(trainer, "fast_dev_run", False) and trainer.max_epochs != 0
    given = settings.calibration_dataloader if settings.mode == "ptq" else None
    if given is not None and not can_be_read_again(given):
        given = None  # what is looked at would be gone
    if not rehearses and (settings.mode == "qat" or (given is None and not settings.overrides.specs)):
        return
    batches = first_train_batches(trainer, staged.pl_module, BATCHES)
    calibration = batches
    if given is not None:
        calibration = first_batches_of(given, staged.pl_module, BATCHES)
    if not batches or not calibration:
        return  # nothing that could be looked at
    with isolate_rng():
        if settings.mode == "ptq":
            find_as_called(trainer, staged, batches[0], settings.overrides)
            with agreed("looking at the calibration data"):
                if given is not None:
                    check_batch(begun_copy(staged) or staged, calibration[0])
    if rehearses:
        _rehearse_on_a_copy(settings, trainer, staged, calibration)
    elif settings.overrides.specs:
        _check_overrides(settings, staged, calibration[0])


def _check_overrides(settings: QuantizationSettings, staged: StagedUnit, batch: Any) -> None:
    """Find a name that matches nothing."""
    with isolate_rng():
        prepare_for_batch(
            staged,
            batch,
            target=settings.target,
            mode="ptq",
            observer="minmax",
            overrides=settings.overrides,
            like=begun_copy(staged),
        )
        staged.to_float()


def _rehearse_on_a_copy(settings: QuantizationSettings, trainer: Any, staged: StagedUnit, batches: list[Any]) -> None:
    """Prepare, calibrate, convert, write every file that is asked for, and run an INT8 batch of the user's validation.

    All of it happens on a copy of the module, with files that nobody sees. Every process has to call this.

    Args:
        settings: say what is to be done.
        trainer: the Trainer, before training.
        staged: the unit, in float (PTQ) or prepared (QAT).
        batches: a few, of what will be calibrated or trained on, on the module's device.

    Raises:
        Whatever would be raised when training has ended.
    """
    began = time.perf_counter()
    with isolate_rng():
        twin = twin_of(staged.pl_module)
        if not all(gathered(twin is not None)):
            _log.info(
                "lq: no rehearsal: %s cannot be copied, and what fails in the conversion fails after the training: %s",
                type(staged.pl_module).__name__,
                what_cannot_be_copied(staged.pl_module),
            )
            return
        if staged.needs_hooks:
            begin_training(twin)
        with quiet("lq", "lightning.pytorch", "lightning_utilities"), torch.compiler.set_stance("force_eager"):
            _calibrate(settings, staged_unit(twin), batches)
            with agreed("rehearsing the conversion"):
                if trainer.is_global_zero:
                    _convert(settings, trainer, staged_unit(twin), batches)
    seconds = time.perf_counter() - began
    rank_zero_info(f"lq: what follows the training was rehearsed in {seconds:.1f} s")


def _calibrate(settings: QuantizationSettings, staged: StagedUnit, batches: list[Any]) -> None:
    calibrator = None if settings.calibrator == AUTO or settings.mode == "qat" else settings.calibrator
    with agreed("preparing"):
        if settings.mode == "ptq":
            prepare_for_batch(
                staged,
                batches[0],
                target=settings.target,
                mode="ptq",
                observer="histogram",
                overrides=settings.overrides,
                is_given=settings.calibration_dataloader is not None,
            )
    unit = staged.unit
    assert is_prepared(unit)
    if all(quantizer.calibrated for quantizer in activation_quantizers(unit).values()):
        simulate(unit)  # of a run that is resumed
        return
    with evaluating(staged.pl_module):
        calibrate_and_compare(
            unit,
            batches,
            calibrator=calibrator,
            forward=lambda batch: run_unit(staged, batch, staged.calibrated_with),
        )


def _convert(settings: QuantizationSettings, trainer: Any, staged: StagedUnit, batches: list[Any]) -> None:
    pl_module: Any = staged.pl_module
    unit = staged.unit.cpu()
    int8 = convert(unit, settings.target)
    between = _between(trainer, staged, int8, batches)
    about: dict[str, Any] = {"labels": class_names(trainer), "preprocessing": normalization(trainer)}
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys((NETWORK, *settings.export)):
            format = FORMATS[name]
            # What nobody asked for is left out at the end where it fails.
            if not format.takes_long and name not in settings.optional_formats:
                export_joined(name, Path(folder), unit, int8, between, **about)
    staged.put_int8(int8)
    if settings.evaluate:
        metrics = evaluate(trainer, pl_module, limit_batches=1)
        if settings.max_drop is not None:
            check_measured(settings, trainer, metrics)


def _between(trainer: Any, staged: StagedUnit, int8: Int8Module, batches: list[Any]) -> Between | None:
    """What the steps compute between the parts that they call, as it will be seen at the end."""
    if not staged.parts:
        return None
    step: Step = "training_step"
    if judged_step(trainer, staged) == "validation_step":
        validation = first_validation_batches(trainer, staged.pl_module, BATCHES)
        if validation:
            step, batches = "validation_step", validation
    batches = [first_samples(batch) for batch in batches]
    return joined_in_step(staged, step, move_data_to_device(batches, torch.device("cpu")), int8)
