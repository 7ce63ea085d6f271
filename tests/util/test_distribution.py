from __future__ import annotations

from importlib.metadata import metadata

import pytest

from lq.util import distribution


def test_what_messages_tell_to_install_is_the_project() -> None:
    project = metadata(distribution.NAME)
    assert distribution.package_version() == project["Version"]
    for extra in ("onnx", "openvino", "peers"):
        assert extra in (project.get_all("Provides-Extra") or [])
        assert distribution.install(extra) == f"pip install 'lightning-quantization[{extra}]'"


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "NAME", "no-such-distribution")
    assert distribution.package_version() == "unknown"
