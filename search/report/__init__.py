"""The report: one self-contained HTML file about a finished search."""

from __future__ import annotations

from search.report.page import ReportContent, write_report

__all__ = ["ReportContent", "write_report"]
