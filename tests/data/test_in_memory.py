"""The loaders and the data module, alone and under a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, Subset

from helpers.image_files import tree, write_zip
from helpers.small_trainer import labels_of, small_trainer
from lq.data import CIFAR10, InMemoryDataset, Shapes10
from lq.data.in_memory import InMemoryDataModule, ready_batch
from lq.data.splits import ImageData, LabeledImages


def numbered(count: int, **options: Any) -> InMemoryDataset:
    """Image ``i`` holds the byte ``i`` and has the label ``i``; normalisation gives back the byte."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    unit = (1 / 255,) * 3
    return InMemoryDataset(LabeledImages(images, torch.arange(count)), (0.0,) * 3, unit, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_keep_their_labels(num_workers: int) -> None:
    loader = DataLoader(numbered(10), batch_size=4, shuffle=True, collate_fn=ready_batch, num_workers=num_workers)
    for images, labels in loader:
        torch.testing.assert_close(images, labels.view(-1, 1, 1, 1).float().expand_as(images))
    assert sorted(labels_of(loader)) == list(range(10))


def test_single_items_and_subsets() -> None:
    image, label = numbered(5)[3]
    assert image.shape == (3, 8, 8) and label == 3 and label.shape == ()
    subset = Subset(numbered(5), [4, 1])
    assert labels_of(DataLoader(subset, batch_size=2, collate_fn=ready_batch)) == [4, 1]


def test_distributed_samplers_share_the_images_out() -> None:
    dataset = numbered(10)
    parts = [
        labels_of(
            DataLoader(dataset, 3, sampler=DistributedSampler(dataset, num_replicas=2, rank=r), collate_fn=ready_batch)
        )
        for r in (0, 1)
    ]
    assert sorted(parts[0] + parts[1]) == list(range(10))


def test_augmentation_follows_the_seed() -> None:
    dataset = numbered(8, augment=True)

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in DataLoader(dataset, 4, shuffle=True, collate_fn=ready_batch)])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_only_training_is_augmented_and_shuffled() -> None:
    data = Shapes10(train_size=40, test_size=20, batch_size=10)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    assert [loader.dataset.augment for loader in loaders] == [True, False, False, False]
    assert [isinstance(loader.sampler, SequentialSampler) for loader in loaders] == [False, True, True, True]
    assert not Shapes10(train_size=40, test_size=20, augment=False).train_dataloader().dataset.augment


def test_batches_are_normalised() -> None:
    data = Shapes10(train_size=1000, test_size=500, batch_size=500)
    ((images, _),) = data.test_dataloader()
    assert images.mean().abs() < 0.1 and (images.std() - 1).abs() < 0.1


def test_without_a_fraction_the_test_split_validates() -> None:
    data = Shapes10(train_size=40, test_size=20)
    data.setup()
    assert data.val_dataloader().dataset.data is data.test_dataloader().dataset.data


class Numbered(InMemoryDataModule):
    """The smallest data module: 200 training images of ten classes, no two alike, and 20 test images."""

    mean = (0.0,) * 3
    std = (1 / 255,) * 3

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple("abcdefghij")

    def load(self) -> ImageData:
        images = torch.arange(220, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)
        labels = torch.arange(220) % 10
        return ImageData(LabeledImages(images[:200], labels[:200]), LabeledImages(images[200:], labels[200:]), ())


def test_a_held_out_share_is_stratified_and_apart_from_training() -> None:
    def held_out(seed: int) -> list[int]:
        module = Numbered(val_fraction=0.2, seed=seed)
        train, val = module.train_dataloader().dataset.data, module.val_dataloader().dataset.data
        assert torch.bincount(train.labels).tolist() == [16] * 10 and torch.bincount(val.labels).tolist() == [4] * 10
        assert sorted(torch.cat([train.images, val.images])[:, 0, 0, 0].tolist()) == list(range(200))
        return val.images[:, 0, 0, 0].tolist()

    assert held_out(0) == held_out(0) != held_out(1)
    assert len(Numbered().test_dataloader().dataset) == 20


def test_limits_are_stratified(tmp_path: Path) -> None:
    source = str(write_zip(tmp_path / "images.zip", tree(train=8, test=4)))
    data = CIFAR10(source, batch_size=4, val_fraction=0.25, max_train=6, max_test=3)
    sizes = {name: torch.bincount(getattr(data, f"{name}_dataloader")().dataset.data.labels).tolist()
             for name in ("train", "val", "test")}  # fmt: skip
    assert sizes == {"train": [2, 2, 2], "val": [2, 2, 2], "test": [1, 1, 1]}
    # A limit beyond the data keeps all of them.
    assert len(CIFAR10(source, max_train=99, max_test=99).train_dataloader().dataset) == 24


def test_the_last_ragged_batch_is_dropped_but_never_the_only_one() -> None:
    assert len(Shapes10(train_size=50, test_size=10, batch_size=20).train_dataloader()) == 2
    assert len(Shapes10(train_size=50, test_size=10, batch_size=64).train_dataloader()) == 1
    assert len(Shapes10(train_size=50, test_size=30, batch_size=20).test_dataloader()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be an integer of at least 0"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"max_train": 0}, "max_train=0 must be an integer of at least 1"),
        ({"max_test": -5}, "max_test=-5 must be an integer of at least 1"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 must be in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"val_fraction=-0.1 must be in \[0, 1\)"),
        ({"val_fraction": float("nan")}, r"val_fraction=nan must be in \[0, 1\)"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR10("data", **arguments)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_an_empty_part_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction={fraction} of 40 training images leaves"):
        Shapes10(train_size=40, test_size=20, val_fraction=fraction).setup()


class Linear(LightningModule):
    """Counts what it sees in each stage."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, num_classes)
        self.seen = {"train": 0, "val": 0, "test": 0}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self._loss(batch, "train")

    def validation_step(self, batch: Any, index: int) -> None:
        self._loss(batch, "val")

    def test_step(self, batch: Any, index: int) -> None:
        self._loss(batch, "test")

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layer(batch[0].flatten(1))

    def _loss(self, batch: Any, stage: str) -> torch.Tensor:
        images, labels = batch
        self.seen[stage] += len(labels)
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


# Lightning advises more workers; batches made from memory need none.
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*")
@pytest.mark.parametrize("kind", ["cifar10", "shapes10"])
def test_every_stage_of_a_trainer(tmp_path: Path, kind: str) -> None:
    data: InMemoryDataModule
    if kind == "cifar10":
        data = CIFAR10(str(write_zip(tmp_path / "images.zip", tree(train=8, test=4))), batch_size=6, val_fraction=0.25)
    else:
        data = Shapes10(train_size=24, test_size=12, batch_size=6, val_fraction=0.25)
    model = Linear(data.num_classes)
    trainer = small_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    predictions = trainer.predict(model, datamodule=data)
    assert model.seen == {"train": 36, "val": 12, "test": 12}
    assert predictions is not None and sum(len(p) for p in predictions) == 12
