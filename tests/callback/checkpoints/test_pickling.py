"""What a run ends with can be pickled: a module, its INT8 network, the callback, the Trainer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import lq
from helpers.classifiers import Direct, Wrapped, images
from helpers.modes import both_modes
from helpers.networks import WithDataDependent
from helpers.runs import logits, module, quantization, train_data, trainer, val_data
from lq import Int8Module

pytestmark = pytest.mark.skipif(
    "__setstate__" not in vars(Int8Module), reason="Int8Module does not write its graph with lq.graph_state yet"
)


@both_modes
@pytest.mark.parametrize("cls", [Wrapped, Direct])
def test_after_fit(cls: Any, mode: str, tmp_path: Path) -> None:
    model, callback = module(cls), quantization(tmp_path, mode=mode)
    run = trainer(tmp_path, callback, epochs=1)
    run.fit(model, train_data(), val_data())
    expected = logits(model)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), expected)
        # It is one that can train on, and be converted again.
        trainer(tmp_path, quantization(tmp_path, mode=mode), epochs=1).fit(again, train_data(), val_data())
        assert any(isinstance(part, Int8Module) for part in again.modules())
    loaded = pickle.loads(pickle.dumps(callback))
    assert loaded.result.to_json() == callback.result.to_json()  # type: ignore[union-attr]
    assert pickle.loads(pickle.dumps(run)).max_epochs == 1


def test_networks(tmp_path: Path) -> None:
    x = images(8)[0]
    leaf = WithDataDependent().eval()
    for model, inputs in ((Wrapped().model.eval(), x), (leaf, torch.randn(8, 3, 16, 16))):
        int8 = lq.convert(lq.calibrate(lq.prepare(model, inputs, target="x86_avx2"), [inputs]))
        networks = [int8]
        if model is not leaf:
            lq.export(int8, tmp_path / "int8.pt2")
            networks.append(lq.load(tmp_path / "int8.pt2"))  # type: ignore[arg-type]
        for network in networks:
            again = pickle.loads(pickle.dumps(network))
            assert torch.equal(again(inputs), network(inputs))
            again.execution = network.execution = "simulation"
            assert torch.equal(again(inputs), network(inputs))
            assert str(again.report) == str(network.report)
            assert str(again.graph) == str(network.graph)
