"""Preparing the unit with what the user's own step calls it with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lq.callback.steps.batches import count_samples, first_samples, repeat_samples
from lq.callback.steps.calls import Step
from lq.callback.steps.evaluation import judged_step
from lq.callback.steps.first_batches import first_validation_batches
from lq.callback.steps.running import unit_arguments
from lq.callback.steps.stages import StagedUnit
from lq.errors import CalibrationError, CaptureError
from lq.graph.capture.signature import signature_of
from lq.interface.metadata import dtype_name
from lq.schemes.overrides import Overrides
from lq.schemes.targets import Target
from lq.util.modes import evaluating
from lq.workflow.prepare import Mode, prepare

_log = logging.getLogger("lq")

#: What autocast computes in.
_HALF = (torch.bfloat16, torch.float16)


def prepare_for_batch(
    staged: StagedUnit,
    batch: Any,
    *,
    target: Target,
    mode: Mode,
    observer: str,
    overrides: Overrides,
    is_given: bool = False,
    like: StagedUnit | None = None,
) -> None:
    """Put quantizers on the unit, for inputs as ``training_step`` makes them of ``batch``.

    Args:
        staged: the unit, in float.
        batch: of a dataloader, on the module's device.
        target: see :func:`lq.prepare`.
        mode: likewise.
        observer: likewise.
        overrides: likewise.
        is_given: whether it is of the user's calibration dataloader.
        like: the unit of a copy, whose step is called instead.

    Raises:
        CalibrationError: where ``training_step`` cannot take a batch that is.
    """
    args, kwargs = first_samples(_arguments_for(like or staged, batch, is_given))
    if staged.parts:
        args, kwargs = _in_dtype_of(staged.unit, (args, kwargs))
    elif staged.calibrated_with == "training_step":
        args, kwargs = _as_judged(staged, args, kwargs)
    staged.prepare_with(
        partial(
            prepare,
            example_inputs=args,
            example_kwargs=kwargs,
            target=target,
            mode=mode,
            observer=observer,
            overrides=staged.overrides(overrides),
        )
    )


def _as_judged(
    staged: StagedUnit, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the validation gives them, where training has other settings for its loss, as
    ``return_features=True``, or images of another size: INT8, and the files, are for what the validation does."""
    trainer = getattr(staged.pl_module, "_trainer", None)
    if trainer is None or judged_step(trainer, staged) == "training_step":
        return args, kwargs
    signature = signature_of(staged.unit, staged.unit.__dict__.get("forward"))
    inputs, settings = signature.bind(args, kwargs)
    try:
        (batch,) = first_validation_batches(trainer, staged.pl_module, 1)
        with evaluating(staged.pl_module), torch.no_grad(), isolate_rng():
            judged_inputs, judged = signature.bind(*unit_arguments(staged, first_samples(batch), "validation_step"))
        if judged_inputs.keys() != inputs.keys():
            return args, kwargs
        others = {name: value for name, value in judged.items() if value != settings.get(name)}
        is_of_other_size = _differ_in_size(inputs, judged_inputs)
    except Exception:
        return args, kwargs  # what the validation cannot do, or compare, is told where it is run
    if others:
        values = ", ".join(f"{name}={value!r}" for name, value in others.items())
        rank_zero_info(f"lq: INT8 is of the call that validation_step makes, with {values}: training_step has others")
    if is_of_other_size:
        # One sample would fix the size of the batch.
        inputs = repeat_samples(judged_inputs, max(2, count_samples(judged_inputs)))
        rank_zero_info(
            "lq: the files are for images of the size that validation_step gives, which is not the training's"
        )
    return signature.arguments({**inputs, **judged}) if others or is_of_other_size else (args, kwargs)


def _differ_in_size(inputs: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether tensors are alike but for the sizes of images."""
    (one, spec), (other, other_spec) = tree_flatten(dict(inputs)), tree_flatten(dict(others))
    pairs = [pair for pair in zip(one, other, strict=False) if all(isinstance(value, Tensor) for value in pair)]
    alike = spec == other_spec and all(
        a.dtype == b.dtype and a.dim() == b.dim() and a.shape[1:2] == b.shape[1:2] for a, b in pairs
    )
    return alike and any(a.shape[2:] != b.shape[2:] for a, b in pairs)


def _in_dtype_of(unit: nn.Module, arguments: Any) -> Any:
    """``arguments`` for a unit in float32 that a region of autocast gives values in 16 bits: it is prepared outside."""
    dtypes = {parameter.dtype for parameter in unit.parameters() if parameter.is_floating_point()}
    if dtypes != {torch.float32}:
        return arguments
    return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.dtype in _HALF else v, arguments)


def tell_of_a_change(staged: StagedUnit) -> None:
    """Say in the log where the unit computes something else by now than when it was prepared, and what that means.

    A callback may change an attribute between epochs, or replace a layer: training follows, and so does the INT8
    network where all that it rounds has a quantizer.

    Args:
        staged: the unit, prepared.
    """
    forward = staged.prepared_forward
    change = forward.change()
    if change is None:
        return
    try:
        forward.analyze()
        then = "its INT8 network will be of the forward as it is by then"
    except CaptureError as error:
        then = f"it cannot be converted as it is now: {error}"
    _log.warning(
        "lq: the forward of the module that is quantized has changed since it was prepared (%s); %s", change, then
    )


def check_batch(staged: StagedUnit, batch: Any) -> None:
    """Refuse a batch of the user's calibration dataloader that ``training_step`` cannot take.

    Args:
        staged: the unit.
        batch: of that dataloader, on the module's device.

    Raises:
        CalibrationError: with what the batch is, and what the step said of it.
    """
    _arguments_for(staged, batch, is_given=True)


def _arguments_for(staged: StagedUnit, batch: Any, is_given: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pl_module = staged.pl_module
    try:
        with evaluating(pl_module), torch.no_grad():
            arguments = unit_arguments(staged, batch, staged.calibrated_with)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments)):
            raise TypeError(f"it gives the {type(staged.unit).__name__} no tensor")
    except Exception as error:
        if not is_given:
            raise
        raise refused_batch(pl_module, staged.calibrated_with, batch, error) from error
    return arguments


def refused_batch(pl_module: Any, step: Step, batch: Any, error: Exception) -> CalibrationError:
    """What to raise where a step cannot take a batch of the user's calibration dataloader.

    Args:
        pl_module: the LightningModule.
        step: of it.
        batch: of that dataloader.
        error: that the step raised.
    """
    return CalibrationError(
        f"{step} of {type(pl_module).__name__} does not take a batch of calibration_dataloader, which is "
        f"{_described(batch)} ({type(error).__name__}: {error}); give batches as the train dataloader does"
    )


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a {dtype_name(batch.dtype)} tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {', '.join(map(_described, batch)) or 'nothing'}"
    return f"a {type(batch).__name__}"
