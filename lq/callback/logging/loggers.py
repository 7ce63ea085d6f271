"""What a logger can show."""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard import SummaryWriter


def tensorboard_writer(logger: Any) -> SummaryWriter | None:
    """The writer of a TensorBoardLogger; None of any other logger, and in processes whose logger writes nothing."""
    if not is_tensorboard(logger):
        return None
    writer = logger.experiment
    return writer if isinstance(writer, SummaryWriter) else None


def is_tensorboard(logger: Any) -> bool:
    """Whether it is a TensorBoardLogger."""
    # By name: `lightning` and `pytorch_lightning` have one each, and asking others for `experiment` may start a run.
    return any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)


def takes_images(logger: Any) -> bool:
    """Whether a logger has ``log_image(key=..., images=[...])``, as WandbLogger has."""
    return callable(getattr(logger, "log_image", None))
