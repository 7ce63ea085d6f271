"""A built-in data set, so that everything runs without a file or a network."""

from __future__ import annotations

from typing import ClassVar

import torch

from lq.data.in_memory import InMemoryDataModule
from lq.data.shapes import SHAPES, generate
from lq.data.splits import ImageData, LabeledImages

_TRAIN_STREAM, _TEST_STREAM = 0, 1


class Shapes10(InMemoryDataModule):
    """Ten kinds of shapes on clutter, 32 by 32 in colour, drawn from a seed when first needed.

    Shapes are turned, stretched, scaled and moved; they and their background carry textures; scraps of other shapes,
    an occluding band, noise and low contrast make them hard to tell apart. torchvision's ``resnet18(num_classes=10)``
    ends at 90.9 % of the test images (one run) after 3 epochs of batch 128, which is 300 steps, with SGD (Nesterov
    momentum 0.9, weight decay 5e-4) on a one-cycle schedule that peaks at 0.05.

    A seed gives the same bytes on every run; sines differ in their last bit between kinds of CPU, which can move single
    pixels by one.

    Args:
        train_size: number of training images; a smaller set is a prefix of a larger one.
        test_size: number of test images.
        batch_size: images per batch and process.
        num_workers: loader processes; batches are made so fast that 0 (none) is nearly always best.
        val_fraction: share of the training split to validate on, the same share of every class. With 0 the **test
            split is the validation split** too: fine for fixed recipes, not for choosing among them.
        augment: random crops (4 pixels) and horizontal flips of train batches.
        seed: of the images, and of which of them are held out. Shuffling and augmentation follow ``seed_everything``.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> data = Shapes10(train_size=100, test_size=20, batch_size=10)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.class_names[:3]
        (torch.Size([10, 3, 32, 32]), ('bars', 'chevron', 'crescent'))
    """

    name: str = "Shapes10"
    mean: ClassVar[tuple[float, float, float]] = (0.3593, 0.3593, 0.3593)
    std: ClassVar[tuple[float, float, float]] = (0.1593, 0.1593, 0.1593)

    def __init__(
        self,
        train_size: int = 12_800,
        test_size: int = 4_000,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, augment, seed)
        for argument, value in (("train_size", train_size), ("test_size", test_size)):
            if value < 1:
                raise ValueError(f"{argument}={value!r} must be an integer of at least 1")
        self.train_size = train_size
        self.test_size = test_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(SHAPES)

    def load(self) -> ImageData:
        """Draw both splits, from random streams of their own."""
        train, test = (
            LabeledImages(*map(torch.from_numpy, generate(size, self.seed, stream)))
            for size, stream in ((self.train_size, _TRAIN_STREAM), (self.test_size, _TEST_STREAM))
        )
        return ImageData(train, test, self.class_names)
