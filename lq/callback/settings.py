"""What the callback's arguments say, checked, for all that only reads it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lq.callback.end.weights import Weights
from lq.callback.outputs import default_formats
from lq.deployment.formats import FORMATS, FormatName
from lq.numerics.calibrators import get_calibrator
from lq.schemes.overrides import LayerSpec, Overrides
from lq.schemes.targets import AUTO_TARGET, Target, get_target
from lq.tuning.goal import check_count
from lq.tuning.judged import check_runtime
from lq.workflow.calibrate import AUTO
from lq.workflow.prepare import Mode

#: What the analysis may take where nothing is said: so much of the fit, but so many seconds at least.
ANALYSIS_SHARE, ANALYSIS_SECONDS = 0.1, 30.0


@dataclass(frozen=True)
class QuantizationSettings:
    """What the arguments of :class:`~lq.QuantizationCallback` say, and what follows from them.

    Args:
        target: the engine family; with ``auto_target`` a guess, until ``setup`` or a checkpoint has decided.
        auto_target: whether ``target="auto"`` was given.
        calibrator: the one that was given, or the mode's own.
        export: formats to write beside ``int8.pt2``, those included that are written by default.
        optional_formats: those of ``export`` that nobody asked for, and that may fail.

    The others are the callback's arguments of the same names.
    """

    mode: Mode
    target: Target
    auto_target: bool
    module: str | None
    calibration_batches: int | None
    calibration_samples: int | None
    calibration_dataloader: Iterable[Any] | None
    calibrator: str
    overrides: Overrides
    observer_freeze: float | None
    batch_norm_freeze: float | None
    convert: bool
    weights: Weights | None
    evaluate: bool
    analyze: bool | float
    max_drop: float | None
    max_drop_metric: str | None
    max_drop_runtime: str
    max_drop_seconds: float | None
    max_drop_float_layers: int | None
    max_drop_epochs: int
    export: tuple[FormatName, ...]
    optional_formats: tuple[FormatName, ...]
    output_dir: str | None
    rehearse: bool

    @classmethod
    def of(
        cls,
        *,
        mode: Mode,
        target: str | Target,
        module: str | None,
        calibration_batches: int | None,
        calibration_samples: int | None,
        calibration_dataloader: Iterable[Any] | None,
        calibrator: str | None,
        overrides: dict[str, LayerSpec | dict[str, Any] | None] | None,
        observer_freeze: float | None,
        batch_norm_freeze: float | None,
        convert: bool,
        weights: Weights | None,
        evaluate: bool,
        analyze: bool | float,
        max_drop: float | None,
        max_drop_metric: str | None,
        max_drop_runtime: str,
        max_drop_seconds: float | None,
        max_drop_float_layers: int | None,
        max_drop_epochs: int,
        export: Sequence[FormatName] | None,
        output_dir: str | None,
        rehearse: bool,
    ) -> QuantizationSettings:
        """The settings that the callback's arguments stand for.

        Raises:
            ValueError: where an argument is not one of its choices.
        """
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
        if isinstance(export, str) or not set(export or ()) <= set(FORMATS):
            raise ValueError(
                f"export={export!r} must be a list, with elements of {', '.join(map(repr, FORMATS))}, or None for what "
                f"is installed"
            )
        if not isinstance(analyze, bool) and not (isinstance(analyze, int | float) and 0 < analyze < math.inf):
            raise ValueError(
                f"analyze={analyze!r} must be True, False, or how many seconds the analysis may take, a number above 0"
            )
        if max_drop is not None:
            _check_max_drop(max_drop, max_drop_seconds, mode, evaluate)
            check_runtime(max_drop_runtime, "max_drop_runtime")
            if max_drop_float_layers is not None:
                check_count("max_drop_float_layers", max_drop_float_layers, "at least 0, or None for no limit")
            check_count("max_drop_epochs", max_drop_epochs, "at least 0")
        else:
            given = {"max_drop_float_layers": max_drop_float_layers, "max_drop_epochs": max_drop_epochs or None}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name}={value!r} says how max_drop is reached, and there is none: give max_drop")
        if weights not in (None, *get_args(Weights)):
            raise ValueError(f"weights={weights!r} is unknown; choose 'best' or 'last', or None for the default")
        formats = default_formats() if export is None else tuple(export)
        return cls(
            mode=mode,
            target=get_target(target),
            auto_target=target == AUTO_TARGET,
            module=module,
            calibration_batches=calibration_batches,
            calibration_samples=calibration_samples,
            calibration_dataloader=calibration_dataloader,
            calibrator=calibrator,
            overrides=Overrides.of(overrides),
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
            export=formats,
            optional_formats=formats if export is None else (),
            output_dir=output_dir,
            rehearse=rehearse,
        )

    def analysis_seconds(self, begun: float | None) -> float:
        """How long the analysis may take: what ``analyze=`` says, or a tenth of the fit, 30 s at least.

        Args:
            begun: when the fit began, by :func:`time.monotonic`; None where there was none.
        """
        if not isinstance(self.analyze, bool):
            return float(self.analyze)
        fit = 0.0 if begun is None else time.monotonic() - begun
        return max(ANALYSIS_SECONDS, ANALYSIS_SHARE * fit)


def _check_max_drop(max_drop: float, seconds: float | None, mode: Mode, evaluate: bool) -> None:
    if not 0 <= max_drop < math.inf:
        raise ValueError(f"max_drop={max_drop} must be a number of points, at least 0, or None for any drop")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"max_drop_seconds={seconds} must be above 0, or None for no limit")
    if mode != "ptq":
        raise ValueError(f"max_drop={max_drop} is for mode='ptq'; mode={mode!r} has its own way to the accuracy")
    if not evaluate:
        raise ValueError(f"max_drop={max_drop} needs evaluate=True: the drop is that of the validation's metric")


class HasSettings:
    """The settings as attributes that can be read, by the names of the callback's arguments."""

    settings: QuantizationSettings

    @property
    def mode(self) -> Mode:
        return self.settings.mode

    @property
    def target(self) -> Target:
        return self.settings.target

    @property
    def module(self) -> str | None:
        return self.settings.module

    @property
    def calibration_batches(self) -> int | None:
        return self.settings.calibration_batches

    @property
    def calibration_samples(self) -> int | None:
        return self.settings.calibration_samples

    @property
    def calibration_dataloader(self) -> Iterable[Any] | None:
        return self.settings.calibration_dataloader

    @property
    def calibrator(self) -> str:
        return self.settings.calibrator

    @property
    def overrides(self) -> Overrides:
        return self.settings.overrides

    @property
    def observer_freeze(self) -> float | None:
        return self.settings.observer_freeze

    @property
    def batch_norm_freeze(self) -> float | None:
        return self.settings.batch_norm_freeze

    @property
    def convert(self) -> bool:
        return self.settings.convert

    @property
    def weights(self) -> Weights | None:
        return self.settings.weights

    @property
    def evaluate(self) -> bool:
        return self.settings.evaluate

    @property
    def analyze(self) -> bool | float:
        return self.settings.analyze

    @property
    def max_drop(self) -> float | None:
        return self.settings.max_drop

    @property
    def max_drop_metric(self) -> str | None:
        return self.settings.max_drop_metric

    @property
    def max_drop_seconds(self) -> float | None:
        return self.settings.max_drop_seconds

    @property
    def max_drop_float_layers(self) -> int | None:
        return self.settings.max_drop_float_layers

    @property
    def max_drop_epochs(self) -> int:
        return self.settings.max_drop_epochs

    @property
    def export(self) -> tuple[FormatName, ...]:
        return self.settings.export

    @property
    def output_dir(self) -> str | None:
        return self.settings.output_dir

    @property
    def rehearse(self) -> bool:
        return self.settings.rehearse
