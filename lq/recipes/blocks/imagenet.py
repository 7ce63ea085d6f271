"""What the ImageNet recipes share: the images, and a network with torchvision's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torchvision
from torch import nn

from lq.data import DatasetNotFoundError, ImageNet
from lq.errors import ConfigError
from lq.models import RESNETS, build_resnet
from lq.recipes.blocks.config import field
from lq.recipes.blocks.training import load_float_weights


@dataclass
class ImageNetConfig:
    """Which images, and how they are fed."""

    dir: str = field("data/imagenet", help="folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, of any classes")
    batch_size: int = field(64, help="images per step")
    num_workers: int | None = field(None, help="loader processes, by default one on each core")
    calibration_images: int = field(1024, help="training images that ranges are taken from, chosen by the seed")


@dataclass
class PretrainedConfig:
    """The float network, and where its weights come from."""

    name: str = field("resnet50", help="a ResNet of torchvision", choices=RESNETS)
    weights: str | None = field("IMAGENET1K_V1", help="torchvision's, fetched on first use; null for random ones")
    ckpt: str | None = field(None, help="float checkpoint to load on top of them")


def imagenet(config: ImageNetConfig, model: PretrainedConfig) -> ImageNet:
    """The data module, with the preprocessing that the network's weights were trained with.

    Raises:
        ConfigError: where the folder is not there or not complete, or the weights do not exist.
    """
    published = torchvision.models.get_model_weights(model.name)
    try:
        return ImageNet(
            config.dir,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            weights=f"{published.__name__}.{model.weights or 'DEFAULT'}",
        )
    except DatasetNotFoundError as error:
        raise ConfigError(f"data.dir={config.dir!r}: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def pretrained(config: PretrainedConfig, num_classes: int) -> nn.Module:
    """The network, in evaluation mode. With other than 1000 classes its last layer is new: give ``ckpt`` then.

    Raises:
        ConfigError: where the weights do not exist or the checkpoint cannot be loaded.
    """
    try:
        built: nn.Module = build_resnet(config.name, num_classes=num_classes, weights=config.weights)
    except ValueError as error:
        raise ConfigError(f"model.weights: {error}") from error
    if config.ckpt is not None:
        load_float_weights(nn.ModuleDict({"model": built}), config.ckpt)
    return built.eval()
