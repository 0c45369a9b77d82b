"""What people look at: report.html and figures/ of a run folder, compare.html of several."""

from .write import write_report

__all__ = ["write_report"]
