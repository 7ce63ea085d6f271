"""ResNet-50 on ImageNet: calibrators compared from one pass, fine-tuning with fake-quantizers, ONNX for TensorRT.

python -m lq.recipes.imagenet_resnet50 data.dir=PATH
python -m lq.recipes.imagenet_resnet50 data.dir=PATH --config configs/imagenet_resnet50_qat.yaml         1 epoch
python -m lq.recipes.imagenet_resnet50 data.dir=PATH --config configs/imagenet_resnet50_qat_cosine.yaml  15 epochs

Not measured on ImageNet yet: tried on generated folders of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lq
from lq.callback import QuantizationResult
from lq.data import ImageNet
from lq.deployment.formats import FORMATS
from lq.errors import ConfigError
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.evaluation import top1
from lq.recipes.blocks.imagenet import ImageNetConfig, PretrainedConfig, imagenet, pretrained
from lq.recipes.blocks.quantization import QuantConfig, callback, fine_tuner
from lq.recipes.blocks.results import print_result, save_results
from lq.recipes.blocks.trainer import RunConfig, device_of, make_trainer
from lq.recipes.blocks.training import TrainConfig, float_checkpoint
from lq.schemes.targets import get_target


@dataclass
class Config(RunConfig):
    """ResNet-50 on ImageNet."""

    mode: Literal["ptq", "qat"] = field("ptq", help="quantize as it is, or fine-tune with fake-quantizers")
    calibrators: list[str] = field(
        ["minmax", "percentile:99.9", "percentile:99.99", "mse", "entropy"], help="PTQ: those to compare"
    )
    output_dir: str = field("runs/imagenet_resnet50", help="folder for checkpoints, INT8 network and results")
    data: ImageNetConfig = field(ImageNetConfig(), help="the images")
    model: PretrainedConfig = field(PretrainedConfig(), help="the float network")
    train: TrainConfig = field(TrainConfig(nesterov=False, weight_decay=1e-4), help="the optimizer of fine-tuning")
    quant: QuantConfig = field(QuantConfig(target="tensorrt", export=["onnx"], lr=1e-4), help="quantization")


def run(config: Config) -> None:
    seed_everything(config.seed, verbose=False)
    data = imagenet(config.data, config.model)
    network = pretrained(config.model, data.num_classes)
    if config.mode == "ptq":
        compare_and_export(config, network, data)
    else:
        fine_tune(config, network, data)


def compare_and_export(config: Config, network: nn.Module, data: ImageNet) -> None:
    """Every calibrator from one pass over the calibration images; the best one's network goes to ONNX."""
    output = Path(config.output_dir)
    try:
        FORMATS["onnx"].check_dependencies(True)
    except lq.MissingRuntimeError as error:
        raise ConfigError(str(error)) from error
    device = device_of(config)
    calibration = data.calibration_dataloader(config.data.calibration_images, config.seed)
    images = next(iter(calibration))[0][:2].to(device)
    lq.prepare(network.to(device), images, target=config.quant.target, overrides=config.quant.overrides)
    lq.calibrate(network, calibration, progress=config.progress)

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"top-1": top1(network, data.val_dataloader(), data.num_classes)}

    comparison = lq.compare_calibrators(network, evaluate, config.calibrators)
    best = config.quant.calibrator or comparison.best("top-1")
    ranges = lq.ranges(lq.recalibrate(network.cpu(), best))
    output.mkdir(parents=True, exist_ok=True)
    preprocessing = {"mean": list(data.mean), "std": list(data.std)}
    written = lq.export(network, output / "int8.onnx", labels=data.classes, preprocessing=preprocessing)
    lq.save_statistics(network, output / "statistics.npz")
    print(ranges)
    print(comparison)
    print(f"{data.name}, {data.num_classes} classes: calibrator {best!r}, {written}")
    results: dict[str, Any] = {"data": data.name, "top1": comparison, "calibrator": best, "ranges": ranges.rows}
    print(f"results: {save_results(output, config, results)}")


def fine_tune(config: Config, network: nn.Module, data: ImageNet) -> None:
    """Float weights to INT8 weights through training with fake-quantizers."""
    output = Path(config.output_dir)
    quantize = callback(config.quant, "qat", str(output / "int8"))
    module = fine_tuner(config.quant, config.train, network.train(), data.num_classes)
    logger = TensorBoardLogger(save_dir=output, name="tensorboard")
    before = dict(make_trainer(config, 0, [], logger=False).validate(module, data, verbose=False)[0])
    trainer = make_trainer(config, config.quant.epochs, [quantize, float_checkpoint(config)], logger)
    trainer.fit(module, data)
    result = quantize.result
    assert isinstance(result, QuantizationResult)
    results = {"data": data.name, "float_before_qat": before, "result": result}
    notes = {"float before QAT": ", ".join(f"{name} {value:.4f}" for name, value in before.items())}
    notes |= {"files": ", ".join(result.exports), "results": str(save_results(output, config, results))}
    print_result(result, data.name, notes)


def plan(config: Config) -> str:
    if config.mode == "ptq":
        how = f"calibrate on {config.data.calibration_images} images and compare {', '.join(config.calibrators)}"
    else:
        how = f"fine-tune for {config.quant.epochs} epochs with fake-quantizers"
    what = f"{config.model.name} for {get_target(config.quant.target)}: {how}"
    return f"{what}, images from {config.data.dir}; write to {config.output_dir}"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
