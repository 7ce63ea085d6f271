"""A recipe runs as a module, as a file, and by the console command."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lq.recipes.__main__ import main, recipes

FOLDER = Path(__file__).parents[2] / "recipes"
WAYS = {
    "module": [sys.executable, "-m", "lq.recipes.inspect_file"],
    "file": [sys.executable, str(FOLDER / "inspect_file.py")],
    "command": [str(Path(sysconfig.get_path("scripts")) / "lq-recipe"), "inspect_file"],
    "package": [sys.executable, "-m", "lq.recipes", "inspect_file"],
}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs_the_recipe(way: str) -> None:
    ran = run([*WAYS[way], "--help"])
    assert ran.returncode == 0, ran.stderr
    assert "What is in a quantized model's file" in ran.stdout


def test_no_recipe_hides_a_module_of_the_standard_library() -> None:
    # `python recipes/NAME.py` puts their folder in front of all others.
    assert not recipes().keys() & sys.stdlib_module_names


def test_the_command_names_the_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lq-recipe"])
    assert main() == 0
    listed = capsys.readouterr().out
    assert all(name in listed and line in listed for name, line in recipes().items())
    monkeypatch.setattr(sys, "argv", ["lq-recipe", "cifar_resnet81"])
    assert str(main()).startswith("recipe 'cifar_resnet81' is unknown; choose one of bench_calibration")
