"""Rollouts on disk: schema, files, checks, imports of trainers' logs, the step they belong to."""

from .columns import SCHEMA
from .loss_inputs import loss_inputs
from .schema import (
    Rollouts,
    load_rollouts,
    parse_rollouts,
    sampler_logp,
    save_rollouts,
    to_batch,
)

__all__ = [
    "SCHEMA",
    "Rollouts",
    "load_rollouts",
    "loss_inputs",
    "parse_rollouts",
    "sampler_logp",
    "save_rollouts",
    "to_batch",
]
