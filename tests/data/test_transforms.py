from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.data.transforms import normalize, random_crop_flip


def all_outcomes(image: np.ndarray, padding: int) -> set[bytes]:
    """Every crop of the padded image and its mirror image, made one at a time with numpy alone."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return {view.tobytes() for crop in crops for view in (crop, crop[:, :, ::-1])}


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 6),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_every_image_becomes_one_of_its_own_crops(count: int, height: int, width: int, padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    before = images.clone()
    out = random_crop_flip(images, padding, generator)
    assert out.shape == images.shape and out.dtype == torch.uint8 and out.is_contiguous()
    assert torch.equal(images, before)
    for image, result in zip(images.numpy(), out.numpy(), strict=True):
        assert result.tobytes() in all_outcomes(image, padding)


def test_every_crop_and_flip_is_about_equally_likely() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    draws = 18 * 400
    out = random_crop_flip(image.expand(draws, -1, -1, -1), padding=1, generator=torch.Generator().manual_seed(0))
    outcomes, counts = torch.unique(out.flatten(1), dim=0, return_counts=True)
    assert {o.numpy().tobytes() for o in outcomes} == all_outcomes(image[0].numpy(), padding=1)
    # 18 outcomes of 400 each in the mean; five standard deviations of a binomial count are 97.
    assert counts.min() > 303 and counts.max() < 497


def test_augmentation_follows_its_generator() -> None:
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    one, two = (random_crop_flip(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, random_crop_flip(images, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("mean", "std"), [((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), ((0, 0, 0), (1, 1, 1))]
)
def test_normalize_is_the_formula(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    out = normalize(images, mean, std)
    expected = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)
