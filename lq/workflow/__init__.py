"""Prepare, calibrate, convert, report: the steps from a float module to its INT8 network."""
