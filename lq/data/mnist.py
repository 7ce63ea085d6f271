"""MNIST and Fashion-MNIST: grey images, from the IDX files that both are published as."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torchvision

from lq.data.idx import find_idx, read_idx
from lq.data.in_memory import InMemoryDataModule
from lq.data.splits import ImageData, LabeledImages
from lq.errors import DatasetNotFoundError

_SIDE = 28
_PREFIXES = ("train", "t10k")
_FILES = tuple(f"{prefix}-{part}-ubyte" for prefix in _PREFIXES for part in ("images-idx3", "labels-idx1"))


class MNIST(InMemoryDataModule):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, grey, 28 by 28.

    Images are kept in memory (55 MB), as ``(N, 1, 28, 28)``.

    Args:
        data_dir: a folder with the four files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each as it is or as ``.gz``: in ``MNIST/raw``,
            where torchvision keeps them and ``download`` puts them, or in the folder itself.
        batch_size: images per batch and process.
        num_workers: loader processes; batches are made so fast that 0 (none) is nearly always best.
        download: fetch the files into ``data_dir`` if there is no data set.
        val_fraction: share of the training split to validate on, the same share of every class. With 0 the **test
            split is the validation split** too: fine for fixed recipes, not for choosing among them.
        augment: random crops (4 pixels) of train batches, and no flips: a mirrored digit is not a digit.
        seed: which images are held out or kept by a limit. Shuffling and augmentation follow ``seed_everything``.
        max_train: keep only so many training images (stratified), for a quick try; None keeps all.
        max_test: the same for the test split.

    Raises:
        ValueError: where an argument is out of its range.

    Example:
        >>> data = MNIST("data", batch_size=256)
        >>> data.num_classes, data.input_shape
        (10, (1, 28, 28))
    """

    name: str = "MNIST"
    mean: ClassVar[tuple[float, ...]] = (0.1307,)
    std: ClassVar[tuple[float, ...]] = (0.3081,)
    input_shape: ClassVar[tuple[int, int, int]] = (1, _SIDE, _SIDE)
    flip: ClassVar[bool] = False

    _class_names: ClassVar[tuple[str, ...]] = tuple("0123456789")
    _source: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.MNIST

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
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, augment, seed, max_train, max_test)
        self.data_dir = data_dir
        self.download = download

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self._class_names

    def prepare_data(self) -> None:
        """Download if asked to. Runs in one process of each machine."""
        if self.download and self._folder() is None:
            try:
                self._source(self._root, download=True)
            except (OSError, RuntimeError) as error:
                raise self._not_found(f"has no data set and downloading it failed ({error})") from error
        self.setup()

    def load(self) -> ImageData:
        """Read both splits.

        Raises:
            DatasetNotFoundError: where ``data_dir`` lacks one of the files.
            ValueError: where a file is damaged or does not fit the others, naming it.
        """
        folder = self._folder()
        if folder is None:
            raise self._not_found(self._problem())
        train, test = (self._read(folder, prefix) for prefix in _PREFIXES)
        return ImageData(train, test, self.class_names)

    @property
    def _root(self) -> Path:
        return Path(self.data_dir).expanduser()

    @property
    def _raw(self) -> Path:
        return self._root / self._source.__name__ / "raw"

    def _folder(self) -> Path | None:
        """Where all files are."""
        return next((folder for folder in (self._raw, self._root) if not _missing(folder)), None)

    def _problem(self) -> str:
        if not self._root.exists():
            return "does not exist"
        missing = min((_missing(folder) for folder in (self._raw, self._root)), key=len)
        return "holds no data set" if len(missing) == len(_FILES) else f"lacks {', '.join(missing)}"

    def _read(self, folder: Path, prefix: str) -> LabeledImages:
        images_path, labels_path = (find_idx(folder, name) for name in _FILES if name.startswith(prefix))
        assert images_path is not None and labels_path is not None
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if images.shape[1:] != (_SIDE, _SIDE):
            raise ValueError(f"{images_path} has images of {images.shape[2]}x{images.shape[1]} pixels and not 28x28")
        if len(images) != len(labels):
            raise ValueError(f"{images_path} has {len(images)} images and {labels_path} {len(labels)} labels")
        if labels.max() >= self.num_classes:
            raise ValueError(f"{labels_path} has the label {labels.max()}; {self.name} has 0 to {self.num_classes - 1}")
        return LabeledImages(images[:, None], labels.to(torch.int64))

    def _not_found(self, problem: str) -> DatasetNotFoundError:
        return DatasetNotFoundError(
            f"data_dir={self.data_dir!r} {problem}. It must hold {', '.join(_FILES)}, each as it is or as .gz, in "
            f"{self._source.__name__}/raw or itself. To fetch the data set into it: "
            f"{type(self).__name__}({self.data_dir!r}, download=True)"
        )


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes in MNIST's format (Xiao et al. 2017).

    The arguments are those of :class:`MNIST`, with ``FashionMNIST/raw`` where it has ``MNIST/raw``. Train batches are
    flipped, too. In the folder itself the files of both data sets have the same names, and are taken for this one's.

    Example:
        >>> FashionMNIST("data").class_names[:3]
        ('T-shirt/top', 'Trouser', 'Pullover')
    """

    name: str = "Fashion-MNIST"
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    std: ClassVar[tuple[float, ...]] = (0.3530,)
    flip: ClassVar[bool] = True

    _class_names: ClassVar[tuple[str, ...]] = tuple(torchvision.datasets.FashionMNIST.classes)
    _source: ClassVar[type[torchvision.datasets.MNIST]] = torchvision.datasets.FashionMNIST


def _missing(folder: Path) -> list[str]:
    return [name for name in _FILES if find_idx(folder, name) is None]
