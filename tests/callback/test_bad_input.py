"""Bad input: one clear error, before training where that can be, and nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch._inductor import config as inductor_config
from torch.utils.data import DataLoader

import lq
from helpers.classifiers import TwoParts, Unquantizable, Wrapped, loader
from helpers.fits import TARGET, fit, quantization
from helpers.modes import both_modes
from helpers.notes import Notes
from lq import QuantizationCallback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "int8"}, r"mode='int8'.*'ptq' or 'qat'"),
        ({"target": "arm"}, r"target='arm'.*'x86', 'x86_avx2'"),
        ({"calibrator": "median"}, r"calibrator='median' is unknown.*'minmax', 'moving_average'"),
        ({"calibrator": "minmx"}, r"did you mean 'minmax'"),
        ({"calibrator": "percentile:high"}, r"'high' is not a valid number"),
        ({"calibrator": "percentile:101"}, r"percentile=101.0 must be in"),
        ({"mode": "qat", "calibrator": "mse"}, r"calibrator='mse' is not for mode='qat'"),
        ({"export": "onnx"}, r"export='onnx' must be a list, with elements of 'pt2', 'aoti', 'onnx'"),
        ({"export": ["tflite"]}, r"export=\['tflite'\] must be a list"),
        ({"calibration_samples": 0}, r"calibration_samples=0 must be at least 1"),
        ({"calibration_batches": 0}, r"calibration_batches=0 must be at least 1"),
        ({"observer_freeze": 1.5}, r"observer_freeze=1\.5 must be a share"),
        ({"batch_norm_freeze": -0.1}, r"batch_norm_freeze=-0\.1 must be a share"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationCallback(**arguments)


class _NeverTrained(TwoParts):
    def on_train_start(self) -> None:
        pytest.fail("training began")


@both_modes
def test_unknown_module_is_found_before_training(mode: str, tmp_path: Path) -> None:
    callback = quantization(tmp_path, mode=mode, module="bakbone")
    with pytest.raises(ValueError, match=r"module='bakbone'.*'backbone'"):
        fit(_NeverTrained(), tmp_path, callback)


@both_modes
def test_unwritable_output_is_found_before_training(mode: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    callback = quantization(tmp_path, mode=mode, output_dir=str(tmp_path / "file" / "int8"))
    with pytest.raises(OSError, match=r"output_dir='.*file/int8' cannot be written to.*choose another"):
        fit(_NeverTrained(), tmp_path, callback)


def test_a_missing_compiler_is_found_before_training(tmp_path: Path) -> None:
    callback = quantization(tmp_path, export=["aoti"])
    said = r"none here \(looked for: no-such-compiler\); install g\+\+"
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(lq.CompilerError, match=said):
        fit(_NeverTrained(), tmp_path, callback)


@both_modes
def test_nothing_to_quantize_is_found_before_training(mode: str, tmp_path: Path) -> None:
    class Model(Unquantizable):
        def on_train_start(self) -> None:
            pytest.fail("training began")

    with pytest.raises(lq.NothingToQuantizeError, match="nothing to quantize in Model"):
        fit(Model(), tmp_path, quantization(tmp_path, mode=mode))


def test_nan_in_calibration_leaves_the_float_model(tmp_path: Path) -> None:
    class Poisoned(Wrapped):
        """Trains on clean data; what calibration is shown has a NaN."""

        def on_train_end(self) -> None:
            self.weights = {name: value.clone() for name, value in self.state_dict().items()}
            self.trainer.train_dataloader.dataset.tensors[0][0] = torch.nan

    model = Poisoned()
    with pytest.raises(lq.CalibrationError, match="NaN or an infinity"):
        fit(model, tmp_path, quantization(tmp_path))
    assert model.state_dict().keys() == model.weights.keys()
    assert all(torch.equal(value, model.weights[name]) for name, value in model.state_dict().items())
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8))).all()
    assert not (tmp_path / "int8" / "int8.pt2").exists()


def test_interrupt_in_calibration_leaves_the_float_model(tmp_path: Path) -> None:
    class Interrupted(Wrapped):
        def on_train_end(self) -> None:
            self.calibrated = Notes()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if hasattr(self, "calibrated"):
                self.calibrated.add(batch_idx)
                if len(self.calibrated.all) > 2:
                    raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    model = Interrupted()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model, tmp_path, quantization(tmp_path, evaluate=False))
    assert model.state_dict().keys() == Wrapped().state_dict().keys()
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_no_training_data(tmp_path: Path) -> None:
    empty: DataLoader[Any] = DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)))
    with pytest.raises(lq.CalibrationError, match="gave no batch"):
        fit(Wrapped(), tmp_path, quantization(tmp_path, mode="qat"), data=empty)


def test_step_that_does_not_call_the_unit(tmp_path: Path) -> None:
    class Elsewhere(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(3, 3)

    callback = quantization(tmp_path, mode="qat", module="unused")
    with pytest.raises(ValueError, match=r"training_step never called the Linear.*module='\.\.\.'"):
        fit(Elsewhere(), tmp_path, callback)


def test_arguments_parse_from_a_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(QuantizationCallback, "quantization")
    parsed = parser.parse_args(["--quantization.mode=qat", f"--quantization.target={TARGET}"])
    callback = parser.instantiate(parsed).quantization
    assert isinstance(callback, QuantizationCallback)
    assert (callback.mode, callback.target.name) == ("qat", TARGET)


@pytest.mark.filterwarnings("ignore:.*this CPU's INT8 kernels get it wrong")
def test_x86_on_a_cpu_without_vnni_says_so(tmp_path: Path) -> None:
    from lq.util.cpu import has_onednn_int8, has_vnni

    if has_vnni() or not has_onednn_int8():
        pytest.skip("the CPU has VNNI, or no INT8 kernels")
    with pytest.warns(UserWarning, match=r"no VNNI.*target='x86_avx2'"):
        fit(Wrapped(), tmp_path, quantization(tmp_path, target="x86"), data=loader())
