"""Accuracy of any network, float, simulated or INT8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


@torch.no_grad()
def top1(network: Callable[[Tensor], Any], batches: Iterable[Any], num_classes: int) -> float:
    """Share of the images, in [0, 1], whose largest logit is that of their label.

    Args:
        network: gives logits ``(N, num_classes)``; runs where its parameters are, or on the CPU if it has none.
        batches: images ``(N, C, H, W)`` with labels ``(N,)``.
        num_classes: number of classes.
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    accuracy = MulticlassAccuracy(num_classes, average="micro").to(device)
    for images, labels in batches:
        accuracy.update(network(images.to(device)), labels.to(device))
    return float(accuracy.compute())
