from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.data.splits import LabeledImages, hold_out, stratified_order


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 2**31))
def test_every_prefix_is_stratified(labels: list[int], seed: int) -> None:
    tensor = torch.tensor(labels)
    order = stratified_order(tensor, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert torch.equal(order, stratified_order(tensor, seed))
    for length in range(len(labels) + 1):
        for label in set(labels):
            chosen = (tensor[order[:length]] == label).sum().item()
            share = length * labels.count(label) / len(labels)
            # Each of the five classes is within half an image of its due; the sum of the halves is shared by all.
            assert abs(chosen - share) <= 3


@settings(deadline=None, max_examples=25)
@given(per_class=st.integers(1, 12), length=st.integers(0, 36), seed=st.integers(0, 2**31))
def test_equal_classes_stay_within_one_image(per_class: int, length: int, seed: int) -> None:
    labels = torch.arange(3).repeat(per_class)
    counts = torch.bincount(labels[stratified_order(labels, seed)[:length]], minlength=3)
    assert counts.max() - counts.min() <= 1


def test_seeds_choose_different_images() -> None:
    labels = torch.arange(10).repeat(20)
    assert not torch.equal(stratified_order(labels, 0), stratified_order(labels, 1))


def test_an_empty_split_has_an_empty_order() -> None:
    assert stratified_order(torch.empty(0, dtype=torch.int64), 0).tolist() == []


def test_hold_out_parts_without_loss_or_overlap() -> None:
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    rest, held = hold_out(LabeledImages(images, torch.arange(4).repeat(10)), fraction=0.3, seed=5)
    assert (len(rest), len(held)) == (28, 12)
    assert torch.bincount(held.labels).tolist() == [3, 3, 3, 3]
    assert sorted(torch.cat([rest.images, held.images]).flatten().tolist()) == list(range(40))
    # An image keeps its label.
    assert torch.equal(held.images.flatten() % 4, held.labels)
