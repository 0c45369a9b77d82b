"""report.html and figures/ of a run folder, whole or as they were."""

from pathlib import Path

from ..results.saved import load_run
from ..store import whole_folder, write_whole
from .charts import figures
from .page import report_html
from .render import write_figures


def write_report(folder: Path) -> Path:
    """Write report.html and figures/ from what the run folder contains; returns the report's path.

    Both are complete before either is replaced, so that no reader finds half a report. Raises
    InputError for a folder that is no run's, or of another version.
    """
    run = load_run(folder)
    charts = figures(run)
    html = report_html(run, charts)
    path = folder / "report.html"

    def write(target: Path) -> None:
        target.write_text(html, encoding="utf-8")
        with whole_folder(folder / "figures") as made:
            write_figures(charts.values(), made)

    write_whole(path, write)
    return path
