"""A look at what the user's steps call, before anything is done with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lq.callback.preparation import prepare_for_batch, refused_batch
from lq.callback.steps.attributes import same_attributes
from lq.callback.steps.batches import first_samples
from lq.callback.steps.calls import Call, CallTree, Step, has_weighted_layers, merge, watched
from lq.callback.steps.evaluation import is_overridden
from lq.callback.steps.first_batches import first_validation_batches
from lq.callback.steps.idle import run_idle
from lq.callback.steps.running import add_note, call_step, run_unit
from lq.callback.steps.stages import StagedUnit, attach, staged_unit
from lq.callback.steps.twin import twin_of
from lq.callback.steps.unit import Unit, around, find_unit, network_within, unit_of_calls
from lq.deployment.export import export
from lq.errors import CaptureError
from lq.schemes.overrides import Overrides
from lq.schemes.targets import X86
from lq.util.distributed import agreed, alone, gathered
from lq.util.modes import evaluating
from lq.util.quiet import quiet
from lq.workflow.calibrate import calibrate

#: How often a training step is looked at again where validation calls what it did not.
_LOOKS = 20


def find_as_called(
    trainer: Any, staged: StagedUnit, batch: Any, overrides: Overrides, *, is_given: bool = False
) -> None:
    """Find the unit as the user's steps call it, by a look at each of them; the module notices nothing of that.

    Every process has to call it, and all take what the first one finds.

    Args:
        trainer: the Trainer, for its validation data.
        staged: the unit, in float.
        batch: of the training data, on the module's device.
        overrides: what the user says of layers.
        is_given: whether it is of the user's calibration dataloader instead.

    Raises:
        ValueError: where the steps never call what is to be quantized.
        CalibrationError: where ``training_step`` cannot take a batch that is given.
    """
    with agreed("looking at the steps"):
        _find(trainer, staged, batch, overrides, is_given)
    staged.use(*gathered(staged.found)[0])
    name = type(staged.pl_module).__name__
    if staged.parts:
        rank_zero_info(
            f"lq: the steps of {name} call {', '.join(map(repr, staged.parts))} on their own: each is quantized by "
            f"itself, and what lies between them stays float"
        )
    if not staged.is_judged:
        rank_zero_warn(
            f"lq: validation_step of {name} does not call {staged.path!r}, which is quantized: its metrics say nothing "
            f"of INT8. Name what it calls with QuantizationCallback(module='...')"
        )


def _find(trainer: Any, staged: StagedUnit, batch: Any, overrides: Overrides, is_given: bool) -> None:
    pl_module = staged.pl_module
    training, validation, error = _calls_in_steps(trainer, staged, batch)
    unit: Unit | None = None
    try:
        unit = unit_of_calls(pl_module, staged.name, training, validation)
    except ValueError:
        if error is None:
            raise
    if error is not None and (unit is None or unit.calibrated_with != "training_step"):
        if is_given:
            raise refused_batch(pl_module, "training_step", batch, error) from error
        add_note(error, type(staged.unit).__name__, "training_step")
        raise error
    assert unit is not None
    outer = find_unit(pl_module, staged.name)
    if staged.name is None and network_within(outer, [*training, *(validation or ())]):
        rank_zero_info(
            f"lq: {outer or type(pl_module).__name__!r} takes text beside tensors, which no file does: "
            f"{', '.join(map(repr, unit.paths))} in it is what is quantized and exported"
        )
    staged.use(unit if staged.name is not None else _with_forward(staged, unit, training, validation, batch, overrides))


def _with_forward(
    staged: StagedUnit,
    unit: Unit,
    training: list[Call],
    validation: list[Call] | None,
    batch: Any,
    overrides: Overrides,
) -> Unit:
    """``unit``, or the LightningModule with its own forward, where that computes more and can be prepared: the files
    then compute what the module does."""
    wider = around(unit, training, validation)
    if wider is None:
        return unit
    whole, reason = wider
    (path,), name = unit.paths, type(staged.pl_module).__name__
    if not reason:
        try:
            _try(staged, whole, batch, overrides)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
        else:
            rank_zero_info(
                f"lq: forward of {name} computes more than {path!r}, so all of it is what is quantized and exported; "
                f"for {path!r} alone use QuantizationCallback(module={path!r})"
            )
            return whole
    rank_zero_warn(
        f"lq: forward of {name} computes more than {path!r}, which alone is quantized, and is what the files compute "
        f"({reason}). Where that is wanted, QuantizationCallback(module={path!r}) says so"
    )
    return unit


def _try(staged: StagedUnit, unit: Unit, batch: Any, overrides: Overrides) -> None:
    """Go the way to a file with ``unit``, on a copy; raises what fails."""
    twin = twin_of(staged.pl_module)
    if twin is None:
        raise CaptureError(f"{type(staged.pl_module).__name__} cannot be copied")
    if staged.needs_hooks:
        begin_training(twin)
    trial = attach(twin, None)
    trial.use(unit)
    # torch says at length what it cannot capture. The other processes may have left by another way.
    with alone(), quiet("lq", "torch"), isolate_rng(), tempfile.TemporaryDirectory() as folder:
        prepare_for_batch(trial, batch, target=X86, mode="ptq", observer="minmax", overrides=overrides)
        with evaluating(twin):
            calibrate(trial.unit, [batch], forward=lambda each: run_unit(trial, each, trial.calibrated_with))
            export(trial.unit.cpu(), Path(folder) / "trial.pt2", verify=False)


def _calls_in_steps(
    trainer: Any, staged: StagedUnit, batch: Any
) -> tuple[list[Call], list[Call] | None, Exception | None]:
    """The calls in a training step, those in a validation step, and what the first one failed with."""
    twin = twin_of(staged.pl_module)
    module: Any = staged.pl_module if twin is None else twin
    # A few samples will do, and in training what training calls; unless the step cannot take these.
    ways = [(first_samples(batch), twin is not None), (batch, twin is not None), (batch, False)]
    for samples, trains in ways:
        training, error = _look(module, "training_step", samples, trains=trains)
        if error is None:
            break
    if error is not None and not training and twin is not None:
        # A step may use what a hook has set before the first one.
        begin_training(twin)
        again, failure = _look(twin, "training_step", samples, trains=trains)
        if again:
            staged.needs_hooks = True
            training, error = again, failure
    training_batch = (samples, trains)
    validation: list[Call] | None = None
    if is_overridden("validation_step", module):
        with suppress(Exception):  # it is the loop's affair to say what is wrong with it
            for first in first_validation_batches(trainer, module, 1, take=True):
                for samples in (first_samples(first), first):
                    validation, failure = _look(module, "validation_step", samples)
                    if failure is None:
                        break
                validation = validation or (None if failure is not None else [])
    if error is None and validation:
        _look_for_the_rest(module, training, validation, *training_batch)
    return training, validation, error


def begun_copy(staged: StagedUnit) -> StagedUnit | None:
    """The unit of a copy on which the hooks before the first step have run, where the step needs them; else None."""
    twin = twin_of(staged.pl_module) if staged.needs_hooks else None
    if twin is None:
        return None
    begin_training(twin)
    return staged_unit(twin)


def begin_training(twin: Any) -> None:
    """Call the hooks that come before the first training step, as far as they can do without a loop.

    Args:
        twin: a copy of the LightningModule.
    """
    for name in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
        with suppress(Exception), quiet():
            run_idle(twin, getattr(twin, name))


def _look_for_the_rest(module: Any, training: list[Call], validation: list[Call], batch: Any, trains: bool) -> None:
    """Add what training leaves out at random, such as the layers of stochastic depth, and calls another time."""
    wanted = {path for call in validation for path in call.paths()}
    for _ in range(_LOOKS):
        if not trains or wanted <= {path for call in training for path in call.paths()}:
            return
        again, error = _look(module, "training_step", batch, trains=True)
        if error is not None:
            return
        merge(training, again)


def _look(pl_module: Any, step: Step, batch: Any, *, trains: bool = False) -> tuple[list[Call], Exception | None]:
    """The calls that a step makes of modules with layers, up to where it fails; and the error."""
    modules = {path: module for path, module in pl_module.named_modules() if has_weighted_layers(module)}
    modules.setdefault("", pl_module)
    tree, failure = CallTree(), None

    def run() -> None:
        tree.begin_again()
        call_step(pl_module, step, batch)

    with quiet(), same_attributes(pl_module), evaluating(pl_module), torch.no_grad():
        if trains:
            pl_module.train()
        try:
            with watched(modules, tree), tree:
                run_idle(pl_module, run)
        except Exception as error:
            failure = error
    return tree.calls, failure


def check_trained(staged: StagedUnit) -> None:
    """Refuse quantization-aware training of what no training step calls: an average that validation uses, say.

    Raises:
        ValueError: with what to use instead.
    """
    if staged.calibrated_with != "training_step":
        raise _trains_nothing(staged, "which training_step does not call")
    if not any(parameter.requires_grad for parameter in _parameters(staged)):
        raise _trains_nothing(staged, "of which no parameter requires a gradient")


def check_optimized(staged: StagedUnit, optimizers: Iterable[Any]) -> None:
    """Refuse quantization-aware training of what no optimizer changes: a teacher that is an average, say.

    Args:
        staged: the unit.
        optimizers: the Trainer's.

    Raises:
        ValueError: with what to use instead.
    """
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    others = any(id(parameter) in optimized for parameter in staged.pl_module.parameters())
    if others and not any(id(parameter) in optimized for parameter in _parameters(staged)):
        raise _trains_nothing(staged, "of which no optimizer has a parameter")


def _parameters(staged: StagedUnit) -> list[nn.Parameter]:
    modules = [staged.pl_module.get_submodule(path) for path in staged.parts] or [staged.unit]
    return [parameter for module in modules for parameter in module.parameters()]


def _trains_nothing(staged: StagedUnit, why: str) -> ValueError:
    names = ", ".join(map(repr, staged.parts or (staged.path or "itself",)))
    return ValueError(
        f"mode='qat': validation_step of {type(staged.pl_module).__name__} uses {names}, {why}, so that it would learn "
        f"nothing of INT8. Use mode='ptq', which converts what validation uses; or leave averaging to "
        f"lightning.pytorch.callbacks.EMAWeightAveraging, put after QuantizationCallback; or name what is trained with "
        f"QuantizationCallback(module='...')"
    )
