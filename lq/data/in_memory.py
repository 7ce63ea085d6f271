"""Image classification data that fit in memory: the data set, its loaders, and the data module around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lq.data.splits import ImageData, LabeledImages, hold_out, stratified_order
from lq.data.transforms import normalize, random_crop_flip

Batch = tuple[Tensor, Tensor]


class InMemoryDataset(Dataset[Batch]):
    """Bytes in, augmented and normalised float batches out.

    A loader of it fetches a batch with one call of ``__getitems__``, which does the work on the batch as a whole, and
    must not collate again: give it ``collate_fn=ready_batch``. An augmented batch of 128 images takes about 2 ms on one
    CPU core that way; torchvision's transforms on one PIL image after another take 35 ms.

    Args:
        data: images, uint8, ``(N, C, H, W)``, and labels.
        mean: one value per channel, for images in [0, 1].
        std: one value per channel, for images in [0, 1].
        augment: draw random crops and flips, from torch's default generator.
        flip: whether augmentation mirrors half of the images.

    Example:
        >>> data = LabeledImages(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.arange(6))
        >>> dataset = InMemoryDataset(data, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> images, labels = next(iter(DataLoader(dataset, batch_size=4, collate_fn=ready_batch)))
        >>> images.shape, images.dtype, labels.tolist()
        (torch.Size([4, 3, 32, 32]), torch.float32, [0, 1, 2, 3])
    """

    def __init__(
        self,
        data: LabeledImages,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = True,
    ) -> None:
        self.data = data
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.augment = augment
        self.flip = flip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self.data.take(torch.as_tensor(indices))
        images = random_crop_flip(batch.images, flip=self.flip) if self.augment else batch.images
        return normalize(images, self.mean, self.std), batch.labels


def ready_batch(batch: Any) -> Any:
    """A ``collate_fn`` for a data set whose ``__getitems__`` returns whole batches: there is nothing left to do."""
    return batch


class InMemoryDataModule(LightningDataModule):
    """Base of the data modules: subclasses say where the bytes come from, in :meth:`load`.

    A train batch is shuffled and, with ``augment``, cropped and flipped at random; all batches are float32 images
    ``(N, *input_shape)`` with the mean and standard deviation of the data set taken out, and int64 labels ``(N,)``.
    Prediction runs over the test split.

    Args:
        batch_size: images per batch and process.
        num_workers: loader processes; batches are made so fast that 0 (none) is nearly always best.
        val_fraction: share of the training split to validate on, the same share of every class. With 0 the **test
            split is the validation split** too: fine for fixed recipes, not for choosing among them.
        augment: random crops (4 pixels) and horizontal flips of train batches.
        seed: which images are held out or kept by a limit. Shuffling and augmentation follow ``seed_everything``.
        max_train: keep only so many training images (stratified), for a quick try; None keeps all.
        max_test: the same for the test split.

    Raises:
        ValueError: where an argument is out of its range.
    """

    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    input_shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    #: Whether a mirrored image still belongs to its class.
    flip: ClassVar[bool] = True

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        augment: bool = True,
        seed: int = 0,
        max_train: int | None = None,
        max_test: int | None = None,
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("num_workers", num_workers, 0)
        at_least("seed", seed, 0)
        for limit, value in (("max_train", max_train), ("max_test", max_test)):
            if value is not None:
                at_least(limit, value, 1)
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction={val_fraction!r} must be in [0, 1); 0 validates on the test split")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.augment = augment
        self.seed = seed
        self.max_train = max_train
        self.max_test = max_test
        self._splits: dict[str, LabeledImages] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        raise NotImplementedError

    @property
    def classes(self) -> tuple[str, ...]:
        """As ``class_names``, under the name where exported files look for their labels."""
        return self.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def load(self) -> ImageData:
        """Read or make both splits."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once for all stages."""
        if self._splits is None:
            self._splits = self._split(self.load())

    def train_dataloader(self) -> DataLoader[Batch]:
        train = self._split_named("train")
        drop_last = drops_last(self, len(train), self.batch_size)
        return self._loader(train, augment=self.augment, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._split_named("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._split_named("test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._split_named("test"))

    def _split(self, data: ImageData) -> dict[str, LabeledImages]:
        train, test = data.train, data.test
        if self.max_test is not None:
            test = test.take(stratified_order(test.labels, self.seed)[: self.max_test])
        val = test
        if self.val_fraction > 0 or self.max_train is not None:
            train, held_out = hold_out(train, self.val_fraction, self.seed)
            if self.val_fraction > 0:
                val = held_out
            if not len(val) or not len(train):
                raise ValueError(
                    f"val_fraction={self.val_fraction} of {len(data.train)} training images leaves {len(train)} to "
                    f"train on and {len(val)} to validate on; choose it so that both are at least 1"
                )
        if self.max_train is not None:
            train = LabeledImages(train.images[: self.max_train], train.labels[: self.max_train])
        return {"train": train, "val": val, "test": test}

    def _split_named(self, split: str) -> LabeledImages:
        # Works without a Trainer as well, where nobody calls setup.
        self.setup()
        assert self._splits is not None
        return self._splits[split]

    def _loader(
        self, data: LabeledImages, augment: bool = False, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Batch]:
        return DataLoader(
            InMemoryDataset(data, self.mean, self.std, augment, self.flip),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=ready_batch,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
        )


def drops_last(module: LightningDataModule, count: int, batch_size: int) -> bool:
    """Whether training on ``count`` images leaves out the last, ragged batch.

    Such batches make steps of unequal weight and, at one image, break batch norm; but a process must be left with at
    least one batch.
    """
    processes = 1 if module.trainer is None else module.trainer.world_size
    return count >= batch_size * processes


def at_least(argument: str, value: int, low: int) -> None:
    """Raise ValueError where ``value`` is below ``low``."""
    if value < low:
        raise ValueError(f"{argument}={value!r} must be an integer of at least {low}")
