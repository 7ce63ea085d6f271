"""How scripts end: a state dict of the module after fit, and one that is loaded into it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from helpers.classifiers import Direct, Wrapped, images, loader, network
from helpers.fits import fit, quantization
from helpers.modes import both_modes

X = images(16, seed=3)[0]


@pytest.mark.support("Checkpoints", "`torch.save(model.state_dict())` and `load_state_dict` after fit")
@both_modes
@pytest.mark.parametrize("module", [Wrapped, Direct])
def test_they_are_the_float_model(module: type[Any], mode: Any, tmp_path: Path) -> None:
    model = module()
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_weights_only=True)
    trainer = fit(model, tmp_path, quantization(tmp_path, mode=mode), callbacks=[checkpoint], enable_checkpointing=True)
    expected = model.eval()(X)
    plain = module()
    plain.load_state_dict(model.state_dict())
    assert list(plain.state_dict()) == list(module().state_dict())
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(best[name], value) for name, value in plain.state_dict().items())
    # The weights that INT8 was made of change nothing.
    model.load_state_dict(best)
    assert torch.equal(model.eval()(X), expected)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = module.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert all(torch.equal(best[name], value) for name, value in again.state_dict().items())
    # What is copied into the tensors of a state dict, as callbacks do around validation, changes no INT8 weight.
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.mul_(0.5)
    trainer.validate(model, loader(seed=1), verbose=False)
    assert torch.equal(model.eval()(X), expected)
    # With others it is the float network again.
    state = module().state_dict()
    with pytest.warns(UserWarning, match="was an INT8 network, and is given the weights of another one"):
        model.load_state_dict(state)
    plain.load_state_dict(state)
    assert torch.equal(model.eval()(X), plain.eval()(X))


class Upgraded(nn.Conv2d):
    """A layer whose older state dicts are in another unit."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 100
        super()._load_from_state_dict(state, prefix, metadata, *args)


class WithVersions(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.model[0] = Upgraded(3, 8, 3, padding=1, bias=False)


def test_versions_of_layers_are_kept(tmp_path: Path) -> None:
    model, plain = WithVersions(), WithVersions()
    fit(model, tmp_path, quantization(tmp_path))
    state: Any = model.state_dict()
    assert state._metadata["model.0"] == {"version": 2}
    plain.load_state_dict(state)
    assert torch.equal(plain.state_dict()["model.0.weight"], state["model.0.weight"])


class HasArgument(Wrapped):
    """As people have their networks made from a config, and saved with the hyperparameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.model = net  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")  # Lightning's, of what people do
@both_modes
def test_a_network_among_the_hyperparameters_is_the_float_one(mode: Any, tmp_path: Path) -> None:
    model = HasArgument(network())
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss")
    trainer = fit(model, tmp_path, quantization(tmp_path, mode=mode), callbacks=[checkpoint], enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for path in (checkpoint.best_model_path, tmp_path / "after.ckpt"):
        net = torch.load(path, weights_only=False)["hyper_parameters"]["net"]
        assert type(net) is nn.Sequential and "forward" not in net.__dict__ and len(net) == len(network())
        again, plain = HasArgument.load_from_checkpoint(path, weights_only=False), HasArgument(network())
        plain.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        assert torch.equal(again.eval()(X), plain.eval()(X))


def folds(folder: Path, callback: Any) -> list[Tensor]:
    """Cross-validation: the same module for each fold, from the same weights."""
    seed_everything(0, verbose=False)
    model = Wrapped()
    start, outputs = copy.deepcopy(model.state_dict()), []
    for fold in range(2):
        model.load_state_dict(start)
        fit(model, folder, None if callback is None else callback(fold), data=loader(seed=fold))
        plain = Wrapped()
        plain.load_state_dict(model.state_dict())
        outputs.append(plain.eval()(X))
    return outputs


@pytest.mark.filterwarnings("ignore:lq. 'model' was an INT8 network")
def test_folds_begin_with_the_same_weights(tmp_path: Path) -> None:
    float_folds = folds(tmp_path, None)
    int8_folds = folds(tmp_path, lambda fold: quantization(tmp_path / str(fold), rehearse=True))
    assert all(torch.equal(one, other) for one, other in zip(float_folds, int8_folds, strict=True))


@pytest.mark.support("Callbacks", "After fit with an average: `validate`, `test(ckpt_path=...)`, another fit")
@pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback, but loading",  # Lightning's, of any Trainer that does not fit
    "ignore:lq. 'model' was an INT8 network",  # the copy that StochasticWeightAveraging makes
    "ignore:lq. the checkpoint holds float weights that no ranges are known for",  # the last one, where another is best
)
@both_modes
@pytest.mark.parametrize(
    "average", [EMAWeightAveraging, WeightAveraging, lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_after_a_fit_with_an_average(average: Any, mode: Any, tmp_path: Path) -> None:
    model, callback = Wrapped(), quantization(tmp_path, mode=mode)
    best = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_last=True)
    trainer = fit(model, tmp_path, callback, epochs=3, callbacks=[average(), best], enable_checkpointing=True)
    assert callback.result is not None
    expected = model.eval()(X)
    metrics = trainer.validate(model, loader(seed=1), verbose=False)[0]
    assert metrics == pytest.approx(callback.result.int8_side.metrics)
    assert torch.equal(model.eval()(X), expected)
    for path in (best.best_model_path, best.last_model_path):
        again = trainer.validate(model, loader(seed=1), ckpt_path=path, verbose=False)[0]
        assert again["val_acc"] >= metrics["val_acc"] - 0.2
        if path == best.best_model_path and isinstance(trainer.callbacks[1], WeightAveraging):
            assert again == pytest.approx(metrics)  # INT8 was made of the average in it
    # Another fit has an average of its own.
    fit(model.train(), tmp_path, quantization(tmp_path, mode=mode), callbacks=[trainer.callbacks[1]])
