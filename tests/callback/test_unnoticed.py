"""Training notices nothing of what is looked at before it: it reads and computes what it would have without lq."""

from __future__ import annotations

import random
import warnings
from collections import UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, default_collate

from helpers.classifiers import Wrapped, images
from helpers.fits import fit, quantization

X, Y = images(48)


class OwnGenerators(Dataset[Any]):
    """Augments with generators of its own, numpy's old and new and Python's, some of them in a list of transforms."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.transforms = [_Flip(random.Random(0)), _Flip(np.random.RandomState(0))]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = X[index] * (0.5 + self.rng.random())
        for transform in self.transforms:
            x = transform(x)
        return x, Y[index]


class _Flip:
    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, x: Tensor) -> Tensor:
        return (
            x.flip(-1) if (self.rng.random() if isinstance(self.rng, random.Random) else self.rng.rand()) < 0.5 else x
        )


class CountsItsEpochs(IterableDataset[Any]):
    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for index in torch.randperm(len(X), generator=torch.Generator().manual_seed(self.epoch)):
            yield X[index], Y[index]


class ShufflesInPlace(Sampler[int]):
    """Each epoch's order is a shuffle of the last one's."""

    def __init__(self, order: Any) -> None:
        self.order = order
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        order = self.order.numpy() if isinstance(self.order, Tensor) else self.order
        self.rng.shuffle(order)
        return iter([int(index) for index in order])


class Data(LightningDataModule):
    """Makes a loader, and splits the data, each time that it is asked."""

    def train_dataloader(self) -> Any:
        part, _ = torch.utils.data.random_split(TensorDataset(X, Y), [32, 16])
        return DataLoader(part, 8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), 8, shuffle=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), 16, shuffle=True),
    "workers": lambda: DataLoader(TensorDataset(X, Y), 16, shuffle=True, num_workers=1),
    "workers that stay": lambda: DataLoader(
        TensorDataset(X, Y), 16, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "a generator": lambda: DataLoader(
        TensorDataset(X, Y), 16, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "generators of the data": lambda: DataLoader(OwnGenerators(), 16),
    "counted epochs": lambda: DataLoader(CountsItsEpochs(), 16),
    "a list shuffled in place": lambda: DataLoader(TensorDataset(X, Y), 16, sampler=ShufflesInPlace(list(range(48)))),
    "an array shuffled in place": lambda: DataLoader(TensorDataset(X, Y), 16, sampler=ShufflesInPlace(np.arange(48))),
    "a tensor shuffled in place": lambda: DataLoader(
        TensorDataset(X, Y), 16, sampler=ShufflesInPlace(torch.arange(48))
    ),
    "several": lambda: [LOADERS["shuffled"](), LOADERS["generators of the data"]()],
    "combined": lambda: CombinedLoader({"a": LOADERS["shuffled"](), "b": LOADERS["counted epochs"]()}, "min_size"),
    "a datamodule": Data,
}


class Trained(Wrapped):
    """Keeps its weights and the state of the generators as they are when training has ended."""

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, dict) or isinstance(batch[0], (tuple, list)):
            first, second = batch.values() if isinstance(batch, dict) else batch
            return self(first[0] + second[0][: len(first[0])]), first[1]
        return super().logits(batch)

    def on_train_end(self) -> None:
        self.ended = {name: value.clone() for name, value in self.state_dict().items()}
        self.drawn = (torch.rand(1).item(), random.random(), np.random.rand())


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("name", list(LOADERS))
def test_training_is_what_it_would_have_been(name: str, tmp_path: Path) -> None:
    trained = []
    for callback in (None, quantization(tmp_path, rehearse=True, evaluate=False, calibrator="minmax", export=[])):
        seed_everything(3, verbose=False)
        model, data = Trained(), LOADERS[name]()
        validation = [] if isinstance(data, LightningDataModule) else [LOADERS["shuffled"]()]
        fit(model, tmp_path, callback, data=data, validation=validation)
        trained.append(model)
    without, with_lq = trained
    assert all(torch.equal(value, with_lq.ended[key]) for key, value in without.ended.items())
    assert without.drawn == with_lq.drawn


@pytest.mark.parametrize("name", ["combined", "several"])
def test_fake_quantizers_take_combined_batches(name: str, tmp_path: Path) -> None:
    callback = quantization(tmp_path, mode="qat", rehearse=True, export=[], evaluate=False)
    fit(Trained(), tmp_path, callback, data=LOADERS[name]())
    assert callback.result is not None


class Proxy:
    """Answers whatever it is asked for with an exception of its own."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError(name)


