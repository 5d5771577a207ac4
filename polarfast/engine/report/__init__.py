"""One self-contained HTML page about one run or several side by side."""

from polarfast.engine.report.page import write_report

__all__ = ["write_report"]
