"""ImageNet, or any images in its folders, read while training."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lq.data.image_folder import ImageFolderDataset, check_image_folder, list_images
from lq.data.in_memory import Batch, at_least, drops_last, ready_batch
from lq.data.splits import stratified_order


class ImageNet(LightningDataModule):
    """Images in ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``, of any sizes and any number of classes.

    Classes are numbered by the sorted names of their folders, which for ImageNet's own (``n01440764`` and so on) is
    the order that torchvision's networks were trained with. Batches are float32 images ``(N, 3, H, W)``, normalised,
    and int64 labels ``(N,)``. ImageNet publishes no labels of its test split: validation, test and prediction all run
    over ``val``, so do not choose among models by it.

    For evaluation, images are resized and cropped as torchvision does it for the weights that are named. Train images
    are cropped at random, in place, size and shape, and half of them are flipped, as torchvision's references do.

    Args:
        data_dir: the folder that holds ``train`` and ``val``. There is no download: the licence of ImageNet asks for a
            registration.
        batch_size: images per batch and process.
        num_workers: processes that decode; None for one on each core that this process may use, shared among the
            Trainer's processes on the machine.
        augment: random crops and flips of train batches; otherwise they are resized and cropped as for evaluation.
        weights: pretrained weights of a torchvision classifier whose sizes, interpolation, mean and standard deviation
            are used; they are not loaded. By default 224x224, the middle of an image whose shorter side is 256, with
            ImageNet's mean and standard deviation.

    Raises:
        DatasetNotFoundError: where ``data_dir``, ``train`` or ``val`` is not there.
        ValueError: where a split has no class folders, the splits differ in their classes, a class has no image, or
            another argument is out of its range.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        ...     Path(folder.name, name).mkdir(parents=True)
        ...     Image.new("RGB", (500, 375)).save(Path(folder.name, name, "0.JPEG"))
        >>> data = ImageNet(folder.name, batch_size=2, num_workers=0)
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> data.class_names, images.shape, labels.tolist()
        (('cat', 'dog'), torch.Size([2, 3, 224, 224]), [0, 1])
        >>> folder.cleanup()
    """

    name: str = "ImageNet"

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 64,
        num_workers: int | None = None,
        augment: bool = True,
        weights: str = "ResNet18_Weights.IMAGENET1K_V1",
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        if num_workers is not None:
            at_least("num_workers", num_workers, 0)
        preset = _preset(weights)
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.weights = weights
        self.mean: tuple[float, ...] = tuple(preset.mean)
        self.std: tuple[float, ...] = tuple(preset.std)
        side = preset.crop_size[0]
        self.input_shape: tuple[int, int, int] = (3, side, side)
        resize = {"interpolation": preset.interpolation, "antialias": preset.antialias}
        self._evaluation = v2.Compose([v2.Resize(preset.resize_size, **resize), v2.CenterCrop(side)])
        self._training = v2.Compose([v2.RandomResizedCrop(side, **resize), v2.RandomHorizontalFlip()])
        self._class_names = check_image_folder(self._root)
        self._splits: dict[str, ImageFolderDataset] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes' folders, by label."""
        return self._class_names

    @property
    def classes(self) -> tuple[str, ...]:
        """As ``class_names``, under the name where exported files look for their labels."""
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._class_names)

    def setup(self, stage: str | None = None) -> None:
        """List the images, once for all stages."""
        if self._splits is None:
            self._splits = {split: self._dataset(split) for split in ("train", "val")}

    def train_dataloader(self) -> DataLoader[Batch]:
        train = self._split_named("train")
        if self.augment:
            train = replace(train, transform=self._training)
        return self._loader(train, shuffle=True, drop_last=drops_last(self, len(train), self.batch_size))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._split_named("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._split_named("val"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._split_named("val"))

    def calibration_dataloader(self, n: int = 512, seed: int = 0) -> DataLoader[Batch]:
        """Training images as for evaluation, for ``lq.calibrate`` or the callback's ``calibration_dataloader``.

        Args:
            n: how many images; all where there are fewer.
            seed: which ones. The same seed gives the same images in the same order, the classes in the proportions
                that they have in all images.

        Raises:
            ValueError: where an argument is out of its range.
        """
        at_least("n", n, 1)
        at_least("seed", seed, 0)
        train = self._split_named("train")
        chosen = stratified_order(train.labels, seed)[:n]
        return self._loader(replace(train, files=train.files[chosen.numpy()], labels=train.labels[chosen]))

    @property
    def _root(self) -> Path:
        return Path(self.data_dir).expanduser()

    def _dataset(self, split: str) -> ImageFolderDataset:
        files, labels = list_images(self._root / split, self._class_names)
        return ImageFolderDataset(self._root / split, files, labels, self._evaluation, self.mean, self.std)

    def _split_named(self, split: str) -> ImageFolderDataset:
        # Works without a Trainer as well, where nobody calls setup.
        self.setup()
        assert self._splits is not None
        return self._splits[split]

    def _loader(self, dataset: ImageFolderDataset, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Batch]:
        num_workers = self._default_workers() if self.num_workers is None else self.num_workers
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=num_workers,
            collate_fn=ready_batch,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            persistent_workers=num_workers > 0,
        )

    def _default_workers(self) -> int:
        # The affinity is what a container or a cluster leaves of the machine; not every system has one.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return max(cores // processes, 1)


def _preset(weights: str) -> Any:
    """The evaluation transform of pretrained weights, whose attributes say sizes, interpolation and normalisation."""
    try:
        preset = torchvision.models.get_weight(weights).transforms()
    except (ValueError, KeyError, TypeError, AttributeError):
        preset = None
    # The class of all classifiers' transforms; those of detection, segmentation and video are others.
    if isinstance(preset, type(torchvision.models.ResNet18_Weights.DEFAULT.transforms())):
        return preset
    names = [
        str(choice)
        for model in torchvision.models.list_models(module=torchvision.models)
        for choice in torchvision.models.get_model_weights(model)
    ]
    near = difflib.get_close_matches(str(weights), names)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give it as 'ResNet50_Weights.IMAGENET1K_V2'."
    raise ValueError(f"weights={weights!r} does not belong to a classifier of torchvision; {hint}")
