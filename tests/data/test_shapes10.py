from __future__ import annotations

import numpy as np
import pytest
import torch

from lq.data import Shapes10
from lq.data.shapes import CHUNK, SHAPES, generate


def test_same_seed_same_bytes() -> None:
    one, two = generate(600, seed=3, stream=0), generate(600, seed=3, stream=0)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], generate(600, seed=4, stream=0)[0])


def test_a_smaller_set_is_a_prefix_and_classes_are_balanced() -> None:
    images, labels = generate(CHUNK + 100, seed=0, stream=0)
    fewer, fewer_labels = generate(70, seed=0, stream=0)
    assert np.array_equal(images[:70], fewer) and np.array_equal(labels[:70], fewer_labels)
    assert np.bincount(labels[:CHUNK]).tolist() == [CHUNK // 10] * 10
    assert images.shape == (CHUNK + 100, 3, 32, 32) and images.dtype == np.uint8 and labels.dtype == np.int64


def test_no_image_is_in_both_splits() -> None:
    data = Shapes10(train_size=500, test_size=500).load()
    train, test = ({image.numpy().tobytes() for image in split.images} for split in (data.train, data.test))
    assert len(train) == len(test) == 500 and not train & test


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fill_the_unit_circle_and_have_pixel_sized_slopes(name: str) -> None:
    axis = np.linspace(-1.5, 1.5, 151, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    distance = SHAPES[name](u, v)
    assert distance.dtype == np.float32
    reach = np.hypot(u, v)[distance < 0].max()
    assert 0.8 < reach < 1.25
    assert 0.15 < (distance < 0).sum() * 0.02**2 < 2.5
    # A distance changes by at most 1 per unit: what the antialiasing of one pixel's width counts on.
    slope = np.hypot(*np.gradient(distance, 0.02))
    assert np.quantile(slope, 0.98) < 1.1


def test_the_statistics_are_those_of_the_images() -> None:
    images = generate(2000, seed=0, stream=0)[0] / 255
    np.testing.assert_allclose(images.mean((0, 2, 3)), Shapes10.mean, atol=0.01)
    np.testing.assert_allclose(images.std((0, 2, 3)), Shapes10.std, atol=0.01)


def test_classes_differ_in_the_mean_image() -> None:
    """A class must be visible at all: nearest mean image, trained on one split, beats chance by far on the other."""
    data = Shapes10(train_size=2000, test_size=500).load()
    flat = data.train.images.flatten(1).float()
    means = torch.stack([flat[data.train.labels == label].mean(0) for label in range(10)])
    unit = torch.nn.functional.normalize(means - means.mean(0))
    test = data.test.images.flatten(1).float()
    guess = (torch.nn.functional.normalize(test - means.mean(0)) @ unit.T).argmax(1)
    assert (guess == data.test.labels).float().mean() > 0.2


def test_module() -> None:
    data = Shapes10(train_size=64, test_size=32, batch_size=16)
    assert (data.name, data.num_classes, data.input_shape) == ("Shapes10", 10, (3, 32, 32))
    assert data.class_names == tuple(sorted(data.class_names))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (16, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 32


@pytest.mark.parametrize("argument", ["train_size", "test_size"])
def test_sizes_are_checked(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0 must be an integer of at least 1"):
        Shapes10(**{argument: 0})
