"""A look at what the user's steps call, before anything is done with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lq.callback.preparation import refused_batch
from lq.callback.steps.batches import first_samples, train_batches, validation_batches
from lq.callback.steps.calls import Call, CallTree, Step, has_weighted_layers, watched
from lq.callback.steps.evaluation import is_overridden
from lq.callback.steps.idle import run_idle, same_attributes
from lq.callback.steps.running import add_note, call_step
from lq.callback.steps.stages import StagedUnit
from lq.callback.steps.twin import twin_of
from lq.callback.steps.unit import Unit, unit_of_calls
from lq.util.modes import evaluating
from lq.util.quiet import quiet


def find_as_called(trainer: Any, staged: StagedUnit, batch: Any, *, is_given: bool = False) -> None:
    """Find the unit as the user's steps call it, by a look at each of them; the module notices nothing of that.

    Args:
        trainer: the Trainer, for its validation data.
        staged: the unit, in float.
        batch: of the training data, on the module's device.
        is_given: whether it is of the user's calibration dataloader instead.

    Raises:
        ValueError: where the steps never call what is to be quantized.
        CalibrationError: where ``training_step`` cannot take a batch that is given.
    """
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
    staged.use(unit)
    name = type(pl_module).__name__
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


def _calls_in_steps(
    trainer: Any, staged: StagedUnit, batch: Any
) -> tuple[list[Call], list[Call] | None, Exception | None]:
    """The calls in a training step, those in a validation step, and what the first one failed with."""
    twin = twin_of(staged.pl_module)
    module: Any = staged.pl_module if twin is None else twin
    # A few samples will do, and in training what training calls; unless the step cannot take these.
    for samples, trains in ((first_samples(batch), twin is not None), (batch, twin is not None), (batch, False)):
        training, error = _look(module, "training_step", samples, trains=trains)
        if error is None:
            break
    validation: list[Call] | None = None
    if is_overridden("validation_step", module):
        with suppress(Exception):  # it is the loop's affair to say what is wrong with it
            first = next(validation_batches(trainer, module), None)
            if first is not None:
                for samples in (first_samples(first), first):
                    validation, failure = _look(module, "validation_step", samples)
                    if failure is None:
                        break
                validation = validation or (None if failure is not None else [])
    return training, validation, error


def _look(pl_module: Any, step: Step, batch: Any, *, trains: bool = False) -> tuple[list[Call], Exception | None]:
    """The calls that a step makes of modules with layers, up to where it fails; and the error."""
    modules = {path: module for path, module in pl_module.named_modules() if has_weighted_layers(module)}
    modules.setdefault("", pl_module)
    tree, failure = CallTree(), None
    with quiet(), same_attributes(pl_module), evaluating(pl_module), torch.no_grad():
        if trains:
            pl_module.train()
        try:
            with watched(modules, tree):
                run_idle(pl_module, lambda: call_step(pl_module, step, batch))
        except Exception as error:
            failure = error
    return tree.calls, failure


def check_trained(staged: StagedUnit) -> None:
    """Refuse quantization-aware training of what no training step calls: an average that validation uses, say.

    Raises:
        ValueError: with what to use instead.
    """
    if staged.calibrated_with != "training_step":
        names = ", ".join(map(repr, staged.parts or (staged.path,)))
        raise ValueError(
            f"mode='qat': validation_step of {type(staged.pl_module).__name__} uses {names}, which training_step does "
            f"not call, so that it would learn nothing of INT8. Use mode='ptq', which converts what validation uses; "
            f"or leave averaging to lightning.pytorch.callbacks.EMAWeightAveraging, put after QuantizationCallback; or "
            f"name what is trained with QuantizationCallback(module='...')"
        )


def first_train_batches(trainer: Any, staged: StagedUnit, count: int) -> list[Any]:
    """The first training batches, of which training notices nothing where its data can be read again."""
    with unnoticed(trainer.fit_loop._data_source.dataloader()):
        return list(itertools.islice(train_batches(trainer, staged.pl_module), count))


@contextmanager
def unnoticed(loader: Any) -> Iterator[None]:
    """Inside, batches may be taken of a dataloader; afterwards it gives those that it would have given.

    Args:
        loader: of any kind; the generators of its own that it draws from are put back, and the global ones.
    """
    sources = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    sources.append(getattr(sources[-1], "sampler", None))
    generators = [getattr(source, "generator", None) for source in sources]
    states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    try:
        with isolate_rng():
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def can_be_read_again(loader: Any) -> bool:
    """Whether what is looked at is still there for the training."""
    return isinstance(loader, DataLoader) or iter(loader) is not loader
