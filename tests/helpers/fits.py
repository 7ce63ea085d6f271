"""A fit with the callback, on a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from helpers.classifiers import DictBatches, dict_loader, loader
from helpers.quantized import TARGET
from lq import QuantizationCallback


def fit(model: Any, tmp_path: Path, callback: QuantizationCallback | None, epochs: int = 2, **kwargs: Any) -> Trainer:
    data = kwargs.pop("data") if "data" in kwargs else loader()
    validation = kwargs.pop("validation", None)
    ckpt_path = kwargs.pop("ckpt_path", None)
    callbacks = [c for c in (callback, *kwargs.pop("callbacks", [])) if c is not None]
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | kwargs
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=callbacks,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    val = dict_loader() if isinstance(model, DictBatches) else loader(seed=1)
    trainer.fit(model, data, *(validation if validation is not None else [val]), ckpt_path=ckpt_path)
    return trainer


def quantization(tmp_path: Path, **kwargs: Any) -> QuantizationCallback:
    """A callback that rehearses and analyses nothing, unless it is told to: that is tested elsewhere."""
    settings = {"target": TARGET, "output_dir": str(tmp_path / "int8"), "rehearse": False, "analyze": False}
    return QuantizationCallback(**settings | kwargs)
