"""Real processes, killed where they happen to be: there is a loadable checkpoint, and the run goes on exactly."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import lq
from helpers.classifiers import Wrapped, images
from helpers.processes import finish, start
from helpers.runs import StatefulLoader, assert_same, every_epoch, module, quantization, trainer, val_data

EPOCHS = 4
#: Where checkpoints are written: at the end of each epoch, or behind every other batch; then nothing is converted, so
#: that all kills meet the training.
EVERY = {"epochs": {}, "batches": {"every_n_train_steps": 2}}
#: A run that has resumed within an epoch writes checkpoints that Lightning 2.6 does not resume exactly, with or without
#: lq: it counts the epochs wrongly from then on, and trains one of them twice. Such a run is not killed again.
KILLED_AGAIN = {"epochs": True, "batches": False}

#: How often a run is killed beyond what is asked for, until one had written a checkpoint by then.
_MORE = 20


class Began(Callback):
    """Tells when training begins: preparing takes as long as all of these epochs, and most kills are to come after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, *args: Any) -> None:
        self.path.touch()


def run_to_the_end(folder: Path, mode: str, every: str) -> None:
    """A run that goes on from its last checkpoint where there is one; it tells when training begins."""
    model, data = module(), StatefulLoader()
    settings: dict[str, Any] = {"mode": mode, "observer_freeze": 0.7, "batch_norm_freeze": 0.7}
    callback = quantization(folder, convert=every == "epochs", **settings)
    checkpoint = every_epoch(folder, save_top_k=2, monitor="step", mode="max", **EVERY[every])
    run = trainer(folder, callback, checkpoint, Began(folder / "began"), epochs=EPOCHS)
    run.fit(model, data, val_data(), ckpt_path="last")
    torch.save({"metrics": {k: float(v) for k, v in run.callback_metrics.items()}}, folder / "metrics.pt")
    run.save_checkpoint(folder / "end.ckpt")
    (folder / "done").touch()


def results(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights, ranges and INT8 outputs; and metrics."""
    end = torch.load(folder / "end.ckpt", weights_only=True)
    tensors = end["state_dict"] | end.get("lq", {"quantizers": {}})["quantizers"]
    if (folder / "int8").exists():
        tensors["logits"] = lq.load(folder / "int8" / "int8.pt2")(images(32, seed=5)[0])
    return tensors, torch.load(folder / "metrics.pt", weights_only=True)["metrics"]


def uninterrupted(folder: Path, mode: str, every: str) -> float:
    """Run without a kill, and return how long that took from the beginning of training."""
    folder.mkdir()
    process = start(run_to_the_end, folder, mode, every, output=folder / "output")
    finish(process, folder / "output")
    return (folder / "done").stat().st_mtime - (folder / "began").stat().st_mtime


def checkpoints_load(folder: Path) -> bool:
    """Whether each file that goes by the name of a checkpoint is one; False where there is none yet."""
    files = list((folder / "checkpoints").glob("*.ckpt"))
    for file in files:
        Wrapped.load_from_checkpoint(file, weights_only=True)
    return bool(files)


@pytest.mark.parametrize(
    ("mode", "every"),
    [
        ("qat", "epochs"),
        ("ptq", "batches"),
        pytest.param("qat", "batches", marks=pytest.mark.thorough),
        pytest.param("ptq", "epochs", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.support("Unhappy ends", "`kill -9` at any point: a loadable checkpoint, and an exactly resumable run")
def test_killed_runs_go_on_exactly(mode: str, every: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("kills")
    whole = tmp_path / "whole"
    seconds = uninterrupted(whole, mode, every)
    moments = random.Random(f"{mode} {every}")
    seen_checkpoints, kills, runs = False, 0, 0

    def is_enough() -> bool:
        # On another machine the moments are others: some run has to be killed after its first checkpoint.
        return kills >= wanted and (seen_checkpoints or kills >= wanted + _MORE)

    while not is_enough():
        # A run that has got to its end makes place for another one.
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        while not (folder / "done").exists() and not is_enough():
            (folder / "began").unlink(missing_ok=True)
            process = start(run_to_the_end, folder, mode, every, output=folder / "output")
            while not (folder / "began").exists() and process.is_alive():
                time.sleep(0.001)
            process.join(moments.uniform(0.0, seconds))
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            assert process.exitcode in (0, -9), (folder / "output").read_text()[-4000:]
            loadable = checkpoints_load(folder)
            assert loadable or not (folder / "checkpoints" / "last.ckpt").exists()
            seen_checkpoints |= loadable
            if process.exitcode == -9 and not KILLED_AGAIN[every]:
                break
        if not (folder / "done").exists():
            process = start(run_to_the_end, folder, mode, every, output=folder / "output")
            finish(process, folder / "output")
        (expected, metrics), (found, found_metrics) = results(whole), results(folder)
        assert_same(found, expected)
        # Killed in the conversion, it had no epoch left to have metrics of.
        assert found_metrics in (metrics, {})
    assert kills >= wanted
    assert seen_checkpoints
