"""Calibrate: show a prepared model data, and let each quantizer take its range from what it saw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from lq.modes import evaluating
from lq.prepare import example_arguments, quantizers, set_state
from lq.quantizer import QuantizerState, WeightQuantizer

M = TypeVar("M", bound=nn.Module)


class CalibrationError(ValueError):
    """The calibration data give no usable ranges."""


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, every forward of the prepared ``model`` feeds its observers; on the way out the ranges are computed.

    The model is in evaluation mode and computes in float meanwhile. If the body raises, the ranges stay as they were
    and the quantizers are off.

    Raises:
        CalibrationError: where a quantizer saw nothing, or a NaN or an infinity.
    """
    for quantizer in quantizers(model).values():
        quantizer.observer.reset()
        quantizer.state = QuantizerState.OFF if isinstance(quantizer, WeightQuantizer) else QuantizerState.OBSERVE
    try:
        # no_grad and not inference_mode: statistics made of inference tensors would break a later backward.
        with evaluating(model), torch.no_grad():
            yield
        _check_ranges(model)
    except BaseException:
        set_state(model, QuantizerState.OFF)
        raise
    for quantizer in quantizers(model).values():
        if isinstance(quantizer, WeightQuantizer):
            quantizer.state = QuantizerState.OBSERVE | QuantizerState.FAKE_QUANTIZE
        else:
            quantizer.update_qparams()
            quantizer.state = QuantizerState.FAKE_QUANTIZE


def _check_ranges(model: nn.Module) -> None:
    for name, quantizer in quantizers(model).items():
        if isinstance(quantizer, WeightQuantizer):
            continue
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


def calibrate(model: M, batches: Iterable[Any]) -> M:
    """Take the range of every activation from ``batches``; afterwards the model simulates INT8.

    Args:
        model: a prepared module.
        batches: inputs for the model, each a tensor, a tuple (the arguments of the forward) or a dict (its keyword
            arguments). Labels are not wanted: ``(x for x, y in loader)``.

    Returns:
        ``model`` itself.

    Raises:
        CalibrationError: where there is no data, or a NaN or an infinity in what it makes of them. The quantizers are
            then off and the model computes in float, as before.
        ValueError: where ``model`` is not prepared.
    """
    with calibrating(model):
        for batch in batches:
            args, kwargs = example_arguments(batch)
            model(*args, **kwargs)
    return model
