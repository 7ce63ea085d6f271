"""What the Trainer's loggers are given."""

from lq.callback.logging.hparams import make_room
from lq.callback.logging.ranges import RangeLog
from lq.callback.logging.result import log_result

__all__ = ["RangeLog", "log_result", "make_room"]
