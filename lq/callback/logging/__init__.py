"""What the Trainer's loggers are given."""

from lq.callback.logging.hparams import drop_hp_metric
from lq.callback.logging.ranges import RangeLog
from lq.callback.logging.result import log_result

__all__ = ["RangeLog", "log_result", "drop_hp_metric"]
