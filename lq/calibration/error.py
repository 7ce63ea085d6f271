"""What is wrong with calibration data."""


class CalibrationError(ValueError):
    """The calibration data give no usable ranges."""
