"""How scripts end: a state dict of the module after fit, and one that is loaded into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.classifiers import Direct, Wrapped, images, loader
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
    # Others are refused, and INT8 is as before.
    with pytest.raises(RuntimeError, match="is an INT8 network by now"):
        model.load_state_dict(module().state_dict(), strict=False)
    assert torch.equal(model.eval()(X), expected)
    # What is copied into the tensors of a state dict, as callbacks do around validation, changes no INT8 weight.
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.mul_(0.5)
    trainer.validate(model, loader(seed=1), verbose=False)
    assert torch.equal(model.eval()(X), expected)
