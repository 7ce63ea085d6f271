"""Reach an accuracy: calibrators and PTQ methods in turn, then the most harmful layers back to float."""
