"""What the recipes of one network share: train it in float, take it to INT8, compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lq
from lq.recipes.blocks.config import field
from lq.recipes.blocks.data import DataConfig, ImageData, image_data
from lq.recipes.blocks.quantization import QuantConfig, callback, fine_tuner
from lq.recipes.blocks.results import print_result, save_results
from lq.recipes.blocks.trainer import RunConfig, make_trainer
from lq.recipes.blocks.training import TrainConfig, classifier, epochs, float_checkpoint, load_float_weights
from lq.schemes.targets import get_target


@dataclass
class FloatToInt8Config(RunConfig):
    """The config of such a recipe, whatever the network."""

    mode: Literal["ptq", "qat"] = field("ptq", help="quantize after training, or fine-tune with fake-quantizers")
    ckpt: str | None = field(None, help="float checkpoint to quantize instead of training one")
    resume: str | None = field(None, help="checkpoint of a run that was interrupted in float training, to go on with")
    data: DataConfig = field(DataConfig(), help="the images")
    train: TrainConfig = field(TrainConfig(), help="float training")
    quant: QuantConfig = field(QuantConfig(), help="quantization")
    benchmark: list[int] = field(
        [], help="batch sizes to time all files at on all installed engines, against float with and without folding"
    )


def float_to_int8(config: FloatToInt8Config, network_for: Callable[[ImageData], nn.Module]) -> None:
    """Train (or load) the network, quantize it, and print what that costs and gains.

    Args:
        config: of the recipe.
        network_for: makes the network for the images.
    """
    seed_everything(config.seed, verbose=False)
    output = Path(config.output_dir)
    data = image_data(config.data, config.seed)
    network = network_for(data)
    model = classifier(config.train, network, data.num_classes)
    quantize = callback(config.quant, config.mode, str(output / "int8"))
    logger = TensorBoardLogger(save_dir=output, name="tensorboard")

    def trainer(max_epochs: int, *callbacks: Callback) -> Trainer:
        return make_trainer(config, max_epochs, list(callbacks), logger)

    notes = {}
    before: dict[str, float] = {}
    if config.ckpt is not None:
        load_float_weights(model, config.ckpt)
        notes["float checkpoint"] = config.ckpt
        if config.mode == "ptq":
            trainer(0, quantize).fit(model, data)
    else:
        checkpoint = float_checkpoint(config)
        callbacks = (checkpoint, quantize) if config.mode == "ptq" else (checkpoint,)
        trainer(epochs(config.train, data), *callbacks).fit(model, data, ckpt_path=config.resume)
        notes["float checkpoint"] = checkpoint.best_model_path
    if config.mode == "qat":
        before = dict(trainer(0).validate(model, data, verbose=False)[0])
        notes["float before QAT"] = ", ".join(f"{name} {value:.4f}" for name, value in before.items())
        tuned = fine_tuner(config.quant, config.train, network, data.num_classes)
        trainer(config.quant.epochs, quantize).fit(tuned, data)

    result = quantize.result
    assert result is not None
    notes["INT8 model"] = ", ".join(result.exports)
    notes["TensorBoard"] = f"tensorboard --logdir {logger.log_dir}"
    engines = None
    if config.benchmark:
        data.setup("test")
        samples = next(iter(data.test_dataloader()))[0]
        float_network = lq.unprepare(copy.deepcopy(network)).cpu().eval()
        engines = lq.benchmark(
            result.exports, float_model=float_network, folded=True, batch_sizes=config.benchmark, samples=samples
        )
    results = {"data": data.name, "float_before_qat": before, "result": result, "engines": engines}
    notes["results"] = str(save_results(output, config, results))
    print_result(result, data.name, notes)
    if engines is not None:
        print(engines)


def plan_of(config: FloatToInt8Config, name: str) -> str:
    """What :func:`float_to_int8` would do with the network called ``name``."""
    what = f"quantize {config.ckpt}" if config.ckpt else f"train {name} in float, then quantize it"
    tuning = f" ({config.quant.epochs} epochs of fine-tuning)" if config.mode == "qat" else ""
    target = get_target(config.quant.target)
    return f"{what} with {config.mode.upper()}{tuning} for {target}; write to {config.output_dir}"
