"""What a run writes is one set: all of it of this run, or all of it of the one before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import lq
from helpers.classifiers import Wrapped, images
from helpers.modes import both_modes
from helpers.processes import start
from helpers.runs import InterruptionError, interrupted, module, quantization, train_data, trainer, val_data
from lq import Int8Module


class FailsInInt8(Wrapped):
    """Its INT8 network cannot be judged."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(self.model, Int8Module):
            self.fail()
        super().validation_step(batch, batch_idx)

    def fail(self) -> None:
        raise InterruptionError


class KilledInInt8(FailsInInt8):
    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def run(folder: Path, model: Any = None, **kwargs: Any) -> None:
    fit = trainer(folder, quantization(folder, **kwargs), epochs=1)
    fit.fit(model or module(), train_data(), val_data())


def assert_one_set(folder: Path) -> dict[str, Any]:
    """The files are those that int8.json tells of, and it is of the network beside it."""
    result: dict[str, Any] = json.loads((folder / "int8.json").read_text())
    written = {file.name for file in folder.iterdir() if file.name.startswith("int8.")}
    assert written == {"int8.json", "int8.html", *(Path(path).name for path in result["exports"])}
    assert result["int8_side"]["size_bytes"] == (folder / "int8.pt2").stat().st_size
    return result


@pytest.fixture(scope="module")
def earlier_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    run(folder, export=["pt2", "onnx"])
    return folder / "int8"


@pytest.fixture
def earlier(earlier_set: Path, tmp_path: Path) -> Path:
    """The folder of a run that has ended."""
    return Path(shutil.copytree(earlier_set, tmp_path / "run" / "int8")).parent


def test_a_later_run_replaces_all_and_nothing_else(earlier: Path) -> None:
    folder = earlier / "int8"
    assert (folder / "int8.onnx").exists()
    assert_one_set(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "unconverted.ckpt").write_text("of a run that failed")
    page = earlier / "precious.html"
    page.write_text("precious")
    (folder / "int8.html").unlink()
    (folder / "int8.html").symlink_to(page)
    run(earlier, mode="qat")
    assert assert_one_set(folder)["mode"] == "qat"
    assert not (folder / "int8.onnx").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "unconverted.ckpt").read_text() == "of a run that failed"
    assert page.read_text() == "precious"
    assert not (folder / "int8.html").is_symlink()
    assert lq.load(folder / "int8.pt2")(images(4)[0]).shape == (4, 4)
    assert sorted(entry.name for entry in earlier.iterdir()) == ["int8", "precious.html"]


@both_modes
def test_a_failing_int8_evaluation_keeps_the_earlier_set(mode: str, earlier: Path) -> None:
    before = tree(earlier)
    fit = trainer(earlier, quantization(earlier, mode=mode, evaluate=True), epochs=1)
    interrupted(fit, module(FailsInInt8), train_data(), val_data())
    after = tree(earlier)
    assert after.pop("int8/unconverted.ckpt")
    assert after == before


@pytest.mark.parametrize("name", ["int8.json", "int8.onnx"])
def test_a_disk_that_fills_up_at_the_last_file(name: str, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network's own files cannot be written, the earlier set stays; where an export cannot, the new one comes
    without it."""
    before = tree(earlier)
    write = "write_text" if name.endswith(".json") else "write_bytes"
    really_write = getattr(Path, write)

    def full(path: Path, *args: Any, original: Any = really_write, **kwargs: Any) -> Any:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, write, full)
    monkeypatch.setattr("onnx.save", lambda model, path: full(Path(path), b"", original=lambda *_: None))
    exports = ["onnx"] if name.endswith(".onnx") else []
    fit = trainer(earlier, quantization(earlier, export=exports), epochs=1)
    interrupted(fit, module(seed=1), train_data(), val_data(), error=OSError)
    after = tree(earlier)
    if name == "int8.json":
        assert after.pop("int8/unconverted.ckpt")
        assert after == before
    else:
        assert assert_one_set(earlier / "int8")["exports"] == [str(earlier / "int8" / "int8.pt2")]
        assert after != before


@both_modes
def test_a_trial_run_writes_nothing(mode: str, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(earlier)
    before = tree(earlier)
    callback = quantization(earlier, mode=mode, evaluate=True, export=["onnx"])
    trainer(earlier, callback, fast_dev_run=True).fit(module(), train_data(), val_data())
    assert tree(earlier) == before
    assert callback.result is not None
    assert (callback.result.artifact, callback.result.exports) == ("", ())
    assert "val_acc" in callback.result.int8_side.metrics
    fit = trainer(earlier, quantization(earlier, mode=mode, evaluate=True), fast_dev_run=True)
    interrupted(fit, module(FailsInInt8), train_data(), val_data())
    assert tree(earlier) == before


def run_until_killed(folder: Path) -> None:
    run(folder, module(KilledInInt8), evaluate=True)


def test_a_killed_run_leaves_the_earlier_set_and_the_next_one_clears_up(earlier: Path, tmp_path: Path) -> None:
    folder, before = earlier, tree(earlier)
    process = start(run_until_killed, folder, output=tmp_path / "output")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert {name: content for name, content in tree(folder).items() if ".lq-" not in name} == before
    assert list(folder.glob(".int8.lq-*"))
    run(folder, convert=False)  # writes nothing, and has nothing to do with that folder
    run(folder, mode="qat")
    assert [entry.name for entry in folder.iterdir()] == ["int8"]
    assert assert_one_set(folder / "int8")["mode"] == "qat"
