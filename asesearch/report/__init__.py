"""From stored trials to tables, figures and one page: `write_report` (level 5)."""

from asesearch.report.page import write_report

__all__ = ["write_report"]
