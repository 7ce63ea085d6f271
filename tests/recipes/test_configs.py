"""Every file in ``configs`` is one that its recipe takes, and says so in its first lines."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from lq.recipes.blocks.config import parse

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_is_valid(path: Path) -> None:
    command = re.search(r"^#   python -m lq\.recipes\.(\w+) --config configs/(\S+)", path.read_text(), re.MULTILINE)
    assert command is not None, "no command in the header"
    recipe, name = command.groups()
    assert name == path.name
    assert path.stem.startswith(recipe)
    config_cls = importlib.import_module(f"lq.recipes.{recipe}").Config
    parsed = parse(config_cls, ["--config", str(path)]).config
    assert parsed != config_cls(), "changes nothing"
