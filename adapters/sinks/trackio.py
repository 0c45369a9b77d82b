"""Trackio: a run in its local database, or where its environment variables say."""

import io
from contextlib import redirect_stdout
from pathlib import Path

from .logged import PREFIX, Logged


def prepare() -> None:
    """The database is the user's own; a Space or a server is known when it is logged to."""


def write(run: Logged, folder: Path) -> str:  # noqa: ARG001  its own, by TRACKIO_DIR
    """Scalars, table and figures as one step of a run; the report as an artifact of it."""
    import trackio

    with redirect_stdout(io.StringIO()):  # a line for each call
        online = trackio.init(
            project=run.project,
            name=run.name,
            group=run.group,
            config=run.config,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        try:
            figures = {
                f"{PREFIX}/figures/{picture.name}": trackio.Image(picture.file, caption=picture.caption)
                for picture in run.pictures
            }
            sweep = trackio.Table(columns=list(run.columns), data=run.rows)
            online.log({**run.scalars, f"{PREFIX}/sweep": sweep, **figures}, step=run.step)
            artifact = trackio.Artifact(f"{run.name}-report", type="report", description=run.headline)
            for path in run.files:
                artifact.add_file(path)
            online.log_artifact(artifact)
        finally:
            trackio.finish()  # type: ignore[no-untyped-call]
    return f"trackio show --project {run.project}"
