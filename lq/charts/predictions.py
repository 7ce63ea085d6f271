"""What float and INT8 predict for the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Classes of the same samples by the float and by the INT8 model.

    Args:
        labels: true classes, int64 of shape ``(N,)``.
        float_classes: what the float model says, likewise.
        int8_classes: what the INT8 model says, likewise.
        num_classes: how many classes there are.
        changed: indices of some samples whose prediction changed, int64 of shape ``(K,)``.
        images: those samples, float32 in [0, 1] of shape ``(K, C, H, W)``; None where the samples are not images.
        names: of the classes, or None.
    """

    labels: Tensor
    float_classes: Tensor
    int8_classes: Tensor
    num_classes: int
    changed: Tensor
    images: Tensor | None = None
    names: Sequence[str] | None = None

    def name(self, label: int) -> str:
        """The name of a class, or its number where it has none."""
        return self.names[label] if self.names is not None and 0 <= label < len(self.names) else str(label)

    @property
    def changed_share(self) -> float:
        """Share of the samples whose prediction changed, in [0, 1]."""
        return float((self.float_classes != self.int8_classes).double().mean())

    def confusion(self, classes: Tensor) -> Tensor:
        """Counts by true class (rows) and predicted class, int64 of shape ``(num_classes, num_classes)``."""
        flat = self.labels * self.num_classes + classes
        return torch.bincount(flat, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)
