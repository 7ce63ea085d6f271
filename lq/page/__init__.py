"""The report as one HTML file that needs nothing else."""

from lq.page.document import Table, page
from lq.page.result_page import result_page

__all__ = ["Table", "page", "result_page"]
