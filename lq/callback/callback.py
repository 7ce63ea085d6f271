"""The callback: when in a training run quantization happens."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lq.calibration.calibrate import AUTO, calibrate_and_compare
from lq.calibration.comparison import CalibratorComparison
from lq.calibration.error import CalibrationError
from lq.calibrators import get_calibrator
from lq.callback.batches import calibration_batches, first_samples, repeat_samples, train_batches
from lq.callback.description import class_names, normalization
from lq.callback.evaluation import evaluate
from lq.callback.result import QuantizationResult, Side
from lq.callback.unit import find_unit, replace_unit, run_unit, unit_arguments
from lq.convert import convert
from lq.export import FORMATS, ExportResult, Format, check_dependencies, export
from lq.files import ensure_writable_dir
from lq.graph.ops import WEIGHTED_MODULES
from lq.int8 import Int8Module
from lq.modes import evaluating
from lq.prepare import Mode, NothingToQuantizeError, freeze, is_prepared, prepare, quantizers_off, unprepare
from lq.runtime.cpu import has_onednn_int8, has_vnni
from lq.runtime.timing import measure
from lq.targets import get_target

#: Samples in the batch that throughput is measured with.
_BATCH_SIZE = 32

#: Formats that are written on request, with the endings of their files.
_OTHER_FORMATS: dict[Format, str] = {"onnx": ".onnx", "aoti": ".aoti.pt2"}

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class QuantizationCallback(Callback):
    """Takes the model that is being trained to INT8 at the end of ``fit``.

    With ``mode="ptq"`` training is untouched; when it is done the model is calibrated on the train dataloader and
    converted. With ``mode="qat"`` fake-quantizers are on the model while it trains, and it is converted at the end.
    Afterwards ``trainer.validate``, ``test`` and ``predict`` use the INT8 model, and every logger of the Trainer has
    the float and the INT8 metrics of the user's own validation step, size, latency and throughput.

    Args:
        mode: ``"ptq"`` or ``"qat"``.
        target: the engine family, one of ``lq.TARGETS``.
        module: path of the submodule to quantize; found automatically where it is not given.
        calibration_batches: how many batches PTQ calibrates on, of all processes together; None for no limit.
        calibration_samples: no further batch once so many samples were seen, of all processes together; None for no
            limit.
        calibration_dataloader: what PTQ calibrates on, with batches as ``training_step`` takes them. By default the
            train dataloader, shuffled also where training was not: validation then measures generalisation.
        calibrator: how ranges follow from the statistics, see :func:`lq.calibrate`. By default ``"auto"`` for PTQ: the
            one whose INT8 outputs are nearest to float on held-out calibration batches. QAT takes ``"moving_average"``
            (its default) or ``"minmax"``.
        observer_freeze: share of QAT's steps after which the activations' ranges stay fixed, or None for never.
        batch_norm_freeze: share of QAT's steps after which batch norm statistics stay fixed, or None for never.
        convert: whether to convert at the end; without it QAT leaves the prepared model, PTQ does nothing.
        evaluate: whether to run the validation data through the float and the INT8 model, and to time both.
        export: formats to write beside ``int8.pt2``, which is always written: ``"onnx"`` (``int8.onnx``, for ONNX
            Runtime, OpenVINO and TensorRT) and ``"aoti"`` (``int8.aoti.pt2``, compiled for this machine's CPU); see
            :func:`lq.export`. Class names and mean and standard deviation of the images go into the files where the
            datamodule has attributes ``classes``, ``mean`` and ``std``.
        output_dir: folder for ``int8.pt2`` and ``int8.json``; by default ``int8`` below the Trainer's log directory.

    Attributes:
        result: a :class:`~lq.callback.result.QuantizationResult` once ``fit`` has ended, else None.

    Raises:
        ValueError: where an argument is none of its choices.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lq import QuantizationCallback
        >>> trainer = Trainer(callbacks=[QuantizationCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        mode: Mode = "ptq",
        target: str = "x86",
        module: str | None = None,
        calibration_batches: int | None = 32,
        calibration_samples: int | None = None,
        calibration_dataloader: Iterable[Any] | None = None,
        calibrator: str | None = None,
        observer_freeze: float | None = 0.8,
        batch_norm_freeze: float | None = 0.8,
        convert: bool = True,
        evaluate: bool = True,
        export: Sequence[Format] = ("pt2",),
        output_dir: str | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} is unknown; choose 'ptq' or 'qat'")
        for name, limit in (("calibration_batches", calibration_batches), ("calibration_samples", calibration_samples)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be at least 1, or None for no limit")
        calibrator = calibrator or (AUTO if mode == "ptq" else "moving_average")
        if mode == "qat" and calibrator not in ("moving_average", "minmax"):
            raise ValueError(
                f"calibrator={calibrator!r} is not for mode='qat', whose ranges follow the training step by step; "
                f"choose 'moving_average' or 'minmax'"
            )
        if calibrator != AUTO:
            get_calibrator(calibrator)
        for name, share in (("observer_freeze", observer_freeze), ("batch_norm_freeze", batch_norm_freeze)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}={share} must be a share of the training steps in [0, 1], or None for never")
        if isinstance(export, str) or not set(export) <= set(FORMATS):
            raise ValueError(f"export={export!r} must be a list, with elements of {', '.join(map(repr, FORMATS))}")
        self.mode: Mode = mode
        self.target = get_target(target)
        self.module = module
        self.calibration_batches = calibration_batches
        self.calibration_samples = calibration_samples
        self.calibration_dataloader = calibration_dataloader
        self.calibrator = calibrator
        self.observer_freeze = observer_freeze
        self.batch_norm_freeze = batch_norm_freeze
        self.convert = convert
        self.evaluate = evaluate
        self.export: tuple[Format, ...] = tuple(export)
        self.output_dir = output_dir
        self.result: QuantizationResult | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.result = None
        _refuse_converted(pl_module)
        if self.convert:
            ensure_writable_dir(self._output_dir(trainer), "output_dir")
            for format in self.export:
                check_dependencies(format)
        if not _has_layers(pl_module):
            return  # layers built in LightningModule.setup or configure_model come later: see on_fit_start
        self._check_unit(pl_module)
        if self.mode == "qat":
            self._prepare_for_training(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unit = self._check_unit(pl_module)
        if self.mode == "qat" and not is_prepared(unit):
            self._prepare_for_training(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mode != "qat":
            return
        unit = self._unit(pl_module)
        if _is_past(trainer, self.observer_freeze):
            freeze(unit)
        if _is_past(trainer, self.batch_norm_freeze):
            for submodule in unit.modules():
                if isinstance(submodule, _NORMS):
                    submodule.eval()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.convert:
            self._quantize(trainer, pl_module)

    # Private helpers

    def _output_dir(self, trainer: Trainer) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        return Path(trainer.log_dir or trainer.default_root_dir) / "int8"

    def _unit_path(self, pl_module: LightningModule) -> str:
        return find_unit(pl_module, self.module)

    def _unit(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self._unit_path(pl_module))

    def _check_unit(self, pl_module: LightningModule) -> nn.Module:
        unit = self._unit(pl_module)
        if not any(isinstance(submodule, WEIGHTED_MODULES) for submodule in unit.modules()):
            raise NothingToQuantizeError(
                f"nothing to quantize in {type(unit).__name__}: it has no convolution and no linear layer"
            )
        return unit

    def _prepare_for_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unit = self._unit(pl_module)
        if is_prepared(unit):
            return
        with isolate_rng():  # the batch that is looked at must not change the order of those that are trained on
            batch = next(train_batches(trainer, pl_module), None)
            if batch is None:
                raise CalibrationError("the train dataloader gave no batch to prepare the model with")
            self._prepare(pl_module, unit, batch)
        rank_zero_info(f"lq: {type(unit).__name__} trains with fake-quantizers for target {self.target}")

    def _prepare(self, pl_module: LightningModule, unit: nn.Module, batch: Any) -> None:
        with evaluating(pl_module), torch.no_grad():
            args, kwargs = unit_arguments(pl_module, unit, batch)
        args, kwargs = first_samples((args, kwargs))
        # All but these two need histograms, which these do without at a lower cost.
        observer = self.calibrator if self.calibrator == "minmax" or self.mode == "qat" else "histogram"
        prepare(unit, args, example_kwargs=kwargs, target=self.target, mode=self.mode, observer=observer)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every process calibrates and converts, so that all go on with the same INT8 model; the first one reports."""
        path = self._unit_path(pl_module)
        unit = self._unit(pl_module)
        reports = trainer.is_global_zero
        evaluates = self.evaluate and reports
        comparison = None
        with isolate_rng():
            if self.mode == "ptq":
                float_metrics = evaluate(trainer, pl_module) if evaluates else {}
                comparison = self._calibrate(trainer, pl_module, unit)
            else:
                with quantizers_off(unit):
                    float_metrics = evaluate(trainer, pl_module) if evaluates else {}
        artifact = self._output_dir(trainer) / "int8.pt2"
        exports: list[ExportResult] = []
        failure: Exception | None = None
        try:
            unit.cpu()
            int8 = convert(unit)
            if reports:
                write = partial(export, labels=class_names(trainer), preprocessing=normalization(trainer))
                exports.append(write(int8, artifact))
                try:
                    for format, ending in _OTHER_FORMATS.items():
                        if format in self.export:
                            network = int8 if format == "aoti" else unit
                            exports.append(write(network, artifact.with_suffix(ending), format=format))
                except Exception as error:  # the INT8 model is there: what is left to do with it is done first
                    failure = error
        finally:
            if self.mode == "ptq":
                unprepare(unit)
        if has_onednn_int8() and not has_vnni() and self.target.weight.quant_max > 64:
            rank_zero_warn(
                f"lq: this CPU has no VNNI instructions, so its INT8 kernels get the 8-bit weights of target "
                f"{self.target} rounded to 7 bits, where their sums cannot overflow; the saved model keeps 8 bits. To "
                f"deploy on such CPUs, train or calibrate for them: QuantizationCallback(target='x86_avx2')"
            )
        if self.mode == "qat":
            unprepare(unit)
        if reports:
            float_side, int8_side = self._measure(unit, int8, artifact)
        replace_unit(pl_module, path, int8)
        if not reports:
            return
        int8_metrics = evaluate(trainer, pl_module) if evaluates else {}
        assert int8.report is not None
        self.result = QuantizationResult(
            mode=self.mode,
            target=self.target.name,
            calibrator=comparison.best() if comparison else self.calibrator,
            calibrator_scores=comparison.scores if comparison else {},
            float_side=replace(float_side, metrics=float_metrics),
            int8_side=replace(int8_side, metrics=int8_metrics),
            report=int8.report,
            batch_size=_BATCH_SIZE,
            artifact=str(artifact),
            exports=tuple(str(result.path) for result in exports),
        )
        (artifact.with_suffix(".json")).write_text(self.result.to_json())
        for logger in trainer.loggers:
            logger.log_metrics(self.result.scalars(), step=trainer.global_step)
            logger.save()
        for result in exports:
            rank_zero_info(f"lq: INT8 model written to {result}")
        if failure is not None:
            raise failure

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule, unit: nn.Module) -> CalibratorComparison | None:
        """Observe batches on the device that trained; the float model is as before if that fails."""
        bar = trainer.progress_bar_callback
        home = pl_module.device
        pl_module.to(trainer.strategy.root_device)
        try:
            batches = calibration_batches(trainer, pl_module, self.calibration_dataloader)
            first = next(batches, None)
            if first is None:
                raise CalibrationError("the calibration dataloader (by default the train dataloader) gave no batch")
            self._prepare(pl_module, unit, first)
            with evaluating(pl_module):
                comparison = calibrate_and_compare(
                    unit,
                    itertools.chain([first], batches),
                    calibrator=self.calibrator,
                    num_batches=_share(self.calibration_batches, trainer.world_size),
                    num_samples=_share(self.calibration_samples, trainer.world_size),
                    forward=lambda batch: run_unit(pl_module, unit, batch),
                    progress=trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", True),
                )
        except BaseException:
            if is_prepared(unit):
                unprepare(unit)
            raise
        finally:
            pl_module.to(home)
        if comparison is not None:
            scores = ", ".join(f"{name} {next(iter(v.values())):.1f}" for name, v in comparison.scores.items())
            rank_zero_info(f"lq: calibrator {comparison.best()!r} chosen; SQNR of the outputs in dB: {scores}")
        return comparison

    def _measure(self, float_unit: nn.Module, int8: Int8Module, artifact: Path) -> tuple[Side, Side]:
        """Size, latency and throughput of both, CPU against CPU: there INT8 kernels run in process, also after a fit
        on a GPU."""
        float_side = Side(size_bytes=_state_bytes(float_unit))
        int8_side = Side(size_bytes=artifact.stat().st_size)
        if not self.evaluate:
            return float_side, int8_side
        models = {"float": float_unit, "int8": int8}
        inputs = {**int8.settings, **int8.example_inputs}
        with evaluating(float_unit):
            one = measure(models, repeat_samples(inputs, 1), 1)
            many = measure(models, repeat_samples(inputs, _BATCH_SIZE), _BATCH_SIZE)
        return (
            replace(float_side, latency=one["float"], batch=many["float"]),
            replace(int8_side, latency=one["int8"], batch=many["int8"]),
        )


def _share(count: int | None, world_size: int) -> int | None:
    return None if count is None else math.ceil(count / world_size)


def _refuse_converted(pl_module: nn.Module) -> None:
    if any(isinstance(submodule, Int8Module) for submodule in pl_module.modules()):
        raise ValueError(
            f"{type(pl_module).__name__} was converted to INT8 by an earlier fit, and an INT8 model cannot be trained; "
            f"build the float model anew (from its checkpoint) and fit that"
        )


def _has_layers(pl_module: nn.Module) -> bool:
    return any(isinstance(submodule, WEIGHTED_MODULES) for submodule in pl_module.modules())


def _is_past(trainer: Trainer, share: float | None) -> bool:
    total = trainer.estimated_stepping_batches
    return share is not None and trainer.global_step >= share * total


def _state_bytes(module: nn.Module) -> int:
    """Size of the module's weights on disk."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()
