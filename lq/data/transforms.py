"""Augmentation and normalisation of whole batches: one indexing operation instead of one transform per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_flip(
    images: Tensor, padding: int = 4, generator: torch.Generator | None = None, flip: bool = True
) -> Tensor:
    """Shift every image by up to ``padding`` pixels each way, zeros moving in, and mirror half of them.

    The same distribution as ``RandomCrop(size, padding=padding)`` and ``RandomHorizontalFlip()`` of torchvision, with
    independent draws for every image.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        padding: largest shift in pixels.
        generator: source of randomness; the default generator where None.
        flip: whether to mirror, which is wrong for text and digits.

    Returns:
        A new tensor of the shape and dtype of ``images``.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    padded = F.pad(images, (padding, padding, padding, padding))
    # (N, C, 2p+1, 2p+1, H, W): a view of every possible crop, of which the indexing copies one per image.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(count), :, top, left]
    if not flip:
        return crops
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), crops.flip(3), crops)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std`` per channel.

    Args:
        images: uint8, ``(N, C, H, W)``.
        mean: one value per channel, for images in [0, 1].
        std: one value per channel, for images in [0, 1].

    Returns:
        float32, ``(N, C, H, W)``.
    """
    # In the scale of the bytes, so that two passes over the batch do what three would.
    offset = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) * 255
    scale = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1) * 255
    return images.float().sub_(offset).div_(scale)
