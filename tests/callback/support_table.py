"""The table of what works together in the docs, made from the marks of the tests that show it.

``python tests/callback/support_table.py`` writes it into docs/support.md.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "support.md"
BEGIN = "<!-- support table: tests/callback/support_table.py writes it -->\n"
END = "<!-- end of the support table -->"


def rows() -> dict[str, dict[str, list[Path]]]:
    """The tests of each row of each section."""
    found: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(FOLDER.rglob("test_*.py"), key=lambda file: file.name):
        path = file.relative_to(FOLDER.parent)
        module = importlib.import_module(".".join(path.with_suffix("").parts))
        for name, function in vars(module).items():
            if name.startswith("test_") and function.__module__ == module.__name__:
                for section, row in _marks(function):
                    tests = found.setdefault(section, {}).setdefault(row, [])
                    if path not in tests:
                        tests.append(path)
    return found


def _marks(function: Any) -> Iterator[tuple[str, str]]:
    marks = list(getattr(function, "pytestmark", []))
    for mark in marks:
        if mark.name == "parametrize":
            marks += [inner for case in mark.args[1] for inner in getattr(case, "marks", ())]
        if mark.name == "support":
            yield mark.args


def table() -> str:
    lines = ["| | | shown by |", "|---|---|---|"]
    for section, tests_of in sorted(rows().items()):
        for index, (row, tests) in enumerate(tests_of.items()):
            links = ", ".join(f"[{test.name}](../tests/{test.as_posix()})" for test in tests)
            lines.append(f"| {section if index == 0 else ''} | {row} | {links} |")
    return "\n".join(lines) + "\n"


def in_docs() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
