"""What is said where something does not fit: what it is, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lq
from helpers.classifiers import Wrapped, images, loader, network
from helpers.fits import fit, quantization
from helpers.modules import NeverTrained
from lq import Int8Module
from lq.util.modes import evaluating


def batches_of(*tensors: torch.Tensor) -> Any:
    data: Any = tensors[0] if len(tensors) == 1 else torch.utils.data.TensorDataset(*tensors)
    return DataLoader(data, batch_size=4)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (batches_of(torch.arange(8)), r"which is a int64 tensor of shape \(4,\) \("),
        (batches_of(torch.randn(8, 3, 8, 8)), r"which is a float32 tensor of shape \(4, 3, 8, 8\) \("),
        ([{"image": torch.zeros(2, 3), "names": ["a"]}], r"which is {'image': a float32 tensor .*, 'names': a list of"),
    ],
)
def test_calibration_data_of_another_form(batches: Any, said: str, tmp_path: Path) -> None:
    callback = quantization(tmp_path, calibration_dataloader=batches)
    message = f"training_step of NeverTrained does not take a batch of calibration_dataloader, {said}.*as the train"
    with pytest.raises(lq.CalibrationError, match=message):
        fit(NeverTrained(), tmp_path, callback)


def test_calibration_data_that_can_be_read_once(tmp_path: Path) -> None:
    callback = quantization(tmp_path, calibration_dataloader=iter(list(loader())), evaluate=False)
    fit(Wrapped(), tmp_path, callback)
    assert callback.result is not None
    callback = quantization(tmp_path, calibration_dataloader=iter([torch.arange(4)]), evaluate=False)
    with pytest.raises(lq.CalibrationError, match="does not take a batch of calibration_dataloader"):
        fit(Wrapped(), tmp_path, callback, epochs=1)


def test_labels_alone_without_lightning() -> None:
    x, y = images(8)
    model = lq.prepare(network().eval(), x)
    said = (
        r"gives a int64 tensor of shape \(4,\) for the input 'input', and the model was prepared with a float32 tensor"
    )
    for batches in (batches_of(y), batches_of(y, x), [{"input": y[:4]}]):
        with pytest.raises(lq.CalibrationError, match=said):
            lq.calibrate(model, batches)
    with pytest.raises(TypeError, match="missing a required argument: 'input'"):
        lq.calibrate(model, [{"label": y}])
    lq.calibrate(model, [x.numpy()])
    from_arrays = lq.ranges(model)
    lq.calibrate(model, [(x, y)])
    assert str(lq.ranges(model)) == str(from_arrays)


def test_an_error_of_the_model_is_its_own() -> None:
    class Fails(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    x, _ = images(8)
    model = lq.prepare(Fails().eval(), x)
    with pytest.raises(RuntimeError, match="channels"):
        lq.calibrate(model, [torch.randn(4, 5, 8, 8)])


@pytest.mark.parametrize(
    "limit", [{"epochs": 0}, {"epochs": 1, "max_steps": 0}, {"epochs": 1, "limit_train_batches": 0}]
)
@pytest.mark.filterwarnings("ignore:.*limit_train_batches.*")
def test_qat_that_trains_nothing(limit: dict[str, Any], tmp_path: Path) -> None:
    name = next(reversed(limit)).replace("epochs", "max_epochs")
    said = rf"mode='qat' takes the ranges from training, and Trainer\({name}=0\) trains nothing: use .*mode='ptq'"
    with pytest.raises(ValueError, match=said):
        fit(NeverTrained(), tmp_path, quantization(tmp_path, mode="qat"), **limit)
    assert not list(tmp_path.rglob("*.ckpt"))
    # Without conversion the prepared model is what is wanted.
    callback = quantization(tmp_path, mode="qat", convert=False)
    fit(Wrapped(), tmp_path, callback, **limit)


def test_quantize_checkpoint_of_what_is_no_lightning_module(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    model = Wrapped()
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}, path)
    with pytest.raises(TypeError, match="model=Sequential must be a LightningModule, or its class; a plain module is"):
        lq.quantize_checkpoint(path, network(), loader())  # type: ignore[arg-type]
    compiled: Any = torch.compile(model, backend="eager")
    lq.quantize_checkpoint(path, compiled, loader(), evaluate=False, analyze=False, target="x86_avx2")
    assert isinstance(model.model, Int8Module)
    x, _ = images(4)
    with evaluating(model):
        assert torch.isfinite(model(x)).all()
    assert np.isfinite(model(x).numpy()).all()


def test_a_prepared_module_that_was_compiled_afterwards() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = lq.prepare(network(), x, target="x86_avx2")
    compiled: Any = torch.compile(model, backend="eager")
    for call in (lambda: lq.calibrate(compiled, [x]), lambda: lq.convert(compiled), lambda: lq.unprepare(compiled)):
        with pytest.raises(ValueError, match=r"what torch.compile made of a prepared Sequential.*_orig_mod"):
            call()


def test_what_an_int8_module_takes() -> None:
    x = torch.randn(2, 3, 8, 8)
    int8 = lq.convert(lq.calibrate(lq.prepare(network(), x, target="x86_avx2"), [x]))
    assert torch.equal(int8(x.numpy()), int8(x))
    with pytest.raises(TypeError, match="input 'input' must be a tensor or an array, got list"):
        int8(x.tolist())


def test_qat_of_no_epochs(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Trainer\(max_epochs=0\) trains nothing: use QuantizationCallback\(mode='ptq'"
    ):
        fit(NeverTrained(), tmp_path, quantization(tmp_path, mode="qat"), epochs=0)
