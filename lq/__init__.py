"""Lightning Quantization: a float PyTorch Lightning image classifier to INT8, with one callback."""

from lq.calibrate import calibrate
from lq.convert import convert
from lq.prepare import prepare, unprepare
from lq.report import report

__all__ = ["calibrate", "convert", "prepare", "report", "unprepare"]
