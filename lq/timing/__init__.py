"""Timing: contenders that take turns."""
