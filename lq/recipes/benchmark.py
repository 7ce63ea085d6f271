"""Which engine to deploy on: exported networks on every installed runtime, side by side on this machine.

python -m lq.recipes.benchmark int8.onnx int8.pt2                              random inputs, no float model
python -m lq.recipes.benchmark int8.onnx ckpt=float.ckpt data.dir=PATH         against the float ResNet-18
python -m lq.recipes.benchmark int8.onnx batch_sizes=[1,128] threads=[1,2]

Every runtime lives in a process of its own, and the processes take turns. Writes benchmark.csv and benchmark.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import lq
from lq.deployment.formats import RUNTIMES
from lq.errors import ConfigError
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.data import DataConfig, image_data
from lq.recipes.blocks.networks import NETWORKS
from lq.recipes.blocks.training import load_float_weights
from lq.util.files import ensure_writable_dir


@dataclass
class Config:
    """Runtimes side by side."""

    models: list[str] = field(help="files from lq.export, .onnx and .pt2", positional=True)
    network: Literal["resnet18", "mobilenet_v2"] = field("resnet18", help="the float network, where ckpt is given")
    ckpt: str | None = field(None, help="float checkpoint to compare with: latency, and classes of the images")
    folded: bool = field(True, help="time the float network folded as the files are, too: that gain is not INT8's")
    batch_sizes: list[int] = field([1, 32], help="samples in one call")
    threads: list[int] = field([], help="numbers of CPU threads; by default torch's own")
    runtimes: list[str] = field([], help=f"of {', '.join(RUNTIMES)}; by default all")
    seconds: float = field(2.0, help="about how long to time each contender")
    num_samples: int = field(512, help="test images whose classes are compared with those of the float network")
    output_dir: str = field("runs/benchmark", help="folder for benchmark.csv and benchmark.png")
    seed: int = field(0, help="seed of the data")
    data: DataConfig = field(DataConfig(), help="the images, where ckpt is given")


def run(config: Config) -> None:
    float_model, samples = (None, None) if config.ckpt is None else _float_model(config)
    try:
        benchmark = lq.benchmark(
            config.models,
            float_model=float_model,
            folded=config.folded,
            batch_sizes=config.batch_sizes,
            threads=config.threads,
            runtimes=config.runtimes or None,
            samples=samples,
            seconds=config.seconds,
        )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    output = Path(config.output_dir)
    ensure_writable_dir(output, "output_dir")
    print(benchmark)
    if not benchmark.rows:
        raise ConfigError("no contender ran")
    benchmark.save_csv(output / "benchmark.csv")
    benchmark.save_chart(output / "benchmark.png")
    print(f"written: {output / 'benchmark.csv'}, {output / 'benchmark.png'}")


def _float_model(config: Config) -> tuple[nn.Module, Tensor]:
    data = image_data(config.data, config.seed)
    network = NETWORKS[config.network](data.num_classes)
    assert config.ckpt is not None
    load_float_weights(nn.ModuleDict({"model": network}), config.ckpt)
    data.setup("test")
    images: list[Tensor] = []
    for batch, _ in data.test_dataloader():
        images.append(batch)
        if sum(map(len, images)) >= config.num_samples:
            break
    return network.eval(), torch.cat(images)[: config.num_samples]


def plan(config: Config) -> str:
    against = f" against {config.network} from {config.ckpt}" if config.ckpt else ""
    return (
        f"time {', '.join(config.models)}{against} with batches of {config.batch_sizes}; write to {config.output_dir}"
    )


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
