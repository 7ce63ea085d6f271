"""Which calibrator suits a network: accuracy with each one, from one pass over the calibration data.

python -m lq.recipes.compare_calibrators data.dir=PATH network=mobilenet_v2      trains the float network first
python -m lq.recipes.compare_calibrators data.dir=PATH ckpt=float.ckpt           quantizes one that is trained
python -m lq.recipes.compare_calibrators data.name=shapes10                      no files needed

Top-1 on CIFAR-10 as JPEG images, 10,000 test images, target x86, mean of seed=0, 1, 2 (the float network is the same):
resnet18      float 80.11  minmax 80.02  moving_average 80.01  percentile 80.06  mse 80.02  entropy 80.00  auto 79.96
mobilenet_v2  float 77.34  minmax 77.39  moving_average 77.37  percentile 77.39  mse 77.48  entropy 77.39  auto 77.48
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import seed_everything
from torch import nn

import lq
from lq.numerics.calibrators import CALIBRATORS
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.data import DataConfig, image_data
from lq.recipes.blocks.evaluation import top1
from lq.recipes.blocks.networks import NETWORKS
from lq.recipes.blocks.trainer import RunConfig, make_trainer
from lq.recipes.blocks.training import TrainConfig, classifier, epochs, float_checkpoint, load_float_weights
from lq.schemes.targets import TARGET_CHOICES, get_target
from lq.workflow.calibrate import AUTO, calibrate_and_compare


@dataclass
class Config(RunConfig):
    """Calibrators side by side."""

    network: Literal["resnet18", "mobilenet_v2"] = field("resnet18", help="ResNet-18, 7x7 stem; or a small MobileNetV2")
    ckpt: str | None = field(None, help="float checkpoint to quantize instead of training one")
    target: str = field("auto", help="engine family the quantizers are placed for", choices=TARGET_CHOICES)
    calibrators: list[str] = field(list(CALIBRATORS), help="those to compare; also percentile:99.9 and the like")
    num_batches: int = field(32, help="training batches to calibrate on")
    output_dir: str = field("runs/compare_calibrators", help="folder for checkpoints and the statistics")
    data: DataConfig = field(DataConfig(), help="the images")
    train: TrainConfig = field(TrainConfig(), help="float training")


def run(config: Config) -> None:
    seed_everything(config.seed, verbose=False)
    data = image_data(config.data, config.seed)
    network = NETWORKS[config.network](data.num_classes)
    model = classifier(config.train, network, data.num_classes)
    if config.ckpt is not None:
        load_float_weights(model, config.ckpt)
    else:
        trainer = make_trainer(config, epochs(config.train, data), [float_checkpoint(config)], logger=False)
        trainer.fit(model, data)

    data.setup("fit")
    images, _ = next(iter(data.val_dataloader()))
    lq.prepare(network.eval(), images[:2], target=config.target)
    chosen = calibrate_and_compare(
        network, data.train_dataloader(), calibrator=AUTO, num_batches=config.num_batches, progress=config.progress
    )

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"top-1": top1(network, data.val_dataloader(), data.num_classes)}

    comparison = lq.compare_calibrators(network, evaluate, config.calibrators)
    lq.save_statistics(network, f"{config.output_dir}/statistics.npz")
    assert chosen is not None
    print(f"\nData: {data.name}, {config.network} for {get_target(config.target)}")
    print(comparison)
    print(chosen)
    print(f"calibrator='auto' takes {chosen.best()!r}, by the error of the INT8 outputs on held-out training batches")


def plan(config: Config) -> str:
    what = f"quantize {config.ckpt}" if config.ckpt else f"train {config.network} in float"
    how = f"compare {', '.join(config.calibrators)} for {get_target(config.target)}"
    return f"{what}, then {how}; write to {config.output_dir}"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
