"""Where a run is logged beside its folder."""

from typing import Literal, TypeAlias

from pydantic import Field

from .section import Section, Text

SinkName: TypeAlias = Literal["tensorboard", "wandb", "trackio"]


class LogConfig(Section):
    """Programs that a finished run is logged to, beside its folder."""

    to: tuple[SinkName, ...] = Field(
        (),
        description='Any of "tensorboard", "wandb" (Weights & Biases), "trackio", each an extra of the '
        "same name: scalars at the checkpoint's step, the table of the sweep, the report. [] is off.",
    )
    project: str = Field(
        "funcprobe",
        pattern=r"^\w[\w.-]*$",
        max_length=100,
        description="Project of Weights & Biases and of Trackio; the run's name there is run.name.",
    )
    group: Text | None = Field(
        None,
        description="Group of the run in that project, as one training run with several checkpoints.",
        examples=["grpo-lr-1e-5"],
    )
    folder: Text | None = Field(
        None,
        description="TensorBoard's folder. Default: tensorboard/ in the run folder. Runs of several "
        "checkpoints that share one are points of the same curves.",
        examples=["runs/tensorboard"],
    )
