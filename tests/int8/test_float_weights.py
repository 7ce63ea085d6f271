"""A callback that loads weights into the network after fit finds INT8 in its place."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import lq
from helpers.classifiers import Wrapped, images
from helpers.fits import fit, quantization


def test_the_weights_that_int8_was_made_of_change_nothing_and_others_are_refused(tmp_path: Path) -> None:
    class Kept(Wrapped):
        def on_train_end(self) -> None:
            self.__dict__["ended"] = copy.deepcopy(self.model.state_dict())

    model = Kept()
    fit(model, tmp_path, quantization(tmp_path, export=[]))
    x = images(8, seed=5)[0]
    int8, expected = model.model, model.model(x)
    assert isinstance(int8, lq.Int8Module)
    int8.load_state_dict(model.ended)
    assert torch.equal(int8(x), expected)
    other = {name: value + 1 for name, value in model.ended.items()}
    with pytest.raises(RuntimeError, match="and other ones than it was made of: .* lq.quantize_checkpoint"):
        int8.load_state_dict(other)
    assert torch.equal(int8(x), expected)
    # Its own integers and scales it takes.
    int8.load_state_dict({name: value.clone() for name, value in int8.state_dict().items()})
    assert torch.equal(int8(x), expected)
