"""Statistics as a file: written after calibration, read into a model that was built anew."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lq
from helpers.calibration import BATCHES, activations, calibrated, found_ranges, network, prepared
from helpers.networks import Residual
from lq.numerics.calibrators import CALIBRATORS, MSE, Calibrator, Entropy, MovingAverage, Percentile


@functools.cache
def in_use() -> nn.Module:
    """A model with ranges and statistics of its own."""
    return calibrated("percentile:95")


@functools.cache
def written() -> nn.Module:
    """Another one, to be written to a file."""
    return calibrated()


def refused(path: Path, message: str, model: nn.Module | None = None, calibrator: str | None = None) -> None:
    """Loading raises, and leaves a model as it is."""
    model = model or in_use()
    expected, ranges = model(BATCHES[0]), found_ranges(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lq.load_statistics(model, path, calibrator)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert found_ranges(model) == ranges
    assert torch.equal(model(BATCHES[0]), expected)


@pytest.mark.parametrize(
    "calibrator",
    [
        *CALIBRATORS,
        *(Percentile(99.9), Percentile(99.99999), MSE(steps=8), Entropy(steps=8), MovingAverage(0.3)),
    ],
    ids=str,
)
def test_ranges_come_back_bit_for_bit(tmp_path: Path, calibrator: str | Calibrator) -> None:
    source = calibrated(calibrator)
    lq.save_statistics(source, tmp_path / "statistics.npz")
    other = prepared()
    assert lq.load_statistics(other, tmp_path / "statistics.npz") is other
    assert found_ranges(other) == found_ranges(source)
    assert torch.equal(other(BATCHES[0]), source(BATCHES[0]))


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram"])
def test_statistics_come_back_whole(tmp_path: Path, observer: str) -> None:
    source = calibrated(observer=observer)
    lq.save_statistics(source, tmp_path / "statistics.npz")
    other = lq.load_statistics(calibrated(observer=observer), tmp_path / "statistics.npz")
    for name, quantizer in activations(source).items():
        mine, theirs = quantizer.observer.state_dict(), activations(other)[name].observer.state_dict()
        assert all(torch.equal(theirs[key], mine[key]) and theirs[key].dtype == mine[key].dtype for key in mine)
    assert found_ranges(other) == found_ranges(source)
    # ... and independent of the file, and of each other.
    lq.calibrate(other, [batch * 2 for batch in BATCHES])
    assert found_ranges(other) != found_ranges(source)


def test_layers_with_calibrators_of_their_own(tmp_path: Path) -> None:
    source = lq.recalibrate(lq.recalibrate(calibrated("minmax"), "percentile:99", ["layer1"]), "entropy", ["pool"])
    lq.save_statistics(source, tmp_path / "statistics.npz")
    other = lq.load_statistics(prepared(), tmp_path / "statistics.npz")
    assert found_ranges(other) == found_ranges(source)
    assert {str(q.calibrator) for q in activations(other).values()} == {"minmax", "percentile:99", "entropy"}


@pytest.mark.parametrize("calibrator", ["minmax", "percentile:99", MSE(steps=8)], ids=str)
def test_another_calibrator_on_loading(tmp_path: Path, calibrator: str | Calibrator) -> None:
    lq.save_statistics(calibrated("entropy"), tmp_path / "statistics.npz")
    other = lq.load_statistics(prepared(), tmp_path / "statistics.npz", calibrator)
    assert found_ranges(other) == found_ranges(calibrated(calibrator))
    # With the statistics there, so is any other.
    assert found_ranges(lq.recalibrate(other, "mse")) == found_ranges(calibrated("mse"))


def test_another_target_and_other_weights_take_the_same_file(tmp_path: Path) -> None:
    source = calibrated()
    lq.save_statistics(source, tmp_path / "statistics.npz")
    other = lq.prepare(network(seed=1), BATCHES[0], target="x86_avx2")
    lq.load_statistics(other, tmp_path / "statistics.npz")
    assert found_ranges(other) == found_ranges(source)
    assert not torch.equal(other.fc.weight, source.fc.weight)  # type: ignore[union-attr]


def test_the_file_has_arrays_and_json_alone(tmp_path: Path) -> None:
    model = calibrated()
    path = tmp_path / "new" / "folder" / "statistics.of.mine"
    lq.save_statistics(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["statistics.of.mine"]
    with np.load(path, allow_pickle=False) as arrays:
        loaded = {name: arrays[name] for name in arrays.files}
    assert all(array.dtype.kind in "iuf" for array in loaded.values())
    assert {name.rpartition("/")[0] for name in loaded} == {"", *activations(model)}
    assert json.loads(loaded["header"].tobytes())["model"] == "Sequential"
    assert all(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist())
    assert path.stat().st_size < 100_000
    # Replaced as a whole.
    lq.save_statistics(lq.recalibrate(model, "minmax"), path)
    assert found_ranges(lq.load_statistics(prepared(), path)) == found_ranges(model)


def test_statistics_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "residual.npz"
    x = BATCHES[0]
    lq.save_statistics(lq.calibrate(lq.prepare(Residual().eval(), x), [x]), path)
    refused(
        path,
        r"path='.*residual\.npz' holds the statistics of another model \(Residual\): 9 quantizers of this Sequential "
        r"are not in the file \('input', 'stem\.1', .*\.\.\.\), 7 of the file's are not in the model \('x', 'relu', ",
    )


@pytest.mark.parametrize(
    ("saved", "here"), [("histogram", "minmax"), ("minmax", "histogram"), ("histogram", "moving_average")]
)
def test_statistics_of_another_observer(tmp_path: Path, saved: str, here: str) -> None:
    path = tmp_path / "statistics.npz"
    lq.save_statistics(calibrated(observer=saved), path)
    message = r"'input' was watched by a \w+Observer and has a \w+Observer here; prepare the model with the observer"
    refused(path, message, calibrated(observer=here))


def test_a_calibrator_that_these_statistics_do_not_serve(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    lq.save_statistics(calibrated(observer="minmax"), path)
    refused(path, "needs a histogram, and a MinMaxObserver keeps none", calibrated(observer="minmax"), "mse")
    refused(path, "calibrator='auto' is unknown", calibrated(observer="minmax"), "auto")


def write_text(path: Path) -> None:
    path.write_text("statistics")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_state_dict(path: Path) -> None:
    torch.save(written().state_dict(), path)


def write_other_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros((2, 3)), header=np.zeros(3))


def write_one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, header=np.array([{"format": "lq statistics 1"}], dtype=object))


@pytest.mark.parametrize(
    "write", [write_text, write_nothing, write_state_dict, write_other_arrays, write_one_array, write_pickle]
)
def test_files_of_another_kind(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "file")
    refused(tmp_path / "file", "path='.*file' holds no statistics written by lq.save_statistics, or is damaged: ")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    path = tmp_path / "file"
    lq.save_statistics(written(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "holds no statistics written by lq.save_statistics, or is damaged: ")


def change(path: Path, **arrays: np.ndarray | None) -> None:
    """Replace arrays of the file, or take them out."""
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    kept.update({name: array for name, array in arrays.items() if array is not None})
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in kept.items() if arrays.get(name, array) is not None})


def header(**entries: object) -> np.ndarray:
    return np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"header": header(format="lq statistics 2")}, "its format is 'lq statistics 2', not 'lq statistics 1'"),
        ({"header": header(format="lq statistics 1")}, "or is damaged"),
        ({"header": np.frombuffer(b"[1]", dtype=np.uint8)}, "or is damaged"),
        ({"header": None}, "or is damaged"),
        ({"pool/counts": None}, "(?s)is damaged at 'pool'.*Missing.*counts"),
        ({"pool/counts": np.zeros(17, np.int64)}, "(?s)is damaged at 'pool'.*size mismatch"),
        ({"pool/_extra_state": np.zeros(17, np.float32)}, "is damaged at 'pool'"),
        ({"pool/_extra_state": np.zeros((17, 3), np.float32)}, "is damaged at 'pool'"),
    ],
)
def test_files_that_someone_changed(tmp_path: Path, arrays: dict[str, np.ndarray | None], message: str) -> None:
    path = tmp_path / "file"
    lq.save_statistics(written(), path)
    change(path, **arrays)
    refused(path, message)


def test_no_file_and_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path='.*nowhere.npz': no such file"):
        lq.load_statistics(prepared(), tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        lq.load_statistics(prepared(), tmp_path)
    with pytest.raises(ValueError, match="'input' holds no statistics; call lq.calibrate"):
        lq.save_statistics(prepared(), tmp_path / "statistics.npz")
    with pytest.raises(ValueError, match="not prepared; call lq.prepare"):
        lq.save_statistics(network(), tmp_path / "statistics.npz")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="path='.*file' cannot be written to"):
        lq.save_statistics(calibrated(), tmp_path / "file" / "statistics.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_failed_calibration_left_is_not_saved(tmp_path: Path) -> None:
    model = calibrated()
    with pytest.raises(lq.CalibrationError):
        lq.calibrate(model, [torch.full_like(BATCHES[0], torch.nan)])
    with pytest.raises(ValueError, match="'input' holds no statistics"):
        lq.save_statistics(model, tmp_path / "statistics.npz")
