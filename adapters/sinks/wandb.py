"""Weights & Biases: a run of its own; online, offline or disabled as its environment variables say."""

from pathlib import Path

from .logged import PREFIX, Logged


def prepare() -> None:
    """Log in, unless it is offline, so that a wrong key is found before the run and not after it."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    wandb.login(verify=True)


def write(run: Logged, folder: Path) -> str:  # noqa: ARG001  its own, by WANDB_DIR
    """Scalars, table and figures as one step of a run; the report as an artifact of it."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(
        project=run.project,
        name=run.name,
        group=run.group,
        job_type="funcprobe",
        config=run.config,
        notes=run.headline,
        reinit="create_new",
        settings=settings,
    ) as online:
        figures = {
            f"{PREFIX}/figures/{picture.name}": wandb.Image(str(picture.file), caption=picture.caption)
            for picture in run.pictures
        }
        sweep = wandb.Table(columns=list(run.columns), data=run.rows)
        online.log({**run.scalars, f"{PREFIX}/sweep": sweep, **figures}, step=run.step)
        artifact = wandb.Artifact(f"{run.name}-report", type="report", description=run.headline)
        for path in run.files:
            artifact.add_file(str(path))
        online.log_artifact(artifact)
        if online.settings.mode == "disabled":
            return "disabled by WANDB_MODE"
        if online.settings.mode in {"offline", "dryrun"}:
            return f"wandb sync {online.settings.sync_dir}"
        return str(online.url)
