"""Configuration of the run itself, the policy and its optimizer."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from funcprobe.types import Rule

from ..machine.precision import Precision, dtype_of
from .section import Positive, Section, Text, size_or_auto

Decay = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Section):
    """Run folder, seed, device and size of microbatches."""

    name: str = Field(
        "probe", pattern=r"^\w[\w.-]*$", max_length=100, description="Name of the run's folder."
    )
    folder: Text = Field(
        "runs",
        description="Parent folder of the runs. As every path here it is relative to the folder of the "
        "file in which it is written; with --set, and by default, to the current directory.",
    )
    seed: int = Field(0, ge=0, description="Seed of prompts and sampling: same seed, same batches.")
    device: str = Field("auto", description='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".')
    max_tokens: Positive | Literal["auto"] = Field(
        "auto",
        description='Largest number of tokens in a microbatch; more need more memory. "auto": as many '
        "as fit into half of the free memory, found by trials, or by an earlier run's.",
    )
    cache_size: float = Field(
        20.0,
        gt=0,
        description="GiB that stored stages (in .stages of run.folder) may take: at the end of a run "
        "those least recently used are deleted, of runs in progress none.",
    )
    cache_days: float = Field(
        30.0, gt=0, description="Stored stages that were not used for so many days are deleted, too."
    )
    report: bool = Field(
        True,
        description="Write report.html and figures/ into the run folder; if not, `funcprobe report` "
        "writes them later.",
    )

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _size_or_auto(cls, value: Any) -> Any:
        return size_or_auto(value)


class PolicyConfig(Section):
    """The checkpoint: base model and LoRA adapter, or a whole model."""

    checkpoint: Text = Field(
        "toy",
        description="Folder (or hub id) with the adapter, or folder with a whole model, all of it "
        'trained; "toy": the built-in policy.',
    )
    base: Text | None = Field(
        None,
        description="Base model; default: the one saved with the adapter.",
        examples=["Qwen/Qwen2.5-0.5B-Instruct"],
    )
    revision: Text | None = Field(
        None,
        description="Branch, tag or commit of the base on the hub; default: the one saved with the "
        "adapter, if the base is the adapter's own.",
        examples=["main"],
    )
    adapter: str = Field(
        "default",
        pattern=r"^[^.]+$",  # it becomes the name of a torch module
        description='Name of the adapter; unless "default", it is in the subfolder of that name.',
    )
    mode: Literal["lora", "qlora"] = Field(
        "lora",
        description='"lora"; or "qlora": base in 4-bit NF4, quantised on loading or saved so.',
    )
    precision: Precision | None = Field(
        None,
        description='"reference": float64 throughout; "standard": float32; "fast": matrix products of '
        "bfloat16 operands (TF32 on a GPU), for predictions only. Default: determined by dtype.",
        examples=["standard"],
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="Of the model; in half precision rounding exceeds most measured changes."
    )
    device_map: Literal["auto"] | dict[str, int | str] | None = Field(
        None,
        description='Layers on several GPUs: "auto" (by their free memory), or a table of modules and '
        "GPUs, as transformers takes it; default: the whole model on run.device.",
        examples=["auto"],
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel; second derivatives use one that supports them."
    )
    trust_remote_code: bool = Field(False, description="Execute modelling code from the hub.")
    max_trainable: Positive = Field(50_000_000, description="More trainable parameters are rejected.")

    @field_validator("device_map", mode="before")
    @classmethod
    def _auto_or_table(cls, value: Any) -> Any:
        if value is not None and value != "auto" and not isinstance(value, dict):
            raise ValueError('"auto", or a table of modules and GPUs, is expected')
        return value

    @model_validator(mode="before")
    @classmethod
    def _dtype_of_the_precision(cls, table: Any) -> Any:
        return dtype_of(table) if isinstance(table, dict) else table


class OptimizerConfig(Section):
    """Adam's state, and the rule for the direction v from it and the gradient Y on U."""

    state: Text | None = Field(
        None,
        description="File or folder with the optimizer state; default: in the checkpoint.",
        examples=["outputs/checkpoint-500/optimizer.pt"],
    )
    accept_positional: bool = Field(
        False,
        description="Trust the order of a state without names if the gradients on U do not confirm it.",
    )
    rule: Rule = Field(
        "adamw",
        description='Direction v. "adamw": the exact next step; "precondition": Y/(sqrt(nu)+eps), nu '
        'as saved, no momentum; "sgd": Y.',
    )
    max_grad_norm: float | None = Field(
        None,
        ge=0,
        description="Gradient clipping, as in training; 0: off; default: the value in "
        "optimizer_param_names.json, else 1.",
        examples=[1.0],
    )
    lr: float | None = Field(
        None, gt=0, description="Learning rate of the step; default: the state's.", examples=[1e-6]
    )
    betas: tuple[Decay, Decay] | None = Field(
        None, description="Adam's; default: the state's.", examples=[[0.9, 0.999]]
    )
    eps: float | None = Field(None, gt=0, description="Adam's; default: the state's.", examples=[1e-8])
    weight_decay: float | None = Field(
        None, ge=0, le=1e3, description="Default: the state's.", examples=[0.0]
    )
    checkpoint_step: int | None = Field(
        None,
        ge=0,
        description="Steps taken, if the state has none (for bias correction).",
        examples=[500],
    )
    min_coverage: float = Field(
        0.9, ge=0, le=1, description="Least share of parameters with Adam's moments (coverage)."
    )
    on_low_coverage: Literal["stop", "identity"] = Field(
        "stop", description='Below min_coverage: "stop", or "identity": v = Y, with a warning.'
    )
    max_update: float | None = Field(
        None,
        gt=0,
        description='Bound of the entries of |P Y|, rule "precondition"; default: none.',
        examples=[1.0],
    )
