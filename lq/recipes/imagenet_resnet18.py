"""ResNet-18 on ImageNet: PTQ with settings per module, a debug network in float arithmetic, before and after saving.

python -m lq.recipes.imagenet_resnet18 data.dir=PATH                                             all layers in INT8
python -m lq.recipes.imagenet_resnet18 data.dir=PATH "overrides={layer4: {weight_bits: 6}}"      one submodule
python -m lq.recipes.imagenet_resnet18 data.dir=PATH "overrides={layer4.0.conv1: null, fc: null}"  layers in float

The debug network simulates INT8 in float arithmetic and keeps its float weights where they were:
`network.layer1[0].conv1.weight` is what was trained, `lq.quantizers(network)["layer1.0.conv1.weight"]` rounds it.

Not measured on ImageNet yet: tried on generated folders of images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lq
from lq.errors import ConfigError
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.evaluation import top1
from lq.recipes.blocks.imagenet import ImageNetConfig, PretrainedConfig, imagenet, pretrained
from lq.recipes.blocks.results import save_results
from lq.recipes.blocks.trainer import RunConfig, device_of
from lq.schemes.targets import TARGET_CHOICES, get_target
from lq.util.files import write_archive, write_atomically


@dataclass
class Config(RunConfig):
    """ResNet-18 on ImageNet."""

    target: str = field("auto", help="engine family", choices=TARGET_CHOICES)
    calibrator: str = field("auto", help="how ranges follow from the data; auto takes the best one")
    overrides: dict[str, Any] = field({}, help="layers quantized in another way, null for those left in float")
    benchmark: list[int] = field([1], help="batch sizes to time every installed engine at, against float")
    output_dir: str = field("runs/imagenet_resnet18", help="folder for the INT8 network and the results")
    data: ImageNetConfig = field(ImageNetConfig(), help="the images")
    model: PretrainedConfig = field(PretrainedConfig(name="resnet18"), help="the float network")


@dataclass(frozen=True)
class Row:
    """One form of the network: top-1 in [0, 1], and the size of its file in 10^6 bytes, or None."""

    network: str
    top1: float
    size_mb: float | None


def run(config: Config) -> None:
    seed_everything(config.seed, verbose=False)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    data = imagenet(config.data, config.model)
    network = pretrained(config.model, data.num_classes)
    float_network = copy.deepcopy(network)
    device = device_of(config)
    calibration = data.calibration_dataloader(config.data.calibration_images, config.seed)
    images = next(iter(calibration))[0]
    try:
        lq.prepare(network.to(device), images[:2].to(device), target=config.target, overrides=config.overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    lq.calibrate(network, calibration, calibrator=config.calibrator, progress=config.progress)
    int8 = lq.convert(network.cpu())
    save = partial(torch.save, float_network.state_dict())
    write_atomically(output / "float.pt", lambda beside: write_archive(beside, save))
    files = [lq.export(int8, output / "int8.pt2", labels=data.classes).path]
    try:
        files.append(lq.export(network, output / "int8.onnx", labels=data.classes).path)
    except lq.MissingRuntimeError as error:
        print(f"no ONNX file: {error}")
    loaded = lq.load(files[0])

    def row(name: str, forward: Any, path: Path | None = None) -> Row:
        size = None if path is None else path.stat().st_size / 1e6
        return Row(name, top1(forward, data.val_dataloader(), data.num_classes), size)

    rows = [
        row("float", float_network.to(device), output / "float.pt"),
        row("debug: INT8 in float arithmetic", network.to(device)),
        row("INT8, before saving", int8),
        row("INT8, loaded from the file", loaded, files[0]),
    ]
    near = agreement(network.cpu(), int8, loaded, images)
    results: dict[str, Any] = {"data": data.name, "rows": rows, "agreement": near}
    print(int8.report)
    Console().print(table_of(rows))
    print(", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in near.items()))
    if config.benchmark:
        results["engines"] = lq.benchmark(
            files, float_model=float_network.cpu(), folded=True, batch_sizes=config.benchmark, samples=images
        )
        print(results["engines"])
    print(f"results: {save_results(output, config, results)}")


@torch.no_grad()
def agreement(debug: nn.Module, int8: nn.Module, loaded: Any, images: Tensor) -> dict[str, float]:
    """How near the outputs are, relative to the largest one."""
    simulated, computed, from_file = debug(images), int8(images), loaded(images)
    largest = simulated.abs().max()
    return {
        "debug_against_int8": float((simulated - computed).abs().max() / largest),
        "saved_against_loaded": float((computed - from_file).abs().max() / largest),
    }


def table_of(rows: list[Row]) -> Table:
    table = Table()
    for header in ("network", "top-1 %", "MB"):
        table.add_column(header, justify="left" if header == "network" else "right")
    for row in rows:
        table.add_row(row.network, f"{100 * row.top1:.2f}", "" if row.size_mb is None else f"{row.size_mb:.2f}")
    return table


def plan(config: Config) -> str:
    layers = f", with {len(config.overrides)} settings of single layers" if config.overrides else ""
    what = f"quantize {config.model.name} for {get_target(config.target)}{layers}"
    return f"{what}, images from {config.data.dir}; write to {config.output_dir}"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
