"""Images in folders of classes: what is read, how it is transformed, and what is said where something is wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

import lq
from helpers.image_files import encode, write_folder
from helpers.small_trainer import labels_of, small_trainer
from lq import QuantizationCallback
from lq.data import DatasetNotFoundError, ImageNet
from lq.models import Classifier, build_vgg

CLASSES = ("n01", "n02", "n03")
TRAIN, VAL = 8, 3
# Of ImageNet, to broadcast over images.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photo(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Colours that change smoothly, ``(height, width, 3)``."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def files(suffix: str = ".JPEG") -> dict[str, bytes]:
    format = "PNG" if suffix == ".png" else "JPEG"
    return {
        f"{split}/{name}/{name}_{number}{suffix}": encode(photo(seed=100 * label + number), format)
        for split, count in (("train", TRAIN), ("val", VAL))
        for label, name in enumerate(CLASSES)
        for number in range(count)
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "imagenet", files())


def images_of(loader: DataLoader[Any]) -> Tensor:
    return torch.cat([images for images, _ in loader])


def test_what_is_known_at_once(root: Path) -> None:
    data = ImageNet(str(root))
    assert (data.name, data.num_classes, data.class_names, data.classes) == ("ImageNet", 3, CLASSES, CLASSES)
    assert data.input_shape == (3, 224, 224)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("suffix", [".JPEG", ".jpg", ".png"])
def test_evaluation_is_torchvisions(tmp_path: Path, suffix: str) -> None:
    data = ImageNet(str(write_folder(tmp_path, files(suffix))), batch_size=4, num_workers=0)
    loader = data.val_dataloader()
    images = images_of(loader)
    assert images.shape == (9, 3, 224, 224) and images.dtype == torch.float32
    assert labels_of(loader) == [0] * 3 + [1] * 3 + [2] * 3
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    for image, path in zip(images, sorted((tmp_path / "val").glob("*/*")), strict=True):
        with Image.open(path) as opened:
            expected = preset(opened)
        # Bytes are rounded at other places: at most by one.
        levels = (image - expected).abs() * STD * 255
        assert levels.max() < 1.01 and levels.mean() < 0.1


@pytest.mark.parametrize(
    ("weights", "side", "mean"),
    [
        ("VGG16_Weights.IMAGENET1K_V1", 224, 0.485),
        ("ResNet50_Weights.IMAGENET1K_V2", 224, 0.485),
        ("Inception_V3_Weights.DEFAULT", 299, 0.485),
        ("ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1", 512, 0.485),
        ("EfficientNet_V2_L_Weights.IMAGENET1K_V1", 480, 0.5),
    ],
)
def test_weights_decide_the_transform(root: Path, weights: str, side: int, mean: float) -> None:
    data = ImageNet(str(root), batch_size=1, num_workers=0, weights=weights)
    assert data.input_shape == (3, side, side) and data.mean[0] == mean
    preset = torchvision.models.get_weight(weights).transforms()
    with Image.open(root / "val" / "n01" / "n01_0.JPEG") as image:
        expected = preset(image)
    actual, _ = next(iter(data.val_dataloader()))
    # Bicubic kernels overshoot, and clip, at other places than PIL's.
    assert (actual[0] - expected).abs().mean() < 0.02


def test_training_is_augmented_and_shuffled(root: Path) -> None:
    data = ImageNet(str(root), batch_size=8, num_workers=0)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)
    torch.manual_seed(1)
    one = images_of(loader)
    assert one.shape == (24, 3, 224, 224)
    torch.manual_seed(1)
    assert torch.equal(images_of(loader), one)
    torch.manual_seed(2)
    assert not torch.equal(images_of(loader), one)
    loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    assert all(isinstance(loader.sampler, SequentialSampler) for loader in loaders)


def test_train_crops_come_from_their_image(tmp_path: Path) -> None:
    # Every pixel of an image has its class's colour, wherever it is cropped.
    colours = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250)}
    content = {
        f"{split}/{name}/0.png": encode(np.full((50, 70, 3), colour, dtype=np.uint8))
        for split in ("train", "val")
        for name, colour in colours.items()
    }
    data = ImageNet(str(write_folder(tmp_path, content)), batch_size=3, num_workers=0)
    images, labels = next(iter(data.train_dataloader()))
    pixels = images * STD + MEAN
    assert pixels.mean((2, 3)).argmax(1).tolist() == labels.tolist()
    assert sorted(labels.tolist()) == [0, 1, 2]


def test_without_augmentation_training_sees_what_evaluation_does(root: Path) -> None:
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    data = ImageNet(str(root), batch_size=24, num_workers=0, augment=False)
    (train, train_labels), (val, val_labels) = (next(iter(x)) for x in (data.train_dataloader(), data.val_dataloader()))
    order, expected = (images.mean((1, 2, 3)).argsort() for images in (train, val))
    assert torch.equal(train[order], val[expected])
    assert torch.equal(train_labels[order], val_labels[expected])


def test_the_last_ragged_batch_is_dropped_but_never_the_only_one(root: Path) -> None:
    assert [len(ImageNet(str(root), size, 0).train_dataloader()) for size in (10, 24, 25)] == [2, 1, 1]
    assert len(ImageNet(str(root), 4, 0).val_dataloader()) == 3


def test_calibration_data(root: Path) -> None:
    data = ImageNet(str(root), batch_size=4, num_workers=0)
    loader = data.calibration_dataloader(9, seed=3)
    images = images_of(loader)
    assert torch.bincount(torch.tensor(labels_of(loader))).tolist() == [3, 3, 3]
    assert torch.equal(images_of(data.calibration_dataloader(9, seed=3)), images)
    assert not torch.equal(images_of(data.calibration_dataloader(9, seed=4)), images)
    # Evaluation's transform, of training images.
    data.augment = False
    everything = images_of(data.train_dataloader())
    assert all(any(torch.equal(image, other) for other in everything) for image in images)
    assert len(labels_of(data.calibration_dataloader())) == 24


@pytest.mark.parametrize("argument", [{"n": 0}, {"n": 1, "seed": -1}])
def test_calibration_arguments_are_checked(root: Path, argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(n=0|seed=-1) must be an integer of at least (1|0)"):
        ImageNet(str(root)).calibration_dataloader(**argument)


def test_the_library_calibrates_on_it(root: Path) -> None:
    data = ImageNet(str(root), batch_size=4, num_workers=0)
    network = build_vgg([4, "M", 8], data.num_classes, classifier="cifar", hidden=8).eval()
    lq.prepare(network, torch.zeros(2, *data.input_shape), target="x86_avx2")
    int8 = lq.convert(lq.calibrate(network, data.calibration_dataloader(8)))
    images, _ = next(iter(data.val_dataloader()))
    assert int8(images).shape == (4, 3)


def test_a_fit_with_the_callback(root: Path, tmp_path: Path) -> None:
    data = ImageNet(str(root), batch_size=8, num_workers=0)
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, 3))
    quantization = QuantizationCallback(
        target="x86_avx2",
        calibration_dataloader=data.calibration_dataloader(8),
        output_dir=str(tmp_path / "int8"),
        evaluate=False,
    )
    trainer = small_trainer(tmp_path, quantization)
    trainer.fit(Classifier(network, num_classes=data.num_classes), datamodule=data)
    (metrics,) = trainer.test(trainer.lightning_module, datamodule=data, verbose=False)
    assert metrics["test_loss"] > 0
    # What the exported file knows comes from the folders and the weights' transform.
    run = lq.load(tmp_path / "int8" / "int8.pt2")
    assert run.metadata.labels == CLASSES


def test_workers_decode(root: Path) -> None:
    loader = ImageNet(str(root), batch_size=4, num_workers=1).val_dataloader()
    assert loader.persistent_workers and loader.pin_memory == torch.cuda.is_available()
    images = images_of(loader)
    assert torch.equal(images, images_of(ImageNet(str(root), batch_size=9, num_workers=0).val_dataloader()))
    assert labels_of(loader) == [0] * 3 + [1] * 3 + [2] * 3


def test_one_worker_for_each_core_that_is_left(root: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    data = ImageNet(str(root))
    assert data.val_dataloader().num_workers == cores
    assert data.val_dataloader().persistent_workers
    # Lightning gives a data module its Trainer; one with more processes than cores leaves each a worker.
    data.trainer = SimpleNamespace(num_devices=1000, world_size=1000)  # type: ignore[assignment]
    assert data.val_dataloader().num_workers == 1


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        *(("PNG", mode) for mode in ("L", "LA", "RGBA", "P", "1")),
        ("BMP", "RGB"),
    ],
)
def test_every_kind_of_image_becomes_rgb(root: Path, format: str, mode: str) -> None:
    image = Image.fromarray(photo(0)) if mode == "CMYK" else Image.fromarray(photo(0)).convert("L")
    image.convert(mode).save(root / "val" / "n01" / "n01_0.JPEG", format)
    images, _ = next(iter(ImageNet(str(root), batch_size=2, num_workers=0).val_dataloader()))
    assert images.shape == (2, 3, 224, 224) and images.isfinite().all()
    red, green, blue = images[0] * STD + MEAN
    assert (red - green).abs().max() < 1e-5 if mode != "CMYK" else (red - blue).abs().max() > 0.1


JPEG, PNG = encode(photo(0), "JPEG"), encode(photo(0), "PNG")
DEEP = encode(photo(0)[..., 0].astype(np.uint16) * 256, "PNG")
MIDDLE = len(PNG) // 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        JPEG[:3],
        JPEG[: len(JPEG) // 2],
        JPEG[:-2],
        PNG[:60],
        PNG[:MIDDLE],
        # torchvision's own decoder ends the process here.
        PNG[:MIDDLE] + bytes([PNG[MIDDLE] ^ 255]) + PNG[MIDDLE + 1 :],
        DEEP,
    ],
    ids=["empty", "text", "JPEG start", "JPEG half", "JPEG cut", "PNG start", "PNG half", "PNG flipped", "16 bits"],
)
def test_a_damaged_image_is_named(root: Path, content: bytes) -> None:
    (root / "val" / "n02" / "n02_1.JPEG").write_bytes(content)
    data = ImageNet(str(root), num_workers=0)
    with pytest.raises(ValueError, match=r"cannot read the image .*val.n02.n02_1\.JPEG: .*; repair or remove it"):
        next(iter(data.val_dataloader()))


def test_an_image_that_vanished_is_named(root: Path) -> None:
    data = ImageNet(str(root), num_workers=0)
    data.setup()
    (root / "val" / "n02" / "n02_1.JPEG").unlink()
    with pytest.raises(ValueError, match=r"cannot read the image .*n02_1\.JPEG.*No such file"):
        next(iter(data.val_dataloader()))


def test_what_systems_add_is_not_read(root: Path) -> None:
    extra = ("train/n01/._n01_0.JPEG", "val/n02/.DS_Store", "val/n03/notes.txt", "val/loose.JPEG", "devkit.tar.gz")
    write_folder(root, dict.fromkeys([*extra, "train/.ipynb_checkpoints/0.JPEG"], b""))
    data = ImageNet(str(root), num_workers=0)
    data.setup()
    assert data.class_names == CLASSES
    assert len(data.train_dataloader().dataset) == 24 and len(data.val_dataloader().dataset) == 9  # type: ignore[arg-type]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"missing' does not exist\. It must hold train/CLASS/\*\.JPEG"):
        ImageNet(str(tmp_path / "missing"))
    with pytest.raises(DatasetNotFoundError, match=r"has no folder train and no folder val; it holds nothing\."):
        ImageNet(str(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetNotFoundError, match=r"file' is a file\. It must hold"):
        ImageNet(str(tmp_path / "file"))


def test_a_missing_split_is_named_and_what_is_there_instead(root: Path) -> None:
    (root / "val").rename(root / "validation")
    with pytest.raises(DatasetNotFoundError, match=r"has no folder val; it holds train, validation\."):
        ImageNet(str(root))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flat_folder(root: Path, split: str) -> None:
    for folder in list((root / split).iterdir()):
        for file in list(folder.iterdir()):
            file.rename(root / split / file.name)
        folder.rmdir()
    count = 3 * (TRAIN if split == "train" else VAL)
    with pytest.raises(
        ValueError, match=rf"{split} holds {count} images and no class folders.*move each of them into {split}/CLASS"
    ) as caught:
        ImageNet(str(root))
    assert ("torchvision.datasets.ImageNet" in str(caught.value)) == (split == "val")


def test_an_empty_split(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    with pytest.raises(ValueError, match=r"val is empty\. It must hold"):
        ImageNet(str(root))


def test_classes_must_agree(root: Path) -> None:
    (root / "val" / "n02").rename(root / "val" / "n04")
    with pytest.raises(ValueError, match=r"differ in .*: only in train: n02; only in val: n04\. Every class needs"):
        ImageNet(str(root))
    for number in range(10, 17):
        (root / "val" / f"n{number}").mkdir()
    with pytest.raises(ValueError, match=r"only in val: n04, n10, n11, n12, n13 and 3 more\."):
        ImageNet(str(root))


def test_an_empty_class_is_named(root: Path) -> None:
    shutil.rmtree(root / "val" / "n02")
    write_folder(root, {"val/n02/notes.txt": b"not an image"})
    with pytest.raises(ValueError, match=r"class folders without an image in .*: val/n02\. Put \.jpg, \.jpeg"):
        ImageNet(str(root))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be an integer of at least 1"),
        ({"num_workers": -1}, r"num_workers=-1 must be an integer of at least 0"),
        (
            {"weights": "ResNet18_Weights.IMAGENET1K_V9"},
            r"weights='ResNet18_Weights.IMAGENET1K_V9' does not belong to a classifier of torchvision; did you mean "
            r"'ResNet18_Weights.IMAGENET1K_V1'",
        ),
        ({"weights": "resnet18"}, r"weights='resnet18' does not belong to a classifier .*"),
        ({"weights": "?"}, r"weights='\?' .*give it as 'ResNet50_Weights.IMAGENET1K_V2'"),
        ({"weights": None}, r"weights=None does not belong to a classifier"),
        ({"weights": "FCN_ResNet50_Weights.DEFAULT"}, r"does not belong to a classifier of torchvision"),
        ({"weights": "R3D_18_Weights.DEFAULT"}, r"does not belong to a classifier of torchvision"),
    ],
)
def test_arguments_are_checked_before_the_folder(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageNet("nowhere", **arguments)
