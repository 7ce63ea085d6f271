"""Which engine family and which calibrator: a sweep over both, ResNet-18 on MNIST or Fashion-MNIST.

python -m lq.recipes.mnist_resnet18 data.dir=PATH                              MNIST
python -m lq.recipes.mnist_resnet18 data.name=fashion_mnist data.dir=PATH      Fashion-MNIST
python -m lq.recipes.mnist_resnet18 data.name=shapes10                         no files needed

The float network is trained once, and each target sees the calibration data once: the calibrators work from the same
statistics. Prints a table, and writes it with a chart (sweep.png) and every INT8 network (TARGET_CALIBRATOR.pt2).

Top-1 on the 10,000 test images of Fashion-MNIST (configs/mnist_resnet18_fashion.yaml, 3 epochs), float 88.44, one run
on two cores of an AMD EPYC (Zen 3; without VNNI, so that x86 runs with its weights rounded to 7 bits), 44.7 to 11.6 MB:
x86      minmax 88.46  moving_average 88.43  percentile 88.28  mse 88.37  entropy 88.39
xnnpack  minmax 88.43  moving_average 88.37  percentile 88.29  mse 88.41  entropy 88.34
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from rich.console import Console

import lq
from lq.models import build_resnet
from lq.numerics.calibrators import CALIBRATORS
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.data import DataConfig, image_data
from lq.recipes.blocks.evaluation import top1
from lq.recipes.blocks.results import save_results
from lq.recipes.blocks.sweep import Row, save_chart, table_of
from lq.recipes.blocks.trainer import RunConfig, make_trainer
from lq.recipes.blocks.training import TrainConfig, classifier, epochs, float_checkpoint, load_float_weights
from lq.schemes.targets import TARGET_CHOICES, get_target
from lq.timing.measure import measure
from lq.util.cpu import cpu_name


@dataclass
class Config(RunConfig):
    """Targets and calibrators side by side."""

    ckpt: str | None = field(None, help="float checkpoint to quantize instead of training one")
    targets: list[str] = field(["auto", "xnnpack"], help=f"engine families, of {', '.join(TARGET_CHOICES)}")
    calibrators: list[str] = field(list(CALIBRATORS), help="those to compare; also percentile:99.9 and the like")
    num_batches: int = field(32, help="training batches to calibrate on")
    output_dir: str = field("runs/mnist_resnet18", help="folder for checkpoints, INT8 networks, table and chart")
    data: DataConfig = field(DataConfig(name="mnist"), help="the images")
    train: TrainConfig = field(TrainConfig(epochs=3), help="float training")


def run(config: Config) -> None:
    seed_everything(config.seed, verbose=False)
    output = Path(config.output_dir)
    data = image_data(config.data, config.seed)
    network = build_resnet("resnet18", num_classes=data.num_classes, in_channels=data.input_shape[0])
    model = classifier(config.train, network, data.num_classes)
    if config.ckpt is not None:
        load_float_weights(model, config.ckpt)
    else:
        trainer = make_trainer(config, epochs(config.train, data), [float_checkpoint(config)], logger=False)
        trainer.fit(model, data)
    data.setup("fit")
    network = network.cpu().eval()
    float_size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    networks: dict[str, Any] = {"float": network}
    rows = {"float": Row("", "", top1(network, data.val_dataloader(), data.num_classes), float_size / 1e6)}
    output.mkdir(parents=True, exist_ok=True)
    for target in map(get_target, config.targets):
        prepared = lq.prepare(copy.deepcopy(network), torch.zeros(2, *data.input_shape), target=target)
        lq.calibrate(prepared, data.train_dataloader(), num_batches=config.num_batches, progress=config.progress)
        for calibrator in config.calibrators:
            int8 = lq.convert(lq.recalibrate(prepared, calibrator))
            path = output / f"{target}_{calibrator.replace(':', '_')}.pt2"
            lq.export(int8, path, labels=data.classes)
            name = f"{target}, {calibrator}"
            networks[name] = int8
            accuracy = top1(int8, data.val_dataloader(), data.num_classes)
            rows[name] = Row(target.name, calibrator, accuracy, path.stat().st_size / 1e6)
    times = measure(networks, {"x": torch.zeros(1, *data.input_shape)}, 1)
    timed = [replace(row, p50_ms=times[name].p50_ms) for name, row in rows.items()]
    save_chart(timed, data.name, output / "sweep.png")
    results = save_results(output, config, {"data": data.name, "rows": timed})
    print(f"\nData: {data.name}; INT8 in process, on {cpu_name()}")
    Console().print(table_of(timed))
    print(f"written: {results}, {output / 'sweep.png'}")


def plan(config: Config) -> str:
    what = f"quantize {config.ckpt}" if config.ckpt else "train ResNet-18 in float, then quantize it"
    return f"{what} for {', '.join(config.targets)} with {', '.join(config.calibrators)}; write to {config.output_dir}"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
