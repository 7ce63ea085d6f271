"""Files that belong together: the old set or the new one, whenever a process is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lq.util import file_sets, files
from lq.util.file_sets import recover, replaced_as_a_whole
from lq.util.files import write_atomically, write_text

NAMES = ("a", "b", "last")


def write(folder: Path, content: dict[str, str]) -> None:
    with replaced_as_a_whole(folder, NAMES) as new:
        for name, text in content.items():
            write_text(new / name, text)


def read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.iterdir()) if file.is_file()}


OLD = {"a": "old", "b": "old", "last": "old"}
NEW = {"a": "new", "last": "new"}


def killed_after(lines: int, folder: Path) -> bool:
    """Write the new set in a process that is killed after so many lines of the modules; whether it was."""
    watched, left = {file_sets.__file__, files.__file__}, lines

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    child = os.fork()
    if child == 0:
        sys.settrace(count)
        try:
            write(folder, NEW)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture(params=["one step", "two renames", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What different systems let a folder be replaced with."""
    if request.param != "one step":
        monkeypatch.setattr(file_sets, "_exchange", lambda a, b: False)
    if request.param == "one by one":
        monkeypatch.setattr(file_sets, "_is_replaceable", lambda folder, names: False)
    return request.param  # type: ignore[return-value]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_line(way: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seen, lines = set(), 0
    while True:
        # A process for each line takes long: without --thorough it is every third one.
        lines += 1 if pytestconfig.getoption("--thorough") else 3
        parent = tmp_path / str(lines)
        folder = parent / "int8"
        write(folder, OLD)
        (folder / "mine").write_text("mine")
        was_killed = killed_after(lines, folder)
        if way == "two renames" and not folder.exists():
            recover(folder, NAMES)  # as the next run does before anything else
        found = read(folder)
        assert found.pop("mine") == "mine"
        if way == "one by one":
            # The last one is there only with those that it belongs to.
            assert "last" not in found or found in (OLD, NEW), lines
        else:
            assert found in (OLD, NEW), lines
        seen.add(found.get("last"))
        write(folder, {"b": "next", "last": "next"})
        assert read(folder) == {"b": "next", "last": "next", "mine": "mine"}
        for place in (parent, folder):
            # Killed between making its folder and locking it, it is let alone for a minute: it could be alive.
            unlocked = [entry for entry in place.glob(".int8.lq-*") if not (entry / ".lock").exists()]
            assert len(list(place.glob(".int8.lq-*"))) == len(unlocked) <= 1, lines
        if not was_killed:
            break
    assert lines > 50
    assert {"old", "new"} <= seen


def test_others_stay(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    write(folder, OLD)
    (folder / "notes.txt").write_text("mine")
    (folder / "elsewhere").symlink_to(tmp_path / "nowhere")
    folder.chmod(0o751)
    inode = (folder / "notes.txt").stat().st_ino
    write(folder, NEW)
    assert read(folder) == NEW | {"notes.txt": "mine"}
    assert (folder / "notes.txt").stat().st_ino == inode
    assert (folder / "elsewhere").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o751
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.txt").write_text("mine")
    write(folder, OLD)
    assert read(folder) == OLD | {"notes.txt": "mine"}
    assert (folder / "sub" / "deep.txt").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["int8"]


def test_what_comes_in_the_middle_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "int8"
    write(folder, OLD)
    exchange = file_sets._exchange

    def late(a: Path, b: Path) -> bool:
        (folder / "late.txt").write_text("mine")
        return exchange(a, b)

    monkeypatch.setattr(file_sets, "_exchange", late)
    write(folder, NEW)
    assert read(folder) == NEW | {"late.txt": "mine"}


def test_an_error_changes_nothing(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    write(folder, OLD)
    with pytest.raises(TypeError):
        write(folder, NEW | {"b": 3})  # type: ignore[dict-item]
    assert read(folder) == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["int8"]


def test_links(way: str, tmp_path: Path) -> None:
    """One to the folder stays one, those in the place of its files are replaced, and what they lead to stays."""
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    for name in NAMES:
        (real / name).symlink_to(tmp_path / "precious")
    (tmp_path / "int8").symlink_to(real)
    write(tmp_path / "int8", NEW)
    assert (tmp_path / "int8").is_symlink()
    assert read(real) == NEW
    assert not any((real / name).is_symlink() for name in NAMES)
    assert (tmp_path / "precious").read_text() == "precious"


def test_one_file_in_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "page").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "page", "new")
    assert not (tmp_path / "page").is_symlink()
    assert (tmp_path / "page").read_text() == "new"
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_killed_process_was_writing_goes_with_the_next(tmp_path: Path) -> None:
    def die(beside: Path) -> None:
        beside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_atomically(tmp_path / "file", die)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1

    def another_process(beside: Path) -> None:  # what is being written is no leftover
        write_text(tmp_path / "file", "other")
        beside.write_text("mine")

    write_atomically(tmp_path / "file", another_process)
    assert read(tmp_path) == {"file": "mine"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_in_one_that_cannot_be_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "locked" / "int8"
    write(folder, OLD)
    folder.parent.chmod(0o555)
    try:
        write(folder, NEW)
        assert read(folder) == NEW
    finally:
        folder.parent.chmod(0o755)
