"""A labelled image data set before it is batched, and how a part of it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabeledImages:
    """Images with their classes.

    Args:
        images: uint8, ``(N, C, H, W)``.
        labels: int64, ``(N,)``, indices into the data set's class names.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> LabeledImages:
        """The images at ``indices``, in that order."""
        return LabeledImages(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A data set as its source has it.

    Args:
        train: the training split.
        test: the test split.
        class_names: what the labels mean.
    """

    train: LabeledImages
    test: LabeledImages
    class_names: tuple[str, ...]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded shuffle in which every prefix has the classes in the proportions of the whole.

    Args:
        labels: int64, ``(N,)``.
        seed: decides the order within each class, and between classes that are equally due.

    Returns:
        A permutation of ``range(N)``, int64, ``(N,)``.

    Example:
        >>> labels = torch.tensor([0] * 6 + [1] * 3)
        >>> sorted(labels[stratified_order(labels, seed=0)[:3]].tolist())
        [0, 0, 1]
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # Sorted rather than looked up class by class, which for the thousand classes of ImageNet takes a minute.
    by_class = torch.argsort(labels[shuffled], stable=True)
    counts = torch.bincount(labels)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    # The k-th of n members is due at (k + 1/2) / n of the way, so that classes of any size advance in step.
    due = torch.empty(len(labels), dtype=torch.float64)
    due[by_class] = (torch.arange(len(labels), dtype=torch.float64) - first + 0.5) / counts.repeat_interleave(counts)
    return shuffled[torch.argsort(due, stable=True)]


def hold_out(data: LabeledImages, fraction: float, seed: int) -> tuple[LabeledImages, LabeledImages]:
    """Split off a stratified share.

    Args:
        data: what to split.
        fraction: the share that is held out, rounded to a number of images.
        seed: which images are chosen.

    Returns:
        The rest, then the share held out. Both are in an order in which every prefix is stratified too.
    """
    order = stratified_order(data.labels, seed)
    count = round(len(data) * fraction)
    return data.take(order[count:]), data.take(order[:count])
