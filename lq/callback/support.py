"""What cannot work is refused before training begins, with what to do instead."""

from __future__ import annotations

from typing import Any

#: "True" precisions cast the module; ranges stay in float32, and the module is cast back when training has ended.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")

#: Callbacks that copy the model in their ``setup``.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def check_trainer(trainer: Any) -> None:
    """Refuse strategies and precisions that quantization does not work with.

    Raises:
        ValueError: with what to use instead.
    """
    strategy = trainer.strategy
    names = _class_names(strategy)
    supported = "SingleDeviceStrategy" in names or ("DDPStrategy" in names and "DeepSpeedStrategy" not in names)
    if not supported or "XLAStrategy" in names or "SingleDeviceXLAStrategy" in names:
        raise ValueError(
            f"QuantizationCallback does not work with {type(strategy).__name__}, which keeps no whole model in each "
            f"process (or none that INT8 kernels run on); use Trainer(strategy='ddp') or a single device"
        )
    if "_MultiProcessingLauncher" in _class_names(strategy.launcher):
        raise ValueError(
            "QuantizationCallback does not work where Trainer.fit starts processes of its own (strategy='ddp_spawn', "
            "'ddp_fork' or 'ddp_notebook'): they end with fit, and the INT8 model with them. Use strategy='ddp' in a "
            "script, torchrun, or devices=1 in a notebook"
        )
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"QuantizationCallback does not work with precision={trainer.precision!r}; choose one of "
            f"{', '.join(map(repr, _PRECISIONS))}"
        )


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
            f"{name} copies the model before its layers exist: build them in __init__ or configure_model rather than "
            f"in LightningModule.setup"
        )
    raise ValueError(
        f"{name} copies the model, and has to find quantizers on it: put QuantizationCallback before it, "
        f"callbacks=[QuantizationCallback(mode='qat'), {name}(...)]"
    )


def averages_at_the_end(trainer: Any) -> bool:
    """Whether the weights that training is for are there only when it has ended (stochastic weight averaging)."""
    return any("StochasticWeightAveraging" in _class_names(callback) for callback in trainer.callbacks)


def averages_buffers(trainer: Any) -> bool:
    """Whether an average of the model, quantizers included, is validated and saved (``WeightAveraging``, EMA)."""
    return any("WeightAveraging" in _class_names(callback) for callback in trainer.callbacks)


def _averages(callback: Any) -> bool:
    return any(name in _class_names(callback) for name in _AVERAGING)


def _class_names(value: Any) -> set[str]:
    # By name, as `lightning` and `pytorch_lightning` have classes of their own.
    return {cls.__name__ for cls in type(value).__mro__}
