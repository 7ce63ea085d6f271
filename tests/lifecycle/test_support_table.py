"""What README.md says works together is what the tests show."""

from __future__ import annotations

from lifecycle.support_table import in_readme, rows, table


def test_readme_has_a_row_for_each_test_and_a_test_for_each_row() -> None:
    assert in_readme() == table(), "run: python tests/lifecycle/support_table.py"
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
