"""The VGG family: torchvision's networks for ImageNet, and those for 32x32 images or with the user's own layers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torchvision.models
from torch import nn
from torchvision.models import VGG

Head = Literal["imagenet", "cifar"]

#: Channels of each 3x3 convolution, and ``"M"`` for each max-pool that halves the resolution: Simonyan and Zisserman,
#: "Very Deep Convolutional Networks", 2015, table 1. RA is A at half its width, which leaves a quarter of the weights.
VGG_CONFIGURATIONS: dict[str, tuple[int | str, ...]] = {
    "A": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "B": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "D": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "E": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
    "RA": (32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M"),
}

_LETTERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}

VGGS: tuple[str, ...] = tuple(f"{name}{suffix}" for name in _LETTERS for suffix in ("", "_bn"))

_IMAGENET_CLASSES = 1000
_IMAGENET_SIDE = 7  # positions per side that torchvision's classifier sees
_IMAGENET_WIDTH = 4096
_CIFAR_POOLS = 5  # halvings that leave one position of 32x32


def build_vgg(
    name: str | Sequence[int | str],
    num_classes: int = _IMAGENET_CLASSES,
    batch_norm: bool | None = None,
    classifier: Head = "imagenet",
    hidden: int = 512,
    dropout: float = 0.5,
    in_channels: int = 3,
    weights: str | None = None,
) -> VGG:
    """Builds a VGG, as torchvision's class with its parameter names.

    The ImageNet classifier is that of the paper: three linear layers, 4096 wide, on 7x7 positions. It has 124 million
    weights, so a 32x32 image gets another: ``Linear -> BatchNorm1d -> ReLU -> Dropout -> Linear`` on one position.

    Args:
        name: one of :data:`VGGS`; a letter of :data:`VGG_CONFIGURATIONS`; or layers of your own, written as there:
            output channels of a convolution or ``"M"`` for a max-pool.
        num_classes: outputs of the classifier.
        batch_norm: a batch norm after every convolution. None follows the name, and is True for letters and layers.
        classifier: ``"imagenet"``, or ``"cifar"`` for 32x32 images. With fewer than five max-pools, the latter averages
            the positions that are left, and images may have any size.
        hidden: width of the CIFAR classifier's hidden layer.
        dropout: share of the classifier's hidden values that training sets to 0.
        in_channels: channels of the images, 1 for grey ones.
        weights: name of torchvision's pretrained weights for one of :data:`VGGS`: ``"IMAGENET1K_V1"`` or ``"DEFAULT"``,
            downloaded on first use. With ``num_classes`` other than 1000 the last layer is new, with the CIFAR
            classifier all of the classifier.

    Raises:
        ValueError: where an argument is unknown, out of its range or contradicts another one.

    Example:
        >>> network = build_vgg("RA", num_classes=10, classifier="cifar")
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> build_vgg([16, "M", 32, "M"], 10, classifier="cifar", in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    layers = _layers(name)
    batch_norm = _batch_norm(name, batch_norm)
    if classifier not in get_args(Head):
        raise ValueError(f"classifier={classifier!r} is not one of {', '.join(get_args(Head))}.")
    for argument, value in (("num_classes", num_classes), ("hidden", hidden), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1).")
    if classifier == "cifar" and layers.count("M") > _CIFAR_POOLS:
        raise ValueError(
            f"name={name!r} has {layers.count('M')} max-pools, and {_CIFAR_POOLS} leave one position of a 32x32 image: "
            "leave some out, or pass classifier='imagenet' for larger images."
        )
    if weights is not None:
        network = _pretrained(name, num_classes, dropout, in_channels, weights)
        if classifier == "imagenet":
            return network
        features = network.features
    else:
        features = _features(layers, batch_norm, in_channels)
        _initialize(features)
    return _assemble(features, layers, num_classes, classifier, hidden, dropout)


def _layers(name: str | Sequence[int | str]) -> tuple[int | str, ...]:
    """The layers, from any of the three forms the user may give."""
    if isinstance(name, str):
        letter = _LETTERS.get(name.removesuffix("_bn"), name)
        if letter not in VGG_CONFIGURATIONS:
            choices = {choice.lower(): choice for choice in (*VGGS, *VGG_CONFIGURATIONS)}
            near = [choices[match] for match in difflib.get_close_matches(name.lower(), choices)]
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
            raise ValueError(
                f"name={name!r} is not a VGG{hint} Choose one of {', '.join(choices.values())}, or give layers, for "
                "example [64, 'M', 128, 'M']."
            )
        return VGG_CONFIGURATIONS[letter]
    layers = tuple(name)
    for layer in layers:
        if layer != "M" and not (isinstance(layer, int) and layer >= 1):
            raise ValueError(f"name={name!r} has the layer {layer!r}; a layer is a number of channels or 'M'.")
    if all(layer == "M" for layer in layers):
        raise ValueError(f"name={name!r} has no convolution; give at least one number of channels.")
    return layers


def _batch_norm(name: str | Sequence[int | str], batch_norm: bool | None) -> bool:
    if not isinstance(name, str) or name in VGG_CONFIGURATIONS:
        return batch_norm is not False
    named = name.endswith("_bn")
    if batch_norm not in (None, named):
        other = name.removesuffix("_bn") if named else f"{name}_bn"
        raise ValueError(f"batch_norm={batch_norm} contradicts name={name!r}: pass name={other!r}.")
    return named


def _pretrained(
    name: str | Sequence[int | str], num_classes: int, dropout: float, in_channels: int, weights: str
) -> VGG:
    if not isinstance(name, str) or name not in VGGS:
        raise ValueError(
            f"weights={weights!r} do not exist for name={name!r}: choose one of {', '.join(VGGS)}, or weights=None."
        )
    if in_channels != 3:
        raise ValueError(f"weights={weights!r} are for in_channels=3 and not {in_channels}: pass weights=None.")
    choices = torchvision.models.get_model_weights(name).__members__
    # vgg16 also has weights for the features only, with NaN in the classifier and another normalisation.
    usable = [choice for choice in choices if choice != "IMAGENET1K_FEATURES"]
    if weights not in usable:
        raise ValueError(f"weights={weights!r} do not exist for {name}; choose one of {', '.join(usable)} or None.")
    network: VGG = torchvision.models.get_model(name, weights=choices[weights], dropout=dropout)
    if num_classes != _IMAGENET_CLASSES:
        network.classifier[-1] = nn.Linear(_IMAGENET_WIDTH, num_classes)
        _initialize(network.classifier[-1])
    return network


def _features(layers: Sequence[int | str], batch_norm: bool, in_channels: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, str):
            modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        # A bias before a batch norm has no effect; torchvision's weights have one.
        modules.append(nn.Conv2d(in_channels, layer, kernel_size=3, padding=1))
        if batch_norm:
            modules.append(nn.BatchNorm2d(layer))
        modules.append(nn.ReLU(inplace=True))
        in_channels = layer
    return nn.Sequential(*modules)


def _assemble(
    features: nn.Module, layers: Sequence[int | str], num_classes: int, classifier: Head, hidden: int, dropout: float
) -> VGG:
    with torch.device("meta"):
        # Half a gigabyte of weights, for 512 channels, that the next lines replace.
        network = VGG(nn.Sequential(), init_weights=False)
    channels = [layer for layer in layers if isinstance(layer, int)][-1]
    network.features = features
    if classifier == "imagenet":
        network.avgpool = nn.AdaptiveAvgPool2d((_IMAGENET_SIDE, _IMAGENET_SIDE))
        network.classifier = nn.Sequential(
            nn.Linear(channels * _IMAGENET_SIDE**2, _IMAGENET_WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(_IMAGENET_WIDTH, _IMAGENET_WIDTH),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(_IMAGENET_WIDTH, num_classes),
        )
    else:
        # The mean of one position costs the float network nothing, but the INT8 one two conversions.
        network.avgpool = nn.Identity() if layers.count("M") == _CIFAR_POOLS else nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
    _initialize(network.classifier)
    return network


def _initialize(part: nn.Module) -> None:
    """As torchvision initialises a VGG: a standard deviation of 0.01 for linear layers, He et al. for convolutions."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
