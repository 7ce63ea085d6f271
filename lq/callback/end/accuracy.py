"""Where the metric may fall by no more than the user says: INT8 networks are tried until one keeps to it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.callback.end.fine_tuning import fine_tune
from lq.callback.settings import QuantizationSettings
from lq.callback.steps.batches import count_samples
from lq.callback.steps.evaluation import evaluate
from lq.callback.steps.running import call_unit, run_unit
from lq.callback.steps.stages import StagedUnit
from lq.deployment.engine_module import IN_PROCESS
from lq.deployment.formats import FORMATS
from lq.results.tuning import Tuning, TuningStep
from lq.tuning.builder import BIAS_CORRECTION, EQUALIZATION, Builder, keep_in_float, load, tensors_of
from lq.tuning.goal import Goal
from lq.tuning.journal import Journal, search_key
from lq.tuning.judged import FASTEST, Judge
from lq.tuning.search import Search
from lq.util.distributed import agreed, alone
from lq.util.modes import evaluating
from lq.workflow.comparison import SQNR, CalibratorComparison

#: Calibration samples that are kept for the methods and for the layers' sensitivity.
KEPT_SAMPLES = 512

#: How often the validation data are run through a network at most, with the float one.
MAX_EVALUATIONS = 40


def keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """``batches``, the first of which are put into ``kept``, on the CPU, until they have :data:`KEPT_SAMPLES`."""
    samples = 0
    for batch in batches:
        if samples < KEPT_SAMPLES:
            kept.append(tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, batch))
            samples += max(1, count_samples(batch))
        yield batch


def judged_by(settings: QuantizationSettings, trainer: Any) -> tuple[str, bool]:
    """``(name, smallest)`` of the metric that may fall by ``max_drop``, and whether a smaller one is better.

    Raises:
        ValueError: where no metric is named, and none is monitored.
    """
    callbacks = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    modes = {c.monitor: c.mode for c in reversed(callbacks) if getattr(c, "monitor", None) is not None}
    monitored = next((c.monitor for c in callbacks if getattr(c, "monitor", None) is not None), None)
    name = settings.max_drop_metric or monitored
    if name is None:
        raise ValueError(
            f"max_drop={settings.max_drop}: no callback monitors a metric that could drop: name one of those that "
            f"validation_step logs, QuantizationCallback(max_drop=..., max_drop_metric='val_acc')"
        )
    return name, modes.get(name) == "min"


def check_accuracy(settings: QuantizationSettings, trainer: Any) -> None:
    """Refuse a ``max_drop`` that nothing can be judged by.

    Raises:
        ValueError: where no metric is known.
    """
    judged_by(settings, trainer)


def check_measured(settings: QuantizationSettings, trainer: Any, metrics: Mapping[str, float]) -> None:
    """Refuse a metric that validation does not give.

    Raises:
        ValueError: with the names of those that it does.
    """
    name, _ = judged_by(settings, trainer)
    if name not in metrics:
        logged = ", ".join(map(repr, metrics)) or "nothing"
        raise ValueError(
            f"max_drop={settings.max_drop}: the validation gives no {name!r}, by which INT8 is to be judged; it gives "
            f"{logged}. Log it in validation_step, or name another one: QuantizationCallback(max_drop_metric=...)"
        )


def keep_accuracy(
    settings: QuantizationSettings,
    trainer: Any,
    staged: StagedUnit,
    batches: list[Any],
    float_metrics: Mapping[str, float],
    comparison: CalibratorComparison | None,
    keep_steps: bool,
) -> tuple[Tuning | None, Journal | None]:
    """Try INT8 networks by the user's own validation until one keeps to ``max_drop``; the unit is what it is made of.

    The first process does it, and the others take its unit over.

    Args:
        settings: say what may drop, and by how much.
        trainer: the Trainer, after training.
        staged: the unit, prepared and calibrated.
        batches: of calibration data, on the CPU.
        float_metrics: of the float model.
        comparison: of the calibrators, where they were compared.
        keep_steps: whether to write the steps to a file, for the case that the process is killed.

    Returns:
        What was tried, in the first process, and that file, for :func:`forget`.

    Raises:
        ValueError: where the validation does not give the metric.
    """
    tuning, journal = None, None
    with agreed("keeping to max_drop"):
        if trainer.is_global_zero:
            with alone():
                journal = _journal(settings, trainer, staged, float_metrics) if keep_steps else None
                tuning = _search(settings, trainer, staged, batches, float_metrics, comparison, journal)
    if trainer.world_size > 1:
        _take_over(trainer, staged, tuning)
    return tuning, journal


def forget(journal: Journal | None) -> None:
    """Remove the file of a search whose network is converted."""
    if journal is not None:
        with suppress(OSError):  # no reason to give a conversion up
            journal.path.unlink(missing_ok=True)


def _take_over(trainer: Any, staged: StagedUnit, tuning: Tuning | None) -> None:
    """Bring the unit to what the first process, the one with ``tuning``, has made of its own."""
    unit: Any = staged.unit
    pl_module: Any = staged.pl_module
    device = pl_module.device
    sent = None
    if tuning is not None:
        # Training changes what lies around the unit as well.
        around = tensors_of(pl_module.cpu()) if tuning.steps[tuning.chosen].fine_tuned else {}
        sent = tuning.float_layers, unit.cpu().state_dict(), around
    layers, state, around = trainer.strategy.broadcast(sent)
    if tuning is None:
        keep_in_float(unit.cpu(), layers)
        unit.load_state_dict(state)
        own = tensors_of(pl_module.cpu())
        load(pl_module, {name: value for name, value in around.items() if name in own})
    pl_module.to(device)


def _journal(
    settings: QuantizationSettings, trainer: Any, staged: StagedUnit, float_metrics: Mapping[str, float]
) -> Journal | None:
    """The steps of this search that an earlier process wrote: a resumed run logs elsewhere, but has the same root."""
    root = str(trainer.default_root_dir)
    if "://" in root:
        return None
    name, smallest = judged_by(settings, trainer)
    limits = (settings.calibrator, settings.calibration_batches, settings.calibration_samples)
    about = {
        "metric": (name, smallest),
        "float": f"{float_metrics.get(name, 0.0):.6g}",
        "runtime": settings.max_drop_runtime,
        "formats": settings.export,
        "epochs": settings.max_drop_epochs,
        "calibration": limits,
    }
    key = search_key(staged.unit, about)
    journal = Journal(Path(root) / f".lq-search-{key[:16]}.json", key)
    if len(journal):
        rank_zero_info(f"lq: {len(journal)} steps of a search that was interrupted are taken from {journal.path}")
    return journal


def _search(
    settings: QuantizationSettings,
    trainer: Any,
    staged: StagedUnit,
    batches: list[Any],
    float_metrics: Mapping[str, float],
    comparison: CalibratorComparison | None,
    journal: Journal | None,
) -> Tuning:
    pl_module: Any = staged.pl_module
    check_measured(settings, trainer, float_metrics)
    name, smallest = judged_by(settings, trainer)
    assert settings.max_drop is not None
    goal = Goal(
        settings.max_drop,
        MAX_EVALUATIONS,
        settings.max_drop_seconds,
        smallest,
        name,
        settings.max_drop_float_layers,
    )

    def evaluated(network: nn.Module) -> float:
        staged.put_int8(network)
        try:
            return evaluate(trainer, pl_module)[name]
        finally:
            staged.take_int8_off()
            staged.unit.cpu()

    def call(batch: Any) -> Any:
        with evaluating(pl_module):
            return call_unit(staged, batch, staged.calibrated_with)

    def observe(batch: Any) -> Any:
        with evaluating(pl_module):
            return run_unit(staged, batch, staged.calibrated_with)

    def train() -> None:
        limit = settings.max_drop_seconds
        left = None if limit is None else max(1.0, limit - (time.monotonic() - search.begun))
        fine_tune(trainer, pl_module, settings.max_drop_epochs, left)

    scores = {settings.calibrator: 0.0}  # the only one there is
    if comparison is not None:
        scores = {calibrator: values[SQNR] for calibrator, values in comparison.scores.items()}
    home = pl_module.device
    pl_module.cpu()
    try:
        epochs = settings.max_drop_epochs
        builder = Builder(
            staged.unit,
            batches,
            call,
            settings.target,
            observed=observe,
            judge=_judge(settings, staged),
            fine_tune=train if epochs else None,
            trained_with=pl_module,
        )
        methods = (BIAS_CORRECTION, EQUALIZATION)
        search = Search(
            builder, evaluated, float_metrics[name], goal, where_needed=methods, tell=_tell, journal=journal
        )
        tuning, choice, _ = search.run(scores)
        builder.settle(choice)
    finally:
        pl_module.to(home)
    (rank_zero_info if tuning.met else rank_zero_warn)(f"lq: max_drop={settings.max_drop}: {tuning.verdict}")
    return tuning


def _judge(settings: QuantizationSettings, staged: StagedUnit) -> Judge:
    runtime = settings.max_drop_runtime
    if staged.parts and runtime != IN_PROCESS:
        if runtime != FASTEST:
            rank_zero_warn(
                f"lq: max_drop_runtime={runtime!r}: the steps call the network part by part, and a file runs it as a "
                f"whole: INT8 is judged in process"
            )
        runtime = IN_PROCESS
    return Judge(runtime, ("pt2", *settings.export) if runtime == FASTEST else tuple(FORMATS), settings.target)


def _tell(step: TuningStep) -> None:
    rank_zero_info(f"lq: {step.change}: {step.metric:.4f} (drop {step.drop:+.4f}), {step.seconds:.1f} s")
