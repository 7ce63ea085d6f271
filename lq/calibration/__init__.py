"""From data, or from statistics kept of them, to ranges."""

from lq.calibration.calibrate import calibrate
from lq.calibration.comparison import CalibratorComparison, compare_calibrators
from lq.calibration.error import CalibrationError
from lq.calibration.ranges import RangeTable, ranges
from lq.calibration.recalibrate import recalibrate
from lq.calibration.statistics import load_statistics, save_statistics

__all__ = [
    "CalibrationError",
    "CalibratorComparison",
    "RangeTable",
    "calibrate",
    "compare_calibrators",
    "load_statistics",
    "ranges",
    "recalibrate",
    "save_statistics",
]
