"""What the recipes of one network share: train it in float, take it to INT8, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lq.config import field
from lq.models import Classifier
from lq.recipes.blocks import (
    DataConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
    callback,
    classifier,
    epochs,
    float_checkpoint,
    image_data,
    load_float_weights,
    make_trainer,
    print_result,
)


@dataclass
class FloatToInt8Config(RunConfig):
    """What such a recipe is told, whatever the network."""

    mode: Literal["ptq", "qat"] = field("ptq", help="quantize after training, or fine-tune with fake-quantizers")
    ckpt: str | None = field(None, help="float checkpoint to quantize instead of training one")
    data: DataConfig = field(DataConfig(), help="the images")
    train: TrainConfig = field(TrainConfig(), help="float training")
    quant: QuantConfig = field(QuantConfig(), help="quantization")


def float_to_int8(config: FloatToInt8Config, network_for: Callable[[int], nn.Module]) -> None:
    """Train (or load) the network, quantize it, and print what that cost and bought.

    Args:
        config: of the recipe.
        network_for: makes the network for so many classes.
    """
    seed_everything(config.seed, verbose=False)
    output = Path(config.output_dir)
    data = image_data(config.data, config.seed)
    network = network_for(data.num_classes)
    model = classifier(config.train, network, data.num_classes)
    quantize = callback(config.quant, config.mode, str(output / "int8"))
    logger = TensorBoardLogger(save_dir=output, name="tensorboard")

    def trainer(max_epochs: int, *callbacks: Callback) -> Trainer:
        return make_trainer(config, max_epochs, list(callbacks), logger)

    notes = {}
    if config.ckpt is not None:
        load_float_weights(model, config.ckpt)
        notes["float checkpoint"] = config.ckpt
        if config.mode == "ptq":
            trainer(0, quantize).fit(model, data)
    else:
        checkpoint = float_checkpoint(config)
        callbacks = (checkpoint, quantize) if config.mode == "ptq" else (checkpoint,)
        trainer(epochs(config.train, data), *callbacks).fit(model, data)
        notes["float checkpoint"] = checkpoint.best_model_path
    if config.mode == "qat":
        float_trainer = trainer(0)
        before = float_trainer.validate(model, data, verbose=False)[0]
        notes["float before QAT"] = ", ".join(f"{name} {value:.4f}" for name, value in before.items())
        tuned = Classifier(network, data.num_classes, lr=config.quant.lr, weight_decay=config.train.weight_decay)
        trainer(config.quant.epochs, quantize).fit(tuned, data)

    assert quantize.result is not None
    notes["INT8 model"] = ", ".join(quantize.result.exports)
    notes["TensorBoard"] = f"tensorboard --logdir {logger.log_dir}"
    print_result(quantize.result, data.name, notes)


def plan_of(config: FloatToInt8Config, name: str) -> str:
    """What :func:`float_to_int8` would do with the network called ``name``."""
    what = f"quantize {config.ckpt}" if config.ckpt else f"train {name} in float, then quantize it"
    tuning = f" ({config.quant.epochs} epochs of fine-tuning)" if config.mode == "qat" else ""
    return f"{what} with {config.mode.upper()}{tuning} for {config.quant.target}; write to {config.output_dir}"
