"""Export: an INT8 network leaves as a file."""

from lq.export.aoti import CompilerError
from lq.export.export import FORMATS, ExportResult, Format, check_dependencies, export
from lq.export.verify import ExportMismatchError, Verification

__all__ = [
    "FORMATS",
    "CompilerError",
    "ExportMismatchError",
    "ExportResult",
    "Format",
    "Verification",
    "check_dependencies",
    "export",
]
