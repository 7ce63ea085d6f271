"""What happens when training has ended: weights are chosen, calibrated and converted, by all processes together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info

from lq.callback.averages import averages_buffers, refresh_averaged_ranges
from lq.callback.description import class_names, normalization, run_settings
from lq.callback.end.accuracy import forget, keep_accuracy, keeping
from lq.callback.end.conversion import Conversion, Outcome
from lq.callback.end.inspection import Findings, inspect_unit
from lq.callback.end.joining import joined_files
from lq.callback.end.predictions import compare_predictions
from lq.callback.end.stopwatch import Stopwatch
from lq.callback.end.weights import choose_weights, copied_weights, load_weights
from lq.callback.preparation import prepare_for_batch
from lq.callback.settings import QuantizationSettings
from lq.callback.steps.batches import calibration_batches
from lq.callback.steps.evaluation import evaluate
from lq.callback.steps.looking import find_as_called
from lq.callback.steps.running import run_unit
from lq.callback.steps.stages import StagedUnit
from lq.callback.validated import ValidatedWeights, differs
from lq.errors import CalibrationError
from lq.interface.metadata import dtype_name
from lq.util.distributed import agreed
from lq.util.modes import evaluating
from lq.workflow.calibrate import calibrate_and_compare
from lq.workflow.comparison import CalibratorComparison
from lq.workflow.convert import convert
from lq.workflow.prepare import refresh_weights, unprepared


def quantize_at_fit_end(
    settings: QuantizationSettings,
    trainer: Any,
    staged: StagedUnit,
    output_dir: Path | None,
    *,
    known_before: Mapping[str, Any] | None = None,
    validated: ValidatedWeights | None = None,
    fit_begun: float | None = None,
    source: str | None = None,
) -> Outcome:
    """Convert the unit, and measure what that did.

    Every process calibrates on its share of the data. The first one converts, writes and measures while the others
    wait; then they convert too, and all have the same INT8 module. Whatever fails, in whichever process, the module is
    afterwards as training left it.

    Args:
        settings: say what to do.
        trainer: the Trainer, after training.
        staged: the unit, in float (PTQ) or prepared (QAT).
        output_dir: where the files go; None to keep none.
        known_before: see :func:`~lq.callback.end.weights.load_weights`.
        validated: the weights that validation used in place of those that were trained.
        fit_begun: when, see :meth:`~lq.callback.settings.QuantizationSettings.analysis_seconds`.
        source: what the weights are, where they are not to be chosen.

    Returns:
        As :meth:`Conversion.run` does.
    """
    pl_module: Any = trainer.lightning_module
    trained = copied_weights(pl_module)
    dtype = pl_module.dtype
    watch = Stopwatch()
    try:
        with isolate_rng(), torch.compiler.set_stance("force_eager"):
            outcome = _quantize(
                settings,
                trainer,
                staged,
                output_dir,
                watch,
                known_before=known_before,
                validated=validated,
                fit_begun=fit_begun,
                source=source,
            )
        watch.tell()
        return outcome
    except BaseException:
        staged.take_int8_off()
        if settings.mode == "ptq":
            staged.to_float()
        if pl_module.dtype != dtype:
            pl_module.to(dtype)
        pl_module.load_state_dict(trained, strict=False)
        raise


def _quantize(
    settings: QuantizationSettings,
    trainer: Any,
    staged: StagedUnit,
    output_dir: Path | None,
    watch: Stopwatch,
    *,
    known_before: Mapping[str, Any] | None,
    validated: ValidatedWeights | None,
    fit_begun: float | None,
    source: str | None,
) -> Outcome:
    pl_module = trainer.lightning_module
    path, weights = (None, source) if source is not None else choose_weights(trainer, settings.weights)
    if path is not None:
        load_weights(trainer, pl_module, path, known_before)
    average = None if validated is None else validated.of(path)
    if average is not None and differs(pl_module, average):
        pl_module.load_state_dict(average, strict=False)
        if settings.mode == "qat":
            refresh_averaged_ranges(staged)
            refresh_weights(staged.unit)
        weights = f"the average that validation used {'last' if path is None else f'when it led to {path}'}"
    rank_zero_info(f"lq: INT8 is made of {weights}")
    if pl_module.dtype != torch.float32:
        rank_zero_info(f"lq: the weights are cast from {dtype_name(pl_module.dtype)} to float32, and calibrated so")
        pl_module.float()
    evaluates = settings.evaluate and trainer.is_global_zero
    float_metrics: dict[str, float] = {}
    comparison, tuning, journal = None, None, None
    kept: list[Any] = []
    if settings.mode == "ptq":
        with agreed("evaluating the float model"), watch.stage("evaluation"):
            if evaluates:
                float_metrics = evaluate(trainer, pl_module)
        with watch.stage("calibration"):
            comparison = _calibrate(settings, trainer, staged, kept)
        if settings.max_drop is not None:
            with watch.stage("accuracy"):
                tuning, journal = keep_accuracy(
                    settings, trainer, staged, kept, float_metrics, comparison, keep_steps=output_dir is not None
                )
    else:
        if averages_buffers(trainer):
            refresh_averaged_ranges(staged)
        with agreed("evaluating the float model"), unprepared(staged.unit), watch.stage("evaluation"):
            if evaluates:
                float_metrics = evaluate(trainer, pl_module)
    conversion = Conversion(
        output_dir=output_dir,
        weights=weights,
        target=settings.target,
        compare=partial(compare_predictions, trainer),
        watch=watch,
        formats=settings.export,
        optional=settings.optional_formats,
        labels=class_names(trainer),
        preprocessing=normalization(trainer),
        evaluate=(lambda: evaluate(trainer, pl_module)) if evaluates else None,
        float_seconds=watch.seconds.get("evaluation", 0.0),
        comparison=comparison,
        tuning=tuning,
        inspect=partial(inspect_unit, settings, trainer, staged, fit_begun=fit_begun) if settings.analyze else None,
        settings=run_settings(settings, trainer, staged.parts or (staged.path,)),
        between=partial(joined_files, settings, trainer, staged),
    )
    outcome = Outcome(None, None, Findings())
    with agreed("converting to INT8"):
        if trainer.is_global_zero:
            outcome = conversion.run(staged, float_metrics)
            forget(journal)
    if outcome.result is None:
        staged.put_int8(convert(staged.unit.cpu(), settings.target))
    return outcome


def _calibrate(
    settings: QuantizationSettings, trainer: Any, staged: StagedUnit, kept: list[Any]
) -> CalibratorComparison | None:
    """Observe batches on the device that trained; where ``max_drop`` needs some, they are put into ``kept``."""
    bar = trainer.progress_bar_callback
    pl_module = trainer.lightning_module
    home = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        with agreed("calibrating"):
            batches = calibration_batches(trainer, pl_module, settings.calibration_dataloader)
            first = next(batches, None)
            if first is None:
                raise CalibrationError("the calibration dataloader (by default the train dataloader) gave no batch")
        is_given = settings.calibration_dataloader is not None
        if not staged.is_found:
            find_as_called(trainer, staged, first, settings.overrides, is_given=is_given)
        unit = staged.unit
        with agreed("preparing"):
            # All calibrators but this one need histograms.
            calibrators = {settings.calibrator, *settings.overrides.calibrators}
            observer = "minmax" if calibrators == {"minmax"} else "histogram"
            prepare_for_batch(
                staged,
                first,
                target=settings.target,
                mode="ptq",
                observer=observer,
                overrides=settings.overrides,
                is_given=is_given,
            )
        observed: Iterable[Any] = itertools.chain([first], batches)
        if settings.max_drop is not None:
            observed = keeping(observed, kept)
        with evaluating(pl_module):
            comparison = calibrate_and_compare(
                unit,
                observed,
                calibrator=settings.calibrator,
                num_batches=_share(settings.calibration_batches, trainer.world_size),
                num_samples=_share(settings.calibration_samples, trainer.world_size),
                forward=lambda batch: run_unit(staged, batch, staged.calibrated_with),
                progress=trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", True),
            )
    finally:
        pl_module.to(home)
    if comparison is not None:
        scores = ", ".join(f"{name} {next(iter(v.values())):.1f}" for name, v in comparison.scores.items())
        rank_zero_info(f"lq: calibrator {comparison.best()!r} chosen; SQNR of the outputs in dB: {scores}")
    return comparison


def _share(count: int | None, world_size: int) -> int | None:
    return None if count is None else math.ceil(count / world_size)
