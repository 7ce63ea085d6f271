"""What the callback calibrates on, and with which calibrator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import lq
from helpers.classifiers import Wrapped, images, loader
from helpers.fits import fit, quantization
from helpers.notes import Notes
from lq import QuantizationCallback
from lq.numerics.calibrators import CALIBRATORS, get_calibrator


class Recording(Wrapped):
    """Keeps the first pixel of every sample that its step is given, so that samples can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Notes()
        self.trained = False

    def on_train_end(self) -> None:
        self.trained = True

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trained:
            self.seen.add(batch[0][:, 0, 0, 0].clone())
        return super().training_step(batch, batch_idx)

    def samples(self) -> torch.Tensor:
        # The first batch is looked at once more, for its shape.
        return torch.cat(self.seen.all[1:])


def numbered(count: int, offset: int = 0) -> DataLoader[Any]:
    """Samples in order, the n-th with the value n in it."""
    x, y = images(count)
    x[:, 0, 0, 0] = torch.arange(count) + offset
    return DataLoader(TensorDataset(x, y), batch_size=8)


def test_train_data_are_shuffled_even_where_training_is_not(tmp_path: Path) -> None:
    model = Recording()
    fit(model, tmp_path, quantization(tmp_path, calibrator="minmax", calibration_batches=4), data=numbered(64))
    samples = model.samples()
    assert len(samples) == 32
    assert len(samples.unique()) == 32
    assert samples.max() > 40  # 32 in order would end at 31


def test_any_dataloader_on_request(tmp_path: Path) -> None:
    model = Recording()
    callback = quantization(
        tmp_path, calibrator="minmax", calibration_dataloader=numbered(24, offset=1000), calibration_batches=None
    )
    fit(model, tmp_path, callback, data=numbered(64))
    assert sorted(model.samples().tolist()) == list(range(1000, 1024))


def test_number_of_samples(tmp_path: Path) -> None:
    model = Recording()
    callback = quantization(tmp_path, calibrator="mse", calibration_samples=20)
    fit(model, tmp_path, callback, data=numbered(64))
    assert len(model.samples()) == 24  # whole batches of 8


def test_auto_is_the_default_and_says_what_it_chose(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    callback = quantization(tmp_path)
    assert callback.calibrator == "auto"
    fit(Wrapped(), tmp_path, callback, epochs=1)
    result = callback.result
    assert result is not None
    assert list(result.calibrator_scores) == [str(get_calibrator(name)) for name in CALIBRATORS]
    scores = {name: values["output_sqnr_db"] for name, values in result.calibrator_scores.items()}
    assert result.calibrator == max(scores, key=scores.__getitem__)
    written = json.loads((tmp_path / "int8" / "int8.json").read_text())
    assert written["calibrator"] == result.calibrator
    assert result.calibrator in str(result)


def test_auto_holds_batches_out(tmp_path: Path) -> None:
    """A value that only held-out batches have does not widen any range."""
    model = Wrapped()
    x, y = images(32)
    poisoned = x.clone()
    poisoned[8:16] *= 1000.0  # the second of four batches is held out
    data: DataLoader[Any] = DataLoader(TensorDataset(poisoned, y), batch_size=8)
    callback = quantization(tmp_path, calibration_dataloader=data, calibration_batches=None, evaluate=False)
    fit(model, tmp_path, callback, epochs=1)
    assert callback.result is not None
    first = callback.result.report.int8_layers[0]
    high = float(first.input.rpartition(", ")[2].rstrip("]"))
    assert high <= float(x.max()) * 1.01


@pytest.mark.parametrize("calibrator", ["minmax", "percentile:99.9", "entropy"])
def test_a_named_calibrator_is_used(calibrator: str, tmp_path: Path) -> None:
    callback = quantization(tmp_path, calibrator=calibrator)
    fit(Wrapped(), tmp_path, callback, epochs=1)
    assert callback.result is not None
    assert callback.result.calibrator == calibrator
    assert callback.result.calibrator_scores == {}


@pytest.mark.parametrize("calibrator", [None, "minmax", "moving_average"])
def test_qat_follows_ranges_with(calibrator: str | None, tmp_path: Path) -> None:
    watched: list[str] = []

    class Watch(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            rows = lq.ranges(pl_module.model).rows  # type: ignore[arg-type]
            watched.extend(row.calibrator for row in rows if "per tensor" in row.scheme)

    callback = quantization(tmp_path, mode="qat", calibrator=calibrator, evaluate=False)
    fit(Wrapped(), tmp_path, callback, epochs=1, callbacks=[Watch()])
    assert callback.result is not None
    assert callback.result.calibrator == (calibrator or "moving_average")
    assert watched
    assert set(watched) == {calibrator or "moving_average"}


def test_progress_bar_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = quantization(tmp_path, calibration_batches=3, evaluate=False)
    fit(Wrapped(), tmp_path, callback, epochs=1, enable_progress_bar=True)
    assert "3/3" in capsys.readouterr().out


def test_ctrl_c_in_the_calibration_data(tmp_path: Path) -> None:
    class Interrupted(TensorDataset):
        armed = False

        def __getitem__(self, index: int) -> Any:
            if self.armed and index == 20:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    x, y = images(32)
    calibration = Interrupted(x, y)
    calibration.armed = True
    model, probe = Wrapped(), images(4, seed=1)[0]
    weights: dict[str, torch.Tensor] = {}

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            weights.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    callback: QuantizationCallback = quantization(
        tmp_path, calibration_dataloader=DataLoader(calibration, batch_size=8), calibration_batches=None
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model, tmp_path, callback, callbacks=[Keep()])
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    again = Wrapped()
    again.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(probe), again.eval()(probe))
    # What was interrupted can be done by hand.
    lq.prepare(model.model, probe, target="x86_avx2")
    lq.calibrate(model.model, loader())
    assert lq.convert(model.model)(probe).shape == (4, 4)
