"""What docs/support.md says works together is what the tests show."""

from __future__ import annotations

from callback.support_table import in_docs, rows, table


def test_the_page_has_a_row_for_each_test_and_a_test_for_each_row() -> None:
    assert in_docs() == table(), "run: python tests/callback/support_table.py"
    assert set(rows()) == {
        "Best weights",
        "Callbacks",
        "Checkpoints",
        "Modules",
        "Precision",
        "Reuse",
        "Several processes",
        "Training",
        "Unhappy ends",
    }
