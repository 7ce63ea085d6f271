"""A checkpoint to INT8, without training: what a run does at its end, by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lq.callback.callback import QuantizationCallback
from lq.callback.checkpoints.hooks import restore, section_of
from lq.callback.end.fit_end import quantize_at_fit_end
from lq.callback.outputs import OUTPUTS
from lq.callback.result import QuantizationResult
from lq.callback.steps.calls import COMPILED
from lq.callback.steps.progress import last_seen
from lq.callback.steps.stages import attach
from lq.callback.support import lightning_package
from lq.deployment.formats import FORMATS, FormatName
from lq.schemes.overrides import LayerSpec
from lq.schemes.targets import AUTO_TARGET, get_target
from lq.util.archives import check_torch_archive
from lq.util.causes import first_line
from lq.util.file_sets import recover
from lq.util.files import ensure_writable_dir
from lq.workflow.saved_preparation import target_of


def quantize_checkpoint(
    checkpoint: str | Path,
    model: type[LightningModule] | LightningModule,
    data: LightningDataModule | Iterable[Any] | None = None,
    *,
    module: str | None = None,
    target: str | None = None,
    calibrator: str | None = None,
    calibration_batches: int | None = 32,
    overrides: dict[str, LayerSpec | dict[str, Any] | None] | None = None,
    evaluate: bool = True,
    analyze: bool | float = True,
    max_drop: float | None = None,
    max_drop_metric: str | None = None,
    max_drop_runtime: str = "auto",
    max_drop_seconds: float | None = None,
    max_drop_float_layers: int | None = None,
    max_drop_epochs: int = 0,
    export: Sequence[FormatName] | None = None,
    output_dir: str | Path | None = None,
    accelerator: str = "auto",
    weights_only: bool | None = None,
) -> QuantizationResult:
    """Convert the model of a Trainer's checkpoint to INT8, and measure what that did.

    The checkpoint of a quantization-aware run has its ranges in it and needs no data; any other is calibrated.

    Args:
        checkpoint: the file.
        model: the class of the LightningModule, where its ``load_from_checkpoint`` needs nothing but the file; or an
            instance, into which the checkpoint's weights are loaded. An instance is left with INT8 in it.
        data: a datamodule, whose train data are calibrated on and whose validation data are validated with; or batches
            as ``training_step`` takes them, to calibrate on.
        module: path of the submodule to quantize; found automatically where it is not given.
        target: the engine family, one of ``lq.TARGETS`` or ``"auto"``; by default the one that the checkpoint was
            trained for, or ``"auto"``: what this machine's CPU wants.
        calibrator: see :func:`lq.calibrate`; ``"auto"`` where it is not given.
        calibration_batches: how many batches to calibrate on; None for no limit.
        overrides: layers that are quantized in another way, see :class:`~lq.QuantizationCallback`; those of a
            quantization-aware run are in its checkpoint.
        evaluate: whether to validate (with a datamodule) and time the float and the INT8 model.
        analyze: whether to look for the layers that do harm, see :class:`~lq.QuantizationCallback`.
        max_drop: by how much the metric may fall, see :class:`~lq.QuantizationCallback`; it takes a datamodule.
        max_drop_metric: name of the metric, which is to be large; it has to be given with ``max_drop``.
        max_drop_runtime: the engine that INT8 is judged on, see :class:`~lq.QuantizationCallback`.
        max_drop_seconds: how long that may take; None for no limit but that of 40 evaluations.
        max_drop_float_layers: how many layers may stay in float for it, see :class:`~lq.QuantizationCallback`.
        max_drop_epochs: for how many epochs the network may be trained for it, see
            :class:`~lq.QuantizationCallback`.
        export: formats to write beside ``int8.pt2``, see :class:`~lq.QuantizationCallback`.
        output_dir: folder for what is written; by default ``int8`` beside the checkpoint.
        accelerator: where to calibrate, see the Trainer.
        weights_only: of :func:`torch.load`; False where the checkpoint holds hyperparameters that are no plain values,
            and is trusted.

    Returns:
        What INT8 cost and bought, and where the files are.

    Raises:
        ValueError: where an argument is not one of its choices, the checkpoint is damaged or holds pickled objects
            that ``weights_only`` does not allow, or it needs data and there are none.
        TypeError: where ``model`` is no LightningModule, or a class of which none can be made without arguments that
            the checkpoint does not hold.
        FileNotFoundError: where there is no such file.
    """
    path = Path(checkpoint)
    check_torch_archive(path)
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only is not False)
    except UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds pickled objects, such as hyperparameters that are no plain values; they may run code "
            f"when they are loaded. Where you trust it: lq.quantize_checkpoint(..., weights_only=False) ("
            f"{first_line(error)})"
        ) from error
    section = section_of(loaded)
    preparation = None if section is None else section["preparation"]
    if preparation is None and data is None:
        raise ValueError(
            f"{str(path)!r} holds a float model, which has to be calibrated: give data, a LightningDataModule or "
            f"batches as training_step takes them"
        )
    if preparation is not None and calibrator is not None:
        raise ValueError(f"calibrator={calibrator!r} is for checkpoints without ranges, and {str(path)!r} has some")
    cls = model if isinstance(model, type) else type(getattr(model, COMPILED, model))
    if not any(base.__name__ == "LightningModule" for base in cls.__mro__):
        raise TypeError(
            f"model={cls.__name__} must be a LightningModule, or its class; a plain module is quantized by lq.prepare, "
            f"lq.calibrate and lq.convert"
        )
    settings = QuantizationCallback(
        mode="ptq" if preparation is None else "qat",  # whose ranges are there
        target=(target or AUTO_TARGET) if preparation is None else get_target(target or target_of(preparation)),
        calibration_batches=calibration_batches,
        calibrator=calibrator,
        overrides=overrides,
        evaluate=evaluate,
        analyze=analyze,
        max_drop=max_drop,
        max_drop_metric=max_drop_metric,
        max_drop_runtime=max_drop_runtime,
        max_drop_seconds=max_drop_seconds,
        max_drop_float_layers=max_drop_float_layers,
        max_drop_epochs=max_drop_epochs,
        export=export,
    ).settings
    output = path.parent / "int8" if output_dir is None else Path(output_dir)
    recover(output, OUTPUTS)
    ensure_writable_dir(output, "output_dir")
    for format in set(settings.export) - set(settings.optional_formats):
        FORMATS[format].check_dependencies(True)
    pl_module: Any = getattr(model, COMPILED, model)  # what torch.compile wraps
    if isinstance(model, type):
        try:
            pl_module = model.load_from_checkpoint(path, map_location="cpu", weights_only=weights_only is not False)
        except TypeError as error:
            raise TypeError(
                f"no {cls.__name__} can be made of what is in {str(path)!r} ({first_line(error)}); give the "
                f"module itself: lq.quantize_checkpoint({str(path)!r}, {cls.__name__}(...), ...)"
            ) from error
    pl_module.configure_model()
    staged = attach(pl_module, module)
    pl_module.on_load_checkpoint(loaded)
    if section is None or preparation is None:
        staged.to_float()
        pl_module.load_state_dict(loaded["state_dict"], strict=pl_module.strict_loading)
    else:
        restore(staged, loaded, section, strict=pl_module.strict_loading)
    trainer = _attached_trainer(pl_module, data, accelerator, output)
    _restore_progress(trainer, loaded)
    result, failure, _ = quantize_at_fit_end(settings, trainer, staged, output, source=f"the weights of {path}")
    if failure is not None:
        raise failure
    assert result is not None
    return result


def _attached_trainer(pl_module: Any, data: Any, accelerator: str, folder: Path) -> Any:
    """A Trainer that knows module and data as it does once ``fit`` has ended."""
    trainer: Any = importlib.import_module(lightning_package(pl_module)).Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.strategy.connect(pl_module)
    if isinstance(data, Iterable):
        trainer._data_connector.attach_data(pl_module, train_dataloaders=data)
    else:
        if data is not None:
            data.prepare_data()
            data.setup("fit")
        trainer._data_connector.attach_data(pl_module, datamodule=data)
    return trainer


def _restore_progress(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """The user's steps see the epoch and the step that the checkpoint was written in."""
    loop = trainer.fit_loop
    if "loops" in checkpoint:
        loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    else:  # of weights only
        epoch = checkpoint.get("epoch", 0)
        loop.epoch_progress.current.ready = loop.epoch_progress.current.processed = epoch
        loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = checkpoint.get(
            "global_step", 0
        )
    # How many there were to be is not in it.
    loop.max_epochs = last_seen(trainer)[0] + 1
