"""What cannot work is refused before training begins, with what to do instead."""

from __future__ import annotations

from typing import Any

#: "True" precisions cast the module; ranges stay in float32, and the module is cast back when training has ended.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


def check_trainer(trainer: Any) -> None:
    """Refuse strategies and precisions that quantization does not work with.

    Raises:
        ValueError: with what to use instead.
    """
    strategy = trainer.strategy
    names = class_names(strategy)
    supported = "SingleDeviceStrategy" in names or ("DDPStrategy" in names and "DeepSpeedStrategy" not in names)
    if not supported or "XLAStrategy" in names or "SingleDeviceXLAStrategy" in names:
        raise ValueError(
            f"QuantizationCallback does not work with {type(strategy).__name__}, which keeps no whole model in each "
            f"process (or none that INT8 kernels run on); use Trainer(strategy='ddp') or a single device"
        )
    if "_MultiProcessingLauncher" in class_names(strategy.launcher):
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


def check_alone(trainer: Any) -> None:
    """Refuse several callbacks in one Trainer: each would convert what another has converted.

    Raises:
        ValueError: with how to come to several targets.
    """
    callbacks = [callback for callback in trainer.callbacks if "QuantizationCallback" in class_names(callback)]
    if len(callbacks) > 1:
        others = ", ".join(dict.fromkeys(repr(callback.target.name) for callback in callbacks[1:]))
        raise ValueError(
            f"callbacks={[type(callback).__name__ for callback in callbacks]}: a Trainer takes one "
            f"QuantizationCallback. Keep the first one, and make the others of its checkpoint when training has ended: "
            f"lq.quantize_checkpoint(path, MyModule, data, target=...) with target {others}"
        )


def class_names(value: Any) -> set[str]:
    """Names of the class of ``value`` and of its bases."""
    # By name, as `lightning` and `pytorch_lightning` have classes of their own.
    return {cls.__name__ for cls in type(value).__mro__}


def lightning_package(pl_module: Any) -> str:
    """``"lightning.pytorch"`` or ``"pytorch_lightning"``: each has a Trainer that takes no module of the other."""
    base = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
    return base.__module__.partition(".core")[0]
