"""CIFAR-10, from torchvision's files or from JPEG or PNG images in a folder or a zip file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import torch
import torchvision

from lq.data.cache import default_cache_dir, read_cached
from lq.data.image_tree import ImageTree, open_image_tree
from lq.data.in_memory import InMemoryDataModule
from lq.data.splits import ImageData, LabeledImages
from lq.errors import DatasetNotFoundError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The folder that torchvision unpacks into.
_BATCHES = torchvision.datasets.CIFAR10.base_folder


class CIFAR10(InMemoryDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32 by 32, of ten classes.

    Decoded images are kept in memory (184 MB) and, for images in a folder or a zip file, on disk for the next run.

    Args:
        data_dir: one of

            - a folder that holds ``cifar-10-batches-py``, the files that torchvision reads and ``download`` fetches;
            - a folder with ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (or ``.jpeg``, ``.png``);
            - a zip file of such a folder.

            ``train`` and ``test`` may lie in one folder inside it. Classes are numbered by their sorted names.
        batch_size: images per batch and process.
        num_workers: loader processes; batches are made so fast that 0 (none) is nearly always best.
        download: fetch the files into ``data_dir`` if there is no data set.
        val_fraction: share of the training split to validate on, the same share of every class. With 0 the **test
            split is the validation split** too: fine for fixed recipes, not for choosing among them.
        augment: random crops (4 pixels) and horizontal flips of train batches.
        seed: which images are held out or kept by a limit. Shuffling and augmentation follow ``seed_everything``.
        max_train: keep only so many training images (stratified), for a quick try; None keeps all.
        max_test: the same for the test split.
        cache_dir: folder for decoded images; None for ``$XDG_CACHE_HOME/lq`` or ``~/.cache/lq``.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> data = CIFAR10("data", batch_size=256, val_fraction=0.1)
        >>> data.num_classes, data.input_shape
        (10, (3, 32, 32))
    """

    mean: ClassVar[tuple[float, float, float]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[tuple[float, float, float]] = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 128,
        num_workers: int = 0,
        download: bool = False,
        val_fraction: float = 0.0,
        augment: bool = True,
        seed: int = 0,
        max_train: int | None = None,
        max_test: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, augment, seed, max_train, max_test)
        self.data_dir = data_dir
        self.download = download
        self.cache_dir = cache_dir
        self._tree: ImageTree | None = None

    # Lightning declares a plain attribute; here it depends on what is found at data_dir, perhaps after a download.
    @property
    def name(self) -> str:  # type: ignore[override]
        """``CIFAR-10``, or ``CIFAR-10 (images)`` where the data are not the original arrays (JPEG changes pixels)."""
        return "CIFAR-10" if self._find_tree() is None else "CIFAR-10 (images)"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label: CIFAR-10's, or those of the folders of images."""
        tree = self._find_tree()
        return CLASS_NAMES if tree is None else tree.class_names

    def prepare_data(self) -> None:
        """Download if asked to. Runs in one process of each machine, which also decodes images for the others."""
        if self.download and not self._is_there():
            self._download()
        self.setup()

    def load(self) -> ImageData:
        """Read both splits.

        Raises:
            DatasetNotFoundError: where ``data_dir`` holds none of the accepted forms.
            ValueError: where an image cannot be read, or the classes of train and test differ.
        """
        if (self._root / _BATCHES).is_dir():
            return self._read_batches()
        tree = self._find_tree()
        if tree is None:
            raise self._not_found("holds no data set" if self._root.exists() else "does not exist")
        return read_cached(tree, Path(self.cache_dir) if self.cache_dir is not None else default_cache_dir())

    @property
    def _root(self) -> Path:
        return Path(self.data_dir).expanduser()

    def _is_there(self) -> bool:
        return (self._root / _BATCHES).is_dir() or self._find_tree() is not None

    def _find_tree(self) -> ImageTree | None:
        # Listed once: 60,000 entries take half a second. A missing data set is not remembered, since one may be added.
        if self._tree is None and self._root.exists() and not (self._root / _BATCHES).is_dir():
            self._tree = open_image_tree(self._root)
        return self._tree

    def _download(self) -> None:
        try:
            torchvision.datasets.CIFAR10(self._root, download=True)
        except (OSError, RuntimeError) as error:
            raise self._not_found(f"has no data set and downloading it failed ({error})") from error

    def _read_batches(self) -> ImageData:
        try:
            with warnings.catch_warnings():
                # The files were pickled by a numpy so old that its successors warn about how a dtype is written.
                warnings.filterwarnings("ignore", message=r".*align should be passed", category=Warning)
                train, test = (torchvision.datasets.CIFAR10(self._root, train=is_train) for is_train in (True, False))
        except RuntimeError as error:
            # torchvision checks MD5 sums before it unpickles anything.
            raise self._not_found(f"holds a damaged {_BATCHES} ({error})") from error
        return ImageData(_labeled(train), _labeled(test), CLASS_NAMES)

    def _not_found(self, problem: str) -> DatasetNotFoundError:
        return DatasetNotFoundError(
            f"data_dir={self.data_dir!r} {problem}. It can be (a) a folder that holds {_BATCHES}, (b) a folder with "
            f"train/CLASS/*.jpg and test/CLASS/*.jpg, or (c) a zip file of such a folder. To fetch the data set into "
            f"it: CIFAR10({self.data_dir!r}, download=True)"
        )


def _labeled(split: torchvision.datasets.CIFAR10) -> LabeledImages:
    # torchvision keeps (N, H, W, C).
    images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
    return LabeledImages(images, torch.tensor(split.targets, dtype=torch.int64))