class Labelled(Dataset[Any]):
    """Labels in a file that cannot be written to, images that are read when they are asked for, and a remote object."""

    def __init__(self, folder: Path) -> None:
        np.save(folder / "labels.npy", Y.numpy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.labels = torch.from_numpy(np.load(folder / "labels.npy", mmap_mode="r"))
        for index in range(16):
            Image.fromarray(np.full((8, 8, 3), index * 10, np.uint8)).save(folder / f"{index}.png")
        self.images = [Image.open(folder / f"{index}.png") for index in range(16)]
        self.proxy = Proxy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1) / 255, self.labels[index]


def test_what_cannot_be_put_back_is_left_alone(tmp_path: Path) -> None:
    data = Labelled(tmp_path)
    callback = quantization(tmp_path, rehearse=True, evaluate=False, calibrator="minmax", export=[])
    fit(Wrapped(), tmp_path, callback, data=DataLoader(data, 8))
    assert callback.result is not None and torch.equal(data.labels, Y)


class Collates:
    """State in all the places that code puts it in."""

    def __init__(self) -> None:
        self.recent: deque[int] = deque(maxlen=3)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.rng = random.Random(1)
        self.set: set[int] = set()

    def collate(self, samples: list[Any], noise: random.Random) -> Any:
        self.counts["calls"] += 1
        self.recent.append(self.counts["calls"])
        self.set.add(len(self.set))
        shift = sum(self.recent) + len(self.set) + self.rng.random() + noise.random()
        x, y = default_collate(samples)
        return x + shift, y


def test_state_in_what_a_loader_calls(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []
    for callback in (None, quantization(tmp_path, rehearse=True, evaluate=False, calibrator="minmax", export=[])):
        collates = Collates()
        noise = random.Random(2)
        batches: list[Tensor] = []

        class Kept(Wrapped):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                batches.append(batch[0].clone())  # noqa: B023

        data = DataLoader(TensorDataset(X, Y), 16, collate_fn=partial(collates.collate, noise=noise))
        fit(Kept(), tmp_path, callback, data=data)
        seen.append(batches)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.support("Training", "Several validation dataloaders")
def test_several_validation_sets(tmp_path: Path) -> None:
    class Several(Wrapped):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    loaders = [DataLoader(TensorDataset(X[:count], Y[:count]), 16) for count in (32, 48)]
    callback = quantization(tmp_path, rehearse=True, evaluate=True, analyze=True, export=[])
    fit(Several(), tmp_path, callback, data=LOADERS["shuffled"](), validation=[loaders])
    assert callback.result is not None
    assert callback.result.settings["validation data"] == "TensorDataset, 32 samples; TensorDataset, 48 samples"
    assert {"val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1"} <= set(callback.result.float_side.metrics)


def test_calibration_batches_in_containers_of_ones_own(tmp_path: Path) -> None:
    class Keyed(Wrapped):
        def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
            return (self(batch["x"]), batch["y"]) if isinstance(batch, UserDict) else super().logits(batch)

    batches = [UserDict(x=X[:16], y=Y[:16]), UserDict(x=X[16:32], y=Y[16:32])]
    callback = quantization(tmp_path, rehearse=True, evaluate=False, export=[], calibration_dataloader=batches)
    fit(Keyed(), tmp_path, callback)
    assert callback.result is not None
