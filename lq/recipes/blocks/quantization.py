"""Taking a model to INT8."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lq.callback import QuantizationCallback
from lq.deployment.formats import FORMATS
from lq.errors import ConfigError
from lq.models import Classifier
from lq.models.schedules import ScheduleName
from lq.recipes.blocks.config import field
from lq.recipes.blocks.training import TrainConfig
from lq.schemes.targets import TARGET_CHOICES

#: What a recipe's key for files says.
EXPORT_HELP = (
    f"formats to write beside int8.pt2: {', '.join(name for name in FORMATS if name != 'pt2')}; by default onnx, where "
    "it is installed"
)


@dataclass
class QuantConfig:
    """How the model is taken to INT8."""

    target: str = field("auto", help="engine family the quantizers are placed for", choices=TARGET_CHOICES)
    calibration_batches: int = field(32, help="training batches that PTQ takes its ranges from")
    calibrator: str | None = field(
        None, help="minmax, moving_average, percentile, percentile:99.9, mse, entropy; by default the best one for PTQ"
    )
    export: list[str] | None = field(None, help=EXPORT_HELP)
    overrides: dict[str, Any] = field(
        {}, help="layers quantized in another way, null for those left in float: {layer4: {weight_bits: 6}, fc: null}"
    )
    max_drop: float | None = field(
        None,
        help="PTQ: points of validation accuracy that INT8 may lose; other methods are tried until it loses no more",
    )
    max_drop_runtime: str = field(
        "auto", help="PTQ: the engine that this is judged on, as lq.load calls it; auto for the fastest"
    )
    epochs: int = field(1, help="QAT: passes over the data with fake-quantizers")
    lr: float = field(0.002, help="QAT: peak learning rate")
    schedule: ScheduleName = field("onecycle", help="QAT: the learning rate's curve")
    warmup: float | None = field(None, help="QAT: share of the steps in which it rises")
    observer_freeze: float | None = field(0.8, help="QAT: share of the steps after which ranges stay fixed")
    batch_norm_freeze: float | None = field(0.8, help="QAT: share after which batch norm's statistics stay fixed")
    distillation: float = field(0.0, help="QAT: weight of the float model's outputs in the loss, in [0, 1]")
    analyze: bool = field(True, help="look for the layers that do harm, for the charts and the advice")
    analyze_seconds: float | None = field(
        None, help="how long that may take; by default a tenth of the training or 30 s, whichever is longer"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"quant.distillation={self.distillation} must be in [0, 1]; 0 is without")


def callback(config: QuantConfig, mode: Literal["ptq", "qat"], output_dir: str) -> QuantizationCallback:
    """The callback that a recipe's quantization group stands for.

    Raises:
        ConfigError: where the callback refuses a value.
    """
    try:
        return QuantizationCallback(
            mode=mode,
            target=config.target,
            calibration_batches=config.calibration_batches,
            calibrator=config.calibrator,
            overrides=config.overrides,
            observer_freeze=config.observer_freeze,
            batch_norm_freeze=config.batch_norm_freeze,
            analyze=config.analyze and (config.analyze_seconds or True),
            max_drop=config.max_drop,
            max_drop_metric="val_acc",
            max_drop_runtime=config.max_drop_runtime,
            export=config.export,  # type: ignore[arg-type]
            output_dir=output_dir,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"quant: {error}") from error


def fine_tuner(config: QuantConfig, train: TrainConfig, network: nn.Module, num_classes: int) -> Classifier:
    """The LightningModule that fine-tunes ``network`` while it is quantized."""
    return Classifier(
        network,
        num_classes,
        lr=config.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        schedule=config.schedule,
        warmup=config.warmup,
        teacher=copy.deepcopy(network) if config.distillation else None,
        distillation=config.distillation,
    )
