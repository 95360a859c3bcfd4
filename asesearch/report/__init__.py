"""From stored trials to tables, figures and pages: `write_report`, `compare` (level 7)."""

from asesearch.report.comparing import compare
from asesearch.report.page import write_report

__all__ = ["compare", "write_report"]
