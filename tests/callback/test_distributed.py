"""Two processes, started by Lightning and by torchrun: one model, and no process that waits in vain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

import lq
from helpers.classifiers import Wrapped, images
from helpers.runs import module, quantization, train_data, trainer, val_data
from helpers.scripts import distributed_fit

SCRIPT = distributed_fit.__file__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT), str(folder)]
    scenarios = ["ptq", "max_drop", "qat", "failure_in_the_first_process", "failure_in_the_second_process"]
    run = subprocess.run(
        [sys.executable, *torchrun, *scenarios],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture
def found(folder: Path) -> list[dict[str, Any]]:
    """What each process wrote."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.support("Several processes", '`strategy="ddp"`, PTQ, `torchrun`: calibrated on all shards, one INT8 model')
def test_ptq(found: list[dict[str, Any]], folder: Path) -> None:
    first, second = (run["ptq"] for run in found)
    assert first["int8"] and second["int8"]
    assert first["logits"] == second["logits"]
    assert lq.load(folder / "ptq" / "int8" / "int8.pt2")(images(16, seed=7)[0]).tolist() == first["logits"]


@pytest.mark.support(
    "Several processes", "The first process judges alone, on all data, also with metrics that synchronise"
)
def test_the_first_process_judges_on_all_data(found: list[dict[str, Any]], folder: Path) -> None:
    first, second = (run["ptq"] for run in found)
    assert second["metrics"] is None
    best = json.loads((folder / "ptq" / "int8" / "int8.json").read_text())["weights"].rpartition(", ")[2]
    model = Wrapped()
    state = torch.load(best, weights_only=True)["state_dict"]
    model.load_state_dict(state, strict=False)
    (alone,) = trainer(folder).validate(model, val_data(), verbose=False)
    assert first["metrics"]["val_acc"] == first["metrics"]["accuracy"] == pytest.approx(alone["val_acc"])
    assert first["metrics"]["val_loss"] == pytest.approx(alone["val_loss"])
    assert first["metrics"]["spread"] == 1.0


@pytest.mark.support(
    "Several processes", "`max_drop`: the first process searches, the others take over what it has found"
)
def test_the_first_process_searches(found: list[dict[str, Any]], folder: Path) -> None:
    first, second = (run["max_drop"] for run in found)
    assert first["int8"] and second["int8"]
    tuning = lq.Tuning.from_dict(first["tuning"])
    assert second["tuning"] is None
    assert len(tuning.steps) > 2 and tuning.step.drop == min(step.drop for step in tuning.steps)
    # Weights, ranges and the layers in float are the same.
    assert first["logits"] == second["logits"]
    assert lq.load(folder / "max_drop" / "int8" / "int8.pt2")(images(16, seed=7)[0]).tolist() == first["logits"]


@pytest.mark.support("Several processes", "QAT: the same ranges in all processes, from the batches of all of them")
def test_qat_ranges(found: list[dict[str, Any]]) -> None:
    first, second = (run["qat"] for run in found)
    assert first["ranges"] == second["ranges"]
    assert first["logits"] == second["logits"]

    for index in (0, 1):  # minima, maxima of the input, which does not depend on the weights
        steps = [(a[index] + b[index]) / 2 for a, b in zip(first["seen"], second["seen"], strict=True)]
        assert len(steps) < 100
        average = sum(steps) / len(steps)
        assert first["ranges"]["input"][1 + index] == pytest.approx(average, rel=1e-5)
    assert first["seen"] != second["seen"]


@pytest.mark.support("Several processes", "A failure in one ends all, with its reason; the float weights are kept")
@pytest.mark.parametrize(
    ("scenario", "failing", "reason"),
    [
        ("failure_in_the_first_process", 0, "no space left in this test"),
        ("failure_in_the_second_process", 1, "a broken image in this test"),
    ],
)
def test_a_failure_ends_all(
    scenario: str, failing: int, reason: str, found: list[dict[str, Any]], folder: Path
) -> None:
    errors = [run[scenario]["error"] for run in found]
    assert errors[failing] == reason
    assert errors[1 - failing].endswith(f"failed in process {failing}: RuntimeError: {reason}")
    assert not any(run[scenario]["int8"] for run in found)
    weights = folder / scenario / "int8" / "unconverted.ckpt"
    kept = Wrapped.load_from_checkpoint(weights).eval()
    with torch.no_grad():
        assert kept(images(16, seed=7)[0]).tolist() == found[0][scenario]["logits"] == found[1][scenario]["logits"]


SPAWNED = r"starts processes of its own.*strategy='ddp' in a script, torchrun, or devices=1"


@pytest.mark.support("Several processes", "`ddp_spawn`, `ddp_fork`, `ddp_notebook`: refused at once, with what to use")
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_processes_that_end_with_fit_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=SPAWNED):
        trainer(tmp_path, quantization(tmp_path), devices=2, strategy=strategy).fit(module(), train_data())


def test_spawned_processes_are_refused(tmp_path: Path) -> None:
    callback = quantization(tmp_path)
    with pytest.raises(ValueError, match=SPAWNED):  # what each of them would be told once it has started
        callback.setup(trainer(tmp_path, callback, devices=2, strategy="ddp_spawn"), module(), "fit")


class DeepSpeedStrategy(DDPStrategy):
    """Lightning's own cannot be made without the package."""


@pytest.mark.support("Several processes", "FSDP, DeepSpeed, ModelParallel: refused at once, with what to use")
@pytest.mark.parametrize("cls", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_models_are_refused(cls: type, tmp_path: Path) -> None:
    class Sharded(Callback):
        """Puts the strategy in place where the Trainer would refuse it for want of a GPU."""

        def setup(self, run: Trainer, pl_module: LightningModule, stage: str) -> None:
            strategy = cls()
            strategy.accelerator = run.strategy.accelerator
            strategy.cluster_environment = LightningEnvironment()
            strategy._lightning_module = pl_module
            run._accelerator_connector.strategy = strategy

    run = trainer(tmp_path, Sharded(), quantization(tmp_path))
    with pytest.raises(ValueError, match=f"does not work with {cls.__name__}.*strategy='ddp'. or a single device"):
        run.fit(module(), train_data())
