"""What a user sees: TensorBoard and the page of a finished run, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.board import tensorboard
from helpers.browser import Browser, find_browser
from helpers.finished_run import BROKEN, FinishedRun

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def board(ptq_run: FinishedRun) -> Iterator[str]:
    with tensorboard(ptq_run.tensorboard) as url:
        yield url


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Screenshots lie here for a person to look at."""
    return tmp_path_factory.mktemp("shots")


def show(browser: Browser, board: str, view: str) -> None:
    browser.open("about:blank")  # a change of the part behind # alone would load nothing
    browser.open(f"{board}#{view}")


def test_scalar_cards(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "timeseries")
    browser.wait_for_elements("scalar-card", 2)
    browser.wait_for_text("drop /val_acc")
    browser.screenshot(shots / "scalars.png")


def test_custom_scalars(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "custom_scalars")
    browser.wait_for_text("float and INT8", "what INT8 cost and bought", "latency_p50_ms")
    browser.screenshot(shots / "custom_scalars.png")


def test_histograms(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "histograms")
    browser.wait_for_text("weights/3/float", "weights/3/int8")
    browser.wait_for_elements("tf-histogram-loader", 6)
    browser.screenshot(shots / "histograms.png")


def test_figures(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "images")
    browser.wait_for_text("quantization/sqnr", "quantization/sensitivity", "quantization/latency")
    browser.wait_for_elements("img", 3)
    browser.screenshot(shots / "figures.png")


def test_graph(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "graphs")
    browser.wait_for_text("Main Graph")
    browser.wait_for_elements("g.node", 8)
    browser.screenshot(shots / "graph.png")


def test_text(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "text")
    browser.wait_for_text("quantization/advice", "leave in float", "gain in float, dB")
    browser.screenshot(shots / "text.png")


def test_hparams_row(browser: Browser, board: str, shots: Path) -> None:
    show(browser, board, "hparams")
    browser.wait_for_text("Trial ID", "calibrator", "minmax", "x86_avx2", "ptq", "int8/val_acc")
    browser.screenshot(shots / "hparams.png")


def first_cells(browser: Browser) -> list[str]:
    cells: list[str] = browser.run(
        "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[0].innerText)"
    )
    return cells


def test_page(browser: Browser, ptq_run: FinishedRun, shots: Path) -> None:
    browser.errors.clear()
    browser.open((ptq_run.int8 / "int8.html").as_uri())
    browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
    assert browser.count("figure") >= 5
    assert browser.run("document.querySelector('pre').innerText").startswith("QuantizationCallback(overrides={")
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.screenshot(shots / f"page_{scheme}.png", whole=True)
    # Nothing was asked for but the file itself; data URIs are no requests of the network.
    assert browser.run("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    assert browser.errors == []


def test_page_follows_light_and_dark(browser: Browser, ptq_run: FinishedRun) -> None:
    browser.open((ptq_run.int8 / "int8.html").as_uri())
    browser.run("document.images[0].scrollIntoView()")
    seen = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        # The browser sees to the picture's source a moment after the colours; which one it had before
        # depends on the test before.
        dark = "document.images[0].currentSrc === document.images[0].parentElement.querySelector('source').srcset"
        browser.wait_for(f"document.images[0].complete && ({dark}) === {str(scheme == 'dark').lower()}")
        seen[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    assert seen["light"] != seen["dark"]


def test_table_is_sorted_by_a_click_and_by_the_keyboard(browser: Browser, ptq_run: FinishedRun) -> None:
    browser.open((ptq_run.int8 / "int8.html").as_uri())
    harm = first_cells(browser)
    assert harm[0] == BROKEN
    browser.click("table.sortable th button")  # by name
    assert first_cells(browser) == sorted(harm)
    assert browser.run("document.querySelector('table.sortable th').getAttribute('aria-sort')") == "ascending"
    browser.click("table.sortable th button")
    assert first_cells(browser) == sorted(harm, reverse=True)
    browser.run("document.querySelectorAll('table.sortable th button')[3].focus()")  # gain in float
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    assert first_cells(browser)[0] == BROKEN
    assert first_cells(browser)[-1] == "6"  # the pooling, of which nothing is measured
