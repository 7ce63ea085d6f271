"""The networks for recipes that compare things, by the name the user types."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lq.models import build_resnet, build_small_mobilenet_v2

#: Makes each network, given the number of classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda num_classes: build_resnet("resnet18", num_classes=num_classes),
    "mobilenet_v2": build_small_mobilenet_v2,
}
