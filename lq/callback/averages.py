"""Averages of the model's weights, which other callbacks make: EMA, stochastic weight averaging."""

from __future__ import annotations

from typing import Any

from lq.callback.steps.stages import StagedUnit
from lq.callback.support import class_names
from lq.workflow.prepare import activation_quantizers

#: What a checkpoint has in it where its ``state_dict`` is that of an average (``WeightAveraging``).
AVERAGED = "averaging_state"

#: Callbacks that copy the model in their ``setup``.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def check_averaging(trainer: Any, callback: Any, *, prepared_late: bool = False) -> None:
    """Refuse an order of callbacks in which averages would be taken of a model without quantizers.

    Args:
        trainer: the Trainer.
        callback: the QuantizationCallback.
        prepared_late: whether the model is prepared only now, after every callback's ``setup``.

    Raises:
        ValueError: with the order that works.
    """
    before = trainer.callbacks if prepared_late else trainer.callbacks[: trainer.callbacks.index(callback)]
    name = next((type(other).__name__ for other in before if _averages(other)), None)
    if name is None:
        return
    if prepared_late:
        raise ValueError(
            f"{name} copies the model before LightningModule.setup has made its layers or its data: make layers in "
            f"__init__ or configure_model, and give the data to trainer.fit, rather than in setup"
        )
    raise ValueError(
        f"{name} copies the model, and has to find quantizers on it: put QuantizationCallback before it, "
        f"callbacks=[QuantizationCallback(mode='qat'), {name}(...)]"
    )


def copies_the_model(trainer: Any) -> bool:
    """Whether a callback copies the model in its ``setup``."""
    return any(_averages(callback) for callback in trainer.callbacks)


def averages_at_the_end(trainer: Any) -> bool:
    """Whether the weights that training is for are there only when it has ended (stochastic weight averaging)."""
    return any("StochasticWeightAveraging" in class_names(callback) for callback in trainer.callbacks)


def averages_buffers(trainer: Any) -> bool:
    """Whether an average of the model, quantizers included, is validated and saved (``WeightAveraging``, EMA)."""
    return any(averages_weights(callback) for callback in trainer.callbacks)


def averages_weights(callback: Any) -> bool:
    """Whether a callback is Lightning's ``WeightAveraging``."""
    return "WeightAveraging" in class_names(callback)


def _averages(callback: Any) -> bool:
    return any(name in class_names(callback) for name in _AVERAGING)


def refresh_averaged_ranges(staged: StagedUnit) -> None:
    """Compute scales and zero points anew from averaged minima and maxima.

    An average of models averages their buffers, and cuts integers off: a zero point that is never above 5 becomes 4.
    """
    for quantizer in activation_quantizers(staged.unit).values():
        low, high = quantizer.observer.range()
        if quantizer.rounds and quantizer.calibrated and bool(low <= high):
            quantizer.update_qparams()
