"""Calibrate: run a prepared model on data, and let each quantizer take its range from what it saw."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.errors import CalibrationError
from lq.interface.metadata import dtype_name
from lq.numerics.calibrators import CALIBRATORS, Calibrator, default_calibrator, get_calibrator
from lq.numerics.quantizer import QuantizerState, WeightQuantizer
from lq.util.distributed import agreed, world_size
from lq.util.modes import evaluating
from lq.util.progress import progress_bar
from lq.workflow.comparison import CalibratorComparison, choose_calibrator
from lq.workflow.prepare import activation_quantizers, prepared_forward, quantizers, set_state, simulate
from lq.workflow.recalibrate import recalibrate

M = TypeVar("M", bound=nn.Module)

#: What the user types to have the calibrator chosen.
AUTO = "auto"

#: With "auto", every n-th batch is held out, up to a limit: these only judge the calibrators.
_HELD_OUT_EVERY, _MOST_HELD_OUT = 4, 4


def calibrate(
    model: M,
    batches: Iterable[Any],
    *,
    calibrator: str | Calibrator | None = None,
    num_batches: int | None = None,
    num_samples: int | None = None,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = False,
) -> M:
    """Take the range of every activation from ``batches``; afterwards the model simulates INT8.

    One pass collects what every calibrator needs (with the default observer of :func:`~lq.prepare`):
    :func:`~lq.recalibrate` tries another without data. Where ``torch.distributed`` has several processes, each gives
    its own batches, all must call this, and all end with the same ranges.

    Args:
        model: a prepared module.
        batches: inputs for the model, for example a DataLoader: each a tensor, a tuple or list (the forward's
            arguments, then labels or others, which are left out) or a dict (its keyword arguments; other keys
            are left out). They are moved to the model's device.
        calibrator: how ranges follow from the statistics: ``"minmax"``, ``"moving_average"``, ``"percentile"`` (or
            ``"percentile:99.9"``), ``"mse"``, ``"entropy"`` or a
            :class:`~lq.numerics.calibrators.Calibrator`; ``"auto"`` holds a few batches out and takes the one whose
            INT8 outputs are nearest to float on them. By default the one that goes with the observer: ``"mse"`` with
            histograms.
        num_batches: how many batches at most; by default all.
        num_samples: stop once so many samples were seen.
        forward: runs the model on one batch and returns its outputs; for batches of any other form.
        progress: whether to show a progress bar.

    Returns:
        ``model`` itself.

    Raises:
        CalibrationError: where there is no data, or a NaN or an infinity in the model's values. After this
            or any other exception on the way, Ctrl-C included, the quantizers are off and the model computes in float.
        ValueError: where ``model`` is not prepared, or an argument is not one of its choices; before anything changes.
    """
    calibrate_and_compare(
        model,
        batches,
        calibrator=calibrator,
        num_batches=num_batches,
        num_samples=num_samples,
        forward=forward,
        progress=progress,
    )
    return model


def calibrate_and_compare(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    calibrator: str | Calibrator | None = None,
    num_batches: int | None = None,
    num_samples: int | None = None,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = False,
) -> CalibratorComparison | None:
    """:func:`calibrate`, returning the comparison that ``calibrator="auto"`` made (None for any other)."""
    for name, limit in (("num_batches", num_batches), ("num_samples", num_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit} must be at least 1")
    run = forward or default_forward(model)
    auto = calibrator == AUTO
    chosen = None if calibrator is None or auto else get_calibrator(calibrator)
    candidates = [get_calibrator(name) for name in CALIBRATORS] if auto else [] if chosen is None else [chosen]
    for quantizer in activation_quantizers(model).values():
        for candidate in candidates:
            candidate.check(quantizer.observer)
    held_out: list[Any] = []
    with observing(model):
        with agreed("calibrating"):
            iterator = iter(batches)
            first = next(iterator, None)
            all_batches = itertools.chain([] if first is None else [first], iterator)
            total = _expected_batches(batches, first, num_batches, num_samples)
            limited = _limit(all_batches, num_batches, num_samples)
            for index, batch in enumerate(progress_bar(limited, total, enabled=progress)):
                if auto and index % _HELD_OUT_EVERY == 1 and len(held_out) < _MOST_HELD_OUT:
                    held_out.append(batch)
                else:
                    run(batch)
        if world_size() > 1:
            for quantizer in activation_quantizers(model).values():
                quantizer.observer.all_reduce()
        _check_ranges(model)
        for quantizer in activation_quantizers(model).values():
            quantizer.calibrator = quantizer.own_calibrator or chosen or default_calibrator(quantizer.observer)
            quantizer.update_qparams()
    simulate(model)
    if not auto:
        return None
    if not held_out and first is not None:
        held_out = [first]  # a single batch cannot be held out
    try:
        with evaluating(model), torch.no_grad():
            comparison = choose_calibrator(model, [functools.partial(run, batch) for batch in held_out])
    except BaseException:
        set_state(model, QuantizerState.OFF)
        raise
    recalibrate(model, comparison.best())
    return comparison


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Inside the context, ``model`` computes in float, in evaluation mode, and its activations are watched afresh.

    If the body raises, the quantizers are off, and their statistics are reset.
    """
    for quantizer in quantizers(model).values():
        quantizer.observer.reset()
        quantizer.state = QuantizerState.OFF if isinstance(quantizer, WeightQuantizer) else QuantizerState.OBSERVE
    try:
        # no_grad and not inference_mode: statistics made of inference tensors would break a later backward.
        with evaluating(model), torch.no_grad():
            yield
    except BaseException:
        set_state(model, QuantizerState.OFF)
        for quantizer in activation_quantizers(model).values():
            quantizer.observer.reset()
        raise


