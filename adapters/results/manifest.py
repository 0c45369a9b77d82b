"""manifest.json: what a run was made with, so that it can be repeated and traced."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..machine.devices import where
from ..machine.versions import versions
from .quantity import Section

if TYPE_CHECKING:
    from ..stages.plan import Plan

SCHEMA_VERSION = 1


class OptimizerState(Section):
    """How the optimizer's state was read and attached to the parameters."""

    path: str
    """File or folder of the state."""
    format: str
    """The program that wrote it."""
    route: str
    """How parameters got their names."""
    positional: bool
    """Whether names rest on replaying the order in which the trainer grouped the parameters."""
    twins: int
    """Parameters that nothing but their position distinguishes from another of the same shape."""
    parameters: int
    """Trainable tensors of the policy."""
    coverage: dict[str, int]
    """Of these, how many have exp_avg_sq, exp_avg, step in the state."""
    sidecar: str | None
    """Path of optimizer_param_names.json, where there is one."""
    notes: tuple[str, ...]
    """What was assumed or found while reading it."""
    certainty: str
    """How certain the names are."""


class Inputs(Section):
    """SHA-256 of what the numbers depend on; files over 256 MiB by size and modification time."""

    policy: dict[str, Any]
    """Base, adapter, their settings, package versions and the sources of funcprobe's core."""
    checkpoint: dict[str, str] | str
    """File name -> hash; a text where the checkpoint is a hub id."""
    optimizer: dict[str, str]
    """File name -> hash, of the optimizer's state."""
    prompts: str
    """Of all prompts and their columns."""
    rollouts: dict[str, dict[str, str]]
    """Of supplied rollouts: key of the configuration -> file name -> hash."""
    momentum: dict[str, str] | None = None
    """File name -> hash, of recorded gradients and of attribution.earlier_checkpoint's state; null: a
    file of an earlier version."""


class Manifest(Section):
    """Versions, seed, device, git commit, hashes of the inputs."""

    schema_version: Literal[1]
    """Version of this structure."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Package -> version."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and processor architecture."""
    seed: int
    """run.seed."""
    device: str
    """Device of the parameters."""
    torch_threads: int
    """Threads of one torch operation."""
    git: str | None
    """Commit of funcprobe's own sources; null where it is installed without them."""
    optimizer: OptimizerState | None
    """null: the rule reads no optimizer state."""
    inputs: Inputs
    """Hashes of what the numbers depend on."""


def manifest(plan: "Plan") -> Manifest:
    """What the run was made with."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        seed=plan.config.run.seed,
        device=where(plan.policy.model),
        torch_threads=torch.get_num_threads(),
        git=_git_commit(),
        optimizer=OptimizerState(**plan.optimizer.document()) if plan.optimizer else None,
        inputs=Inputs(**plan.inputs),
    )


def _git_commit() -> str | None:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():  # installed, perhaps inside a repository of something else
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
