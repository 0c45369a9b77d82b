"""report.html: a run as one page."""

from markupsafe import Markup

from ..results.saved import SavedRun
from .charts import figures
from .document import ENVIRONMENT, asset, document
from .figure import Figure
from .render import inline_svg
from .responses import responses
from .theme import css_variables


def report_html(run: SavedRun, charts: dict[str, Figure] | None = None) -> str:
    """The page, self-contained; `charts`: its figures, if they are made already."""
    charts = figures(run) if charts is None else charts
    text = responses(run)
    body = ENVIRONMENT.get_template("report.html.j2").render(
        name=run.folder.name,
        results=run.results,
        figures=charts,
        svg=lambda figure: Markup(inline_svg(figure)),
        responses=text.html,
    )
    styles = css_variables() + asset("page.css") + text.styles
    return document(f"funcprobe: {run.folder.name}", Markup(body), styles=styles, script=text.script)
