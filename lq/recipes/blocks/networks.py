"""The networks that recipes which compare things can be run on, by the name the user types."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lq.models import build_resnet, build_small_mobilenet_v2

#: What makes each network for so many classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda num_classes: build_resnet("resnet18", num_classes=num_classes),
    "mobilenet_v2": build_small_mobilenet_v2,
}
