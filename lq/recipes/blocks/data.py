"""Which images a recipe runs on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from lq.data import CIFAR10, MNIST, DatasetNotFoundError, FashionMNIST, Shapes10
from lq.errors import ConfigError
from lq.recipes.blocks.config import field

DataName = Literal["cifar10", "mnist", "fashion_mnist", "shapes10"]

ImageData = CIFAR10 | MNIST | Shapes10

_SOURCES: dict[str, tuple[str, type[CIFAR10] | type[MNIST]]] = {
    "cifar10": ("CIFAR-10", CIFAR10),
    "mnist": ("MNIST", MNIST),
    "fashion_mnist": ("Fashion-MNIST", FashionMNIST),
}


@dataclass
class DataConfig:
    """Which images, and how they are fed."""

    name: DataName = field("cifar10", help="data set; shapes10 is built in and needs no files")
    dir: str | None = field(
        None,
        help="where it lies, data/NAME by default: the publisher's files; for CIFAR-10 also train|test/CLASS/*.jpg",
    )
    download: bool = field(False, help="download the data set into dir if it is not there")
    fallback: bool = field(True, help="use shapes10 where the data set is not available; false makes that an error")
    batch_size: int = field(128, help="images per step")
    num_workers: int = field(0, help="loader processes; the data are in memory, so few are needed")
    max_train: int | None = field(None, help="use only so many training images")
    max_test: int | None = field(None, help="use only so many test images")


def image_data(config: DataConfig, seed: int) -> ImageData:
    """The data module, or Shapes10 and a prominent notice if the data set is not available.

    Raises:
        ConfigError: where the data set is not available and ``config.fallback`` is off.
    """
    if config.name != "shapes10":
        folder = config.dir or f"data/{config.name}"
        published_as, source = _SOURCES[config.name]
        data = source(
            folder,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            download=config.download,
            seed=seed,
            max_train=config.max_train,
            max_test=config.max_test,
        )
        try:
            data.prepare_data()
            return data
        except DatasetNotFoundError as error:
            if not config.fallback:
                raise ConfigError(f"data.dir={folder!r}: {error}") from error
            _say_fallback(published_as, folder)
    return Shapes10(
        train_size=config.max_train or 12_800,
        test_size=config.max_test or 4_000,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        seed=seed,
    )


def _say_fallback(name: str, folder: str) -> None:
    line = "=" * 88
    print(
        f"{line}\n{name} IS NOT AT {folder!r}: THIS RUN USES THE BUILT-IN Shapes10 INSTEAD.\n"
        f"Its accuracies say nothing about {name}. Set data.dir=... or data.download=true for {name},\n"
        f"or data.fallback=false to make this an error.\n{line}",
        file=sys.stderr,
    )
