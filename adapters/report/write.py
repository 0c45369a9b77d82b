"""report.html and figures/ of a run folder, whole or as they were."""

import shutil
import tempfile
from pathlib import Path

from ..results.saved import load_run
from ..store import write_whole
from .charts import figures
from .page import report_html
from .render import write_figures


def write_report(folder: Path) -> Path:
    """Write report.html and figures/ from what the run folder contains; returns the report's path.

    Raises InputError for a folder that is no run's, or of another version.
    """
    run = load_run(folder)
    charts = figures(run)
    html = report_html(run, charts)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "figures"
        made.mkdir()
        write_figures(charts.values(), made)
        shutil.rmtree(folder / "figures", ignore_errors=True)
        made.rename(folder / "figures")
    path = folder / "report.html"

    def write(target: Path) -> None:
        target.write_text(html, encoding="utf-8")

    write_whole(path, write)
    return path
