"""The callback: when in a training run quantization happens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lq.callback.averages import (
    averages_at_the_end,
    averages_buffers,
    check_averaging,
    refresh_averaged_ranges,
)
from lq.callback.checkpoints.hooks import attach_hooks
from lq.callback.end.accuracy import check_accuracy
from lq.callback.end.fit_end import quantize_at_fit_end
from lq.callback.end.rescue import tell_how_to_finish
from lq.callback.end.weights import Weights, known_checkpoints
from lq.callback.logging import RangeLog, drop_hp_metric, log_result
from lq.callback.others import release_other_callbacks
from lq.callback.outputs import OUTPUTS
from lq.callback.preparation import prepare_for_batch, tell_of_a_change
from lq.callback.rehearsal import rehearse
from lq.callback.result import QuantizationResult
from lq.callback.settings import HasSettings, QuantizationSettings
from lq.callback.steps.calls import has_weighted_layers
from lq.callback.steps.first_batches import first_train_batches
from lq.callback.steps.looking import begun_copy, check_optimized, check_trained, find_as_called
from lq.callback.steps.own_setup import after_own_setup, waits_for_setup
from lq.callback.steps.stages import StagedUnit, attach, staged_unit
from lq.callback.support import check_alone, check_trainer
from lq.callback.training import all_reduce_ranges, training_share
from lq.callback.validated import ValidatedWeights
from lq.deployment.formats import FORMATS, FormatName
from lq.errors import CalibrationError, NothingToQuantizeError
from lq.numerics.quantizer import QuantizerState
from lq.schemes.overrides import LayerSpec
from lq.schemes.targets import AUTO_TARGET, Target, native_target
from lq.util.file_sets import recover
from lq.util.files import ensure_writable_dir
from lq.workflow.prepare import Mode, activation_quantizers, freeze, is_prepared, refresh_weights, set_state

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: How far a fit is.
Phase = Literal["setup", "training", "conversion"]

_TRAINING = QuantizerState.OBSERVE | QuantizerState.FAKE_QUANTIZE


class QuantizationCallback(HasSettings, Callback):
    """Takes the model that is being trained to INT8 at the end of ``fit``.

    With ``mode="ptq"`` training is untouched; when it is done the model is calibrated on the train dataloader and
    converted. With ``mode="qat"`` fake-quantizers are on the model while it trains, and it is converted at the end.
    Afterwards ``trainer.validate``, ``test`` and ``predict`` use the INT8 model, and every logger of the Trainer has
    the float and the INT8 metrics of the user's own validation step, size, latency and throughput; TensorBoard has
    charts, histograms, the graph and hyperparameters as well, and ``int8.html`` says it all on one page.

    Checkpoints of a run hold the float model's weights under ``state_dict``, whatever stage the model is in, and load
    into the plain LightningModule; ranges lie beside them. ``fit(ckpt_path=...)`` resumes either kind of run exactly.
    With a ``ckpt_path``, ``validate``, ``test`` and ``predict`` bring the model to what the checkpoint holds; an INT8
    model stays one wherever the checkpoint says how. If anything fails at the end of ``fit``, the module and the
    checkpoints are as training left them, and the message says how to convert them by hand.

    Args:
        mode: ``"ptq"`` or ``"qat"``.
        target: the engine family: one of ``lq.TARGETS``, by name, or a :class:`~lq.Target`; ``"auto"`` for what this
            machine's CPU wants (``"x86"`` with VNNI, ``"x86_avx2"`` without, ``"xnnpack"`` on ARM), or, where a QAT run
            is resumed, for what its checkpoint was trained for.
        module: path of the submodule to quantize; found automatically where it is not given.
        calibration_batches: how many batches PTQ calibrates on, of all processes together; None for no limit.
        calibration_samples: no further batch once so many samples were seen, of all processes together; None for no
            limit.
        calibration_dataloader: what PTQ calibrates on, with batches as ``training_step`` takes them. By default the
            train dataloader, shuffled also where training was not: validation then measures generalisation.
        calibrator: how ranges follow from the statistics, see :func:`lq.calibrate`. By default ``"auto"`` for PTQ: the
            one whose INT8 outputs are nearest to float on held-out calibration batches. QAT takes ``"moving_average"``
            (its default) or ``"minmax"``.
        overrides: layers that are quantized in another way, or None for a module that stays in float, by the names of
            modules in the network: ``{"layer4": {"weight_bits": 6}, "fc": None}``; see :func:`lq.prepare`.
        observer_freeze: share of QAT's steps after which the activations' ranges stay fixed, or None for never.
        batch_norm_freeze: share of QAT's steps after which batch norm statistics stay fixed, or None for never.
        convert: whether to convert at the end; without it QAT leaves the prepared model, PTQ does nothing.
        weights: ``"best"`` converts the weights of the best checkpoint, by the metric of the first ModelCheckpoint that
            monitors one; ``"last"`` those that training ended with. By default the best ones where there are such,
            except with StochasticWeightAveraging, whose average is there only at the end; the log says which. Where a
            callback or a hook puts an average (EMA) in the model's place for validation, it is the average that
            validation used last, or when the best checkpoint was written.
        evaluate: whether to run the validation data through the float model and through INT8 on every engine that is
            installed, and to time all of them, and each layer in float and in INT8.
        analyze: whether to look for the layers that do harm, on a few samples of the validation data (without such, of
            the calibration data): SQNR and sensitivity of each, for the charts and the advice in ``int8.html`` and in
            the loggers. It may take a tenth of the fit or 30 s, whichever is longer, or as many seconds as are given
            here: the layers with the noisiest weights and inputs come first, and the page says what was left out. What
            fails there is a warning.
        max_drop: by how much the metric may fall, in points: hundredths of one that the float model has between 0 and 1
            and that should be large (0.5 allows an accuracy to fall from 0.876 to 0.871), else the metric's own units.
            While INT8 loses more on the validation data, other calibrators are tried, bias correction, equalisation,
            and then the fewest layers in float that are enough, see :func:`lq.quantize`; ``int8.json`` has each step.
            Weights and biases are then left as the network that was taken has them. Of several processes the first one
            does all of it. What was evaluated before a run was killed is not evaluated again when its end is reached
            once more with the same weights. PTQ only.
        max_drop_metric: name of the metric; by default the one that the first ModelCheckpoint or EarlyStopping
            monitors. Where such a callback has ``mode="min"`` for it, it may rise by so much.
        max_drop_runtime: the engine that INT8 is judged on, as :func:`lq.load` calls it; by default the one that takes
            the least time for one sample, of those that are installed and run one of the files that are written
            (packages of AOTInductor and ExecuTorch, which take long to compile, left out).
        max_drop_seconds: how long that may take; None for no limit but that of 40 evaluations.
        max_drop_float_layers: how many layers may stay in float for it; None for as many as it takes, 0 for a network
            that is INT8 throughout.
        max_drop_epochs: for how many epochs the network may be trained with fake-quantizers where all of this is not
            enough: by the module's own ``training_step`` and optimizers, at a hundredth of the learning rate that they
            begin with, without the Trainer's callbacks and loggers, on one device. By default nothing is trained.
        export: formats to write beside ``int8.pt2``, which is always written: ``"onnx"`` (``int8.onnx``, for
            OpenVINO, TensorRT and ONNX Runtime), ``"onnxruntime"`` (``int8.onnxruntime.onnx``, for ONNX Runtime alone),
            ``"aoti"`` (``int8.aoti.pt2``, compiled for this machine's CPU) and ``"executorch"`` (``int8.pte``, for
            phones and ARM boards); see :func:`lq.export`. By default, where the extra ``onnx`` is installed,
            ``"onnx"``, and ``"onnxruntime"`` where that file is another one and the mode is ``"ptq"``; a network of
            which no such file can be made is then a warning, and an error where the format was asked for. Class names
            and mean and standard deviation of the images go into the files where the datamodule has attributes
            ``classes``, ``mean`` and ``std``.
        output_dir: folder for ``int8.pt2``, ``int8.json`` and ``int8.html``; by default ``int8`` in the Trainer's log
            directory. What an earlier run left there under the names of these and of the exports is replaced, all of it
            at once when everything has gone well; other files stay. ``Trainer(fast_dev_run=True)`` writes nothing.
        rehearse: whether to go the whole way to INT8 before training begins, on a copy and with two batches, so that
            what would fail when training has ended fails at once. Takes seconds; left out of it are the search for the
            best calibrator, all that is measured or analysed, and ``"aoti"`` and ``"executorch"``, which take a
            compiler a minute.

    Attributes:
        settings: what the arguments say; each can be read by its own name as well.
        result: a :class:`~lq.callback.result.QuantizationResult` once ``fit`` has ended, else None.
        known_before: the best checkpoint that there was before training, as a run that is resumed knows it.

    Raises:
        ValueError: where an argument is not one of its choices.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lq import QuantizationCallback
        >>> trainer = Trainer(callbacks=[QuantizationCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        mode: Mode = "ptq",
        target: str | Target = AUTO_TARGET,
        module: str | None = None,
        calibration_batches: int | None = 32,
        calibration_samples: int | None = None,
        calibration_dataloader: Iterable[Any] | None = None,
        calibrator: str | None = None,
        overrides: dict[str, LayerSpec | dict[str, Any] | None] | None = None,
        observer_freeze: float | None = 0.8,
        batch_norm_freeze: float | None = 0.8,
        convert: bool = True,
        weights: Weights | None = None,
        evaluate: bool = True,
        analyze: bool | float = True,
        max_drop: float | None = None,
        max_drop_metric: str | None = None,
        max_drop_runtime: str = "auto",
        max_drop_seconds: float | None = None,
        max_drop_float_layers: int | None = None,
        max_drop_epochs: int = 0,
        export: Sequence[FormatName] | None = None,
        output_dir: str | None = None,
        rehearse: bool = True,
    ) -> None:
        self.settings = QuantizationSettings.of(
            mode=mode,
            target=target,
            module=module,
            calibration_batches=calibration_batches,
            calibration_samples=calibration_samples,
            calibration_dataloader=calibration_dataloader,
            calibrator=calibrator,
            overrides=overrides,
            observer_freeze=observer_freeze,
            batch_norm_freeze=batch_norm_freeze,
            convert=convert,
            weights=weights,
            evaluate=evaluate,
            analyze=analyze,
            max_drop=max_drop,
            max_drop_metric=max_drop_metric,
            max_drop_runtime=max_drop_runtime,
            max_drop_seconds=max_drop_seconds,
            max_drop_float_layers=max_drop_float_layers,
            max_drop_epochs=max_drop_epochs,
            export=export,
            output_dir=output_dir,
            rehearse=rehearse,
        )
        self.result: QuantizationResult | None = None
        self.known_before: dict[str, Any] = {}
        self._int8_dir: Path | None = None
        self._frozen_norms: set[nn.Module] = set()
        self._range_log = RangeLog()
        self._validated = ValidatedWeights({})
        self._phase: Phase = "setup"
        self._checked_epoch = 0
        self._begun: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        staged = attach(pl_module, self.module)
        attach_hooks(staged)
        if stage != TrainerFn.FITTING:
            return
        check_alone(trainer)
        self.result = None
        self._begun = time.monotonic()
        self._phase = "setup"
        self._range_log.reset()
        staged.fit_mode = self.mode
        staged.takes_any_target = self.settings.auto_target
        check_trainer(trainer)
        if self.convert and self.max_drop is not None:
            check_accuracy(self.settings, trainer)
        self._choose_target(trainer)
        if self.mode == "qat":
            check_averaging(trainer, self)
        if self.convert:
            # Asked for here, where all processes are: the log directory is the first one's, which tells the others.
            self._int8_dir = self._output_dir(trainer)
            if trainer.is_global_zero and self._int8_dir is not None:
                recover(self._int8_dir, OUTPUTS)
                ensure_writable_dir(self._int8_dir, "output_dir")
            for format in set(self.export) - set(self.settings.optional_formats):
                FORMATS[format].check_dependencies(True)
            drop_hp_metric(trainer)
        if self.mode == "qat" and waits_for_setup(trainer, pl_module):
            after_own_setup(pl_module, partial(self._begin_fit_late, trainer, staged))
        else:
            self._begin_fit(trainer, staged)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.known_before = known_checkpoints(trainer)
        self._validated = ValidatedWeights(self.known_before)
        staged = staged_unit(pl_module)
        if not staged.is_built:
            raise _nothing_to_quantize(pl_module)
        if self.mode == "qat" and self.settings.auto_target and is_prepared(staged.unit):
            # Of the checkpoint, where a run is resumed from one.
            self.settings = replace(self.settings, target=staged.prepared_forward.target)
        _check_layers(staged)
        if self.convert:
            if self.mode == "qat":
                _check_training(trainer, staged)
                check_optimized(staged, trainer.optimizers)
            rehearse(self.settings, trainer, staged)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phase = "training"

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        staged = staged_unit(pl_module)
        if staged.stage == "prepared" and trainer.current_epoch not in (0, self._checked_epoch):
            self._checked_epoch = trainer.current_epoch
            tell_of_a_change(staged)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._validated.compare(trainer, pl_module)
        if self.mode != "qat" or averages_at_the_end(trainer):
            return  # the average is another network, whose statistics its last epoch has to learn
        unit = staged_unit(pl_module).unit
        share = training_share(trainer, batch_idx)
        if self.observer_freeze is not None and share >= self.observer_freeze:
            freeze(unit)
        if self.batch_norm_freeze is not None and share >= self.batch_norm_freeze:
            for submodule in unit.modules():
                if isinstance(submodule, _NORMS) and submodule.training:
                    self._frozen_norms.add(submodule.eval())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.mode == "qat":
            unit = staged_unit(pl_module).unit
            if trainer.world_size > 1:
                all_reduce_ranges(unit)
            self._range_log.log(trainer, unit)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated.compare(trainer, pl_module)
        self._thaw()
        if self.mode == "qat":
            refresh_weights(staged_unit(pl_module).unit)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # By now an averaging callback has put the average in the model's place.
        if not batch_idx == dataloader_idx == 0:
            return
        if self.convert:
            self._validated.take(trainer, pl_module)
        if self.mode == "qat" and averages_buffers(trainer):
            staged = staged_unit(pl_module)
            if staged.stage == "prepared":
                refresh_averaged_ranges(staged)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phase = "conversion"
        if self.convert:
            staged = staged_unit(pl_module)
            # Its copies of the weights are not kept with the callback.
            validated, self._validated = self._validated, ValidatedWeights({})
            self.result, failure, findings = quantize_at_fit_end(
                self.settings,
                trainer,
                staged,
                self._int8_dir,
                known_before=self.known_before,
                validated=validated,
                fit_begun=self._begun,
            )
            if staged.holds_int8:
                release_other_callbacks(trainer)
            if self.result is not None:
                log_result(self.settings, trainer, self.result, findings)
                print(self.result)  # as Trainer.validate prints its metrics
            if failure is not None:
                raise failure

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._thaw()
        if trainer.state.fn != TrainerFn.FITTING or self._phase == "setup" or not self.convert:
            return  # nothing was trained yet: the error says all there is to say
        if self.result is None and trainer.is_global_zero and self._int8_dir is not None:
            ended = self._phase == "conversion"
            tell_how_to_finish(self.settings, trainer, pl_module, self._int8_dir, training_ended=ended)

    @property
    def analysis_seconds(self) -> float:
        """How long the analysis may take, of the fit that is under way."""
        return self.settings.analysis_seconds(self._begun)

    # Private helpers

    def _output_dir(self, trainer: Trainer) -> Path | None:
        """Where the files go; None for a trial run, which writes nothing where a real one does."""
        log_dir = trainer.log_dir  # to be asked for by every process
        if getattr(trainer, "fast_dev_run", False):
            return None
        return Path(self.output_dir or Path(log_dir or trainer.default_root_dir) / "int8")

    def _choose_target(self, trainer: Trainer) -> None:
        """Say what ``"auto"`` stands for; where processes run on several machines, the first one's CPU decides."""
        if self.settings.auto_target:
            target, reason = trainer.strategy.broadcast(native_target())
            self.settings = replace(self.settings, target=target)
            rank_zero_info(f"lq: target {target.name!r}: {reason}")

    def _thaw(self) -> None:
        """Let batch norm learn again, or a later fit would begin with it frozen."""
        while self._frozen_norms:
            self._frozen_norms.pop().train()

    def _begin_fit_late(self, trainer: Trainer, staged: StagedUnit) -> None:
        check_averaging(trainer, self, prepared_late=True)
        self._begin_fit(trainer, staged)

    def _begin_fit(self, trainer: Trainer, staged: StagedUnit) -> None:
        """Bring the unit to where training begins: float for PTQ, prepared for QAT."""
        if self.mode == "qat" and not staged.is_built:
            # Before a checkpoint is loaded and other callbacks copy the model; being called twice is in its contract.
            trainer.lightning_module.configure_model()
        if not staged.is_built:
            return  # PTQ can do without until training begins; QAT has waited, and there are none
        was_int8 = staged.stage == "int8"
        if was_int8:
            rank_zero_info("lq: training goes on with the float weights that the INT8 network was made of")
            staged.take_int8_off()
        _check_layers(staged)
        if is_prepared(staged.unit):
            forward = staged.prepared_forward
            here = (forward.mode, forward.target, forward.overrides)
            if self.mode == "qat" and here == ("qat", self.target, staged.overrides(self.overrides)):
                set_state(staged.unit, _TRAINING)
                return
            if not was_int8:
                raise ValueError(
                    f"the {type(staged.unit).__name__} is prepared for mode={forward.mode!r} and target "
                    f"{forward.target.name!r}; call lq.unprepare(model) first, or use a QuantizationCallback with "
                    f"mode='qat' and what it was prepared for"
                )
            staged.to_float()
        if self.mode == "qat":
            self._prepare_for_training(trainer, staged)

    def _prepare_for_training(self, trainer: Trainer, staged: StagedUnit) -> None:
        batch = next(iter(first_train_batches(trainer, staged.pl_module, 1, take=True)), None)
        if batch is None:
            raise CalibrationError("the train dataloader gave no batch to prepare the model with")
        with isolate_rng():
            find_as_called(trainer, staged, batch, self.overrides)
            check_trained(staged)
            prepare_for_batch(
                staged,
                batch,
                target=self.target,
                mode="qat",
                observer=self.calibrator,
                overrides=self.overrides,
                like=begun_copy(staged),
            )
        name = type(staged.unit).__name__
        rank_zero_info(f"lq: {name} trains with fake-quantizers for target {self.target}")


def _check_training(trainer: Trainer, staged: StagedUnit) -> None:
    """Refuse a run that trains nothing, and so leaves ranges unknown that the checkpoint it goes on from has not."""
    limits = {name: getattr(trainer, name, None) for name in ("max_epochs", "max_steps", "limit_train_batches")}
    nothing = next((name for name, limit in limits.items() if limit == 0), None)
    known = all(quantizer.calibrated for quantizer in activation_quantizers(staged.unit).values() if quantizer.rounds)
    if nothing is not None and not known:
        raise ValueError(
            f"mode='qat' takes the ranges from training, and Trainer({nothing}=0) trains nothing: use "
            f"QuantizationCallback(mode='ptq'), which calibrates, or train with fake-quantizers for an epoch"
        )


def _check_layers(staged: StagedUnit) -> None:
    if not has_weighted_layers(staged.unit):
        raise _nothing_to_quantize(staged.unit)


def _nothing_to_quantize(module: nn.Module) -> NothingToQuantizeError:
    return NothingToQuantizeError(
        f"nothing to quantize in {type(module).__name__}: it has no convolution and no linear layer"
    )
