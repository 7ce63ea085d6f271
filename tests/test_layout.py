"""The folders of the package: which may import which, and that every module can be reached by its name."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lq

ROOT = Path(lq.__file__).parent

#: From the bottom to the top: a folder imports from those before it, and only from what stands here.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "util": {"errors"},
    "numerics": {"errors", "util"},
    "schemes": {"errors", "util", "numerics"},
    "interface": {"errors", "util"},
    "results": {"errors", "util"},
    "graph": {"errors", "util", "numerics", "schemes", "interface"},
    "int8": {"errors", "util", "numerics", "interface", "results", "graph"},
    "workflow": {"errors", "util", "numerics", "schemes", "interface", "results", "graph", "int8"},
    "formats": {"errors", "util", "interface", "graph", "int8"},
    "engines": {"errors", "util", "interface", "results", "int8", "formats"},
    "deployment": {"errors", "util", "schemes", "interface", "graph", "int8", "workflow", "formats", "engines"},
    "timing": {"errors", "util", "graph", "workflow", "deployment"},
    "analysis": {"errors", "util", "numerics", "schemes", "results", "graph", "int8", "workflow"},
    "tuning": {
        *("errors", "util", "numerics", "schemes", "results", "graph", "int8", "workflow"),
        *("deployment", "timing", "analysis"),
    },
    "charts": {"errors", "util", "numerics", "results"},
    "page": {"errors", "util", "results", "charts"},
    "data": {"errors", "util"},
    "models": {"errors", "util"},
    "callback": {
        *("errors", "util", "numerics", "schemes", "interface", "results", "graph", "int8", "workflow"),
        *("deployment", "timing", "analysis", "tuning", "charts", "page"),
    },
    "recipes": {
        *("errors", "util", "numerics", "schemes", "results", "workflow", "deployment", "timing"),
        *("page", "data", "models", "callback"),
    },
}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("lq", *(part for part in parts if part != "__init__")))
        if path != ROOT / "__init__.py":
            yield name, path


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            # What is imported may be a module as well.
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module != "lq")}
    return {module for module in modules if module.startswith("lq.")}


def test_folders_are_listed_from_the_bottom_up() -> None:
    below: set[str] = set()
    for folder, allowed in ARROWS.items():
        assert allowed <= below, f"{folder} stands before {allowed - below}"
        below.add(folder)


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in _modules()])
def test_imports_follow_the_arrows(name: str, path: Path) -> None:
    folder = name.split(".")[1]
    assert folder in ARROWS, f"{folder} has no place in the order of folders"
    imported = {module.split(".")[1] for module in _imports(path)} - {folder}
    assert imported <= ARROWS[folder], f"{name} imports from {sorted(imported - ARROWS[folder])}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for annotations count, too: what two modules say of each other is hard to understand, or to change."""
    paths = dict(_modules())
    imports = {name: _imports(path) & (paths.keys() - {name}) for name, path in paths.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_public_name_hides_a_module() -> None:
    hidden = []
    for name, _ in _modules():
        parent, _, last = name.rpartition(".")
        module = importlib.import_module(name)
        if getattr(importlib.import_module(parent), last) is not module:
            hidden.append(name)
    assert not hidden


def test_public_names_are_there() -> None:
    for name in lq.__all__:
        assert getattr(lq, name) is not None
