"""The ResNet family of torchvision, with its ImageNet stem or the CIFAR one."""

from __future__ import annotations

import difflib
from typing import Literal, get_args

import torchvision.models
from torch import nn
from torchvision.models import ResNet

RESNETS: tuple[str, ...] = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

Stem = Literal["imagenet", "cifar"]

_IMAGENET_CLASSES = 1000


def build_resnet(
    name: str,
    num_classes: int = _IMAGENET_CLASSES,
    stem: Stem = "imagenet",
    weights: str | None = None,
    zero_init_residual: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """Builds a torchvision ResNet.

    The CIFAR stem is a 3x3 convolution of stride 1 without a max-pool (He et al., "Deep Residual Learning for Image
    Recognition", section 4.2): a 32x32 image reaches ``layer1`` with 32x32 positions, where the ImageNet stem leaves
    8x8.

    Args:
        name: one of :data:`RESNETS`.
        num_classes: outputs of the classifier.
        stem: ``"imagenet"`` (7x7, stride 2, max-pool) or ``"cifar"`` (3x3, stride 1).
        weights: name of torchvision's pretrained weights, for example ``"IMAGENET1K_V1"`` or ``"DEFAULT"``, downloaded
            on first use. With ``num_classes`` other than 1000 the backbone is pretrained and the classifier new.
        zero_init_residual: start every residual branch at zero, by its last batch norm.
        in_channels: of the images, 1 for grey ones.

    Raises:
        ValueError: for an unknown name, stem or weights, or for pretrained weights with the CIFAR stem or with a number
            of channels other than 3.

    Example:
        >>> network = build_resnet("resnet18", num_classes=10, stem="cifar")
        >>> network.conv1.stride, network.fc.out_features
        ((1, 1), 10)
    """
    if name not in RESNETS:
        near = difflib.get_close_matches(name, RESNETS)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise ValueError(f"name={name!r} is not a ResNet{hint} Choose one of {', '.join(RESNETS)}.")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1.")
    if stem not in get_args(Stem):
        raise ValueError(f"stem={stem!r} is not one of {', '.join(get_args(Stem))}.")
    if in_channels < 1:
        raise ValueError(f"in_channels={in_channels} must be at least 1.")
    if weights is None:
        network: ResNet = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, zero_init_residual=zero_init_residual
        )
        return network if stem == "imagenet" and in_channels == 3 else _with_stem(network, stem, in_channels)
    if in_channels != 3:
        raise ValueError(f"weights={weights!r} were trained on 3 channels and not on in_channels={in_channels}.")
    if stem == "cifar":
        raise ValueError(
            f"weights={weights!r} were trained with the ImageNet stem and cannot be used with stem='cifar': "
            "pass stem='imagenet' or weights=None."
        )
    return _pretrained(name, num_classes, weights)


def _pretrained(name: str, num_classes: int, weights: str) -> ResNet:
    choices = torchvision.models.get_model_weights(name).__members__
    if weights not in choices:
        raise ValueError(f"weights={weights!r} do not exist for {name}; choose one of {', '.join(choices)} or None.")
    network: ResNet = torchvision.models.get_model(name, weights=choices[weights])
    if num_classes != _IMAGENET_CLASSES:
        network.fc = nn.Linear(network.fc.in_features, num_classes)
    return network


def _with_stem(network: ResNet, stem: Stem, in_channels: int) -> ResNet:
    size, stride = (3, 1) if stem == "cifar" else (7, 2)
    network.conv1 = nn.Conv2d(
        in_channels, network.conv1.out_channels, size, stride=stride, padding=size // 2, bias=False
    )
    if stem == "cifar":
        network.maxpool = nn.Identity()
    # As torchvision initialises every convolution of a ResNet, the replaced one too.
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network