# Private helpers


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor's first axis, or 0 where there is none."""
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else 0


def _limit(batches: Iterable[Any], num_batches: int | None, num_samples: int | None) -> Iterator[Any]:
    """``batches`` up to a number of them, or of samples in them (whole batches)."""
    samples = 0
    for index, batch in enumerate(batches, start=1):
        yield batch
        samples += batch_size(batch)
        if index == num_batches or (num_samples is not None and samples >= num_samples):
            return


def _expected_batches(
    batches: Iterable[Any], first: Any, num_batches: int | None, num_samples: int | None
) -> int | None:
    """How many batches there will be, as far as that is known."""
    limits = [] if num_batches is None else [num_batches]
    if isinstance(batches, Sized):
        with suppress(TypeError):  # a DataLoader has __len__, but with an iterable data set it raises
            limits.append(len(batches))
    if num_samples is not None and batch_size(first):
        limits.append(math.ceil(num_samples / batch_size(first)))
    return min(limits, default=None)


def _check_ranges(model: nn.Module) -> None:
    for name, quantizer in activation_quantizers(model).items():
        low, high = quantizer.observer.range()
        if low > high:  # still +inf and -inf
            raise CalibrationError(
                f"no calibration data reached {name!r}: give lq.calibrate at least one batch that is not empty"
            )
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CalibrationError(
                f"calibration saw a NaN or an infinity at {name!r} (range [{low:g}, {high:g}]), which is the first "
                f"place it shows; check the calibration data, and the float model's outputs on them"
            )


def default_forward(model: nn.Module) -> Callable[[Any], Any]:
    """A function that runs a prepared ``model`` on one batch, in the forms that :func:`calibrate` takes."""
    prepared = prepared_forward(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments = {**prepared.inputs, **prepared.settings}

    def to_device(value: Any) -> Any:
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return value.to(device) if isinstance(value, Tensor) else value

    def run(batch: Any) -> Any:
        batch = tree_map(to_device, batch)
        if isinstance(batch, Mapping):
            named = {name: value for name, value in batch.items() if name in arguments}
            args: tuple[Any, ...] = ()
        else:
            args, named = (tuple(batch[: len(prepared.inputs)]) if isinstance(batch, (tuple, list)) else (batch,)), {}
        try:
            return model(*args, **named)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            given = {**dict(zip(prepared.inputs, args, strict=False)), **named}
            other = next((name for name, value in prepared.inputs.items() if not _alike(given.get(name), value)), "")
            if given.get(other) is None:  # the error says which input is missing
                raise
            raise CalibrationError(
                f"a calibration batch gives {_described(given.get(other))} for the input {other!r}, and the model was "
                f"prepared with {_described(prepared.inputs[other])}: batches are the inputs, tuples that begin with "
                f"them, or dicts by their names; give forward=... for any others"
            ) from error

    return run


def _alike(value: Any, example: Any) -> bool:
    """Whether it is a tensor with as many axes and the same kind of numbers, if the example is one."""
    if not isinstance(example, Tensor):
        return True
    if not isinstance(value, Tensor):
        return False
    return value.dim() == example.dim() and value.is_floating_point() == example.is_floating_point()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {dtype_name(value.dtype)} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
