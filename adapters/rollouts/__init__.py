"""Rollouts on disk: schema, files, checks, imports of trainers' logs, the step they belong to."""

from .schema import (
    SCHEMA,
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
    "parse_rollouts",
    "sampler_logp",
    "save_rollouts",
    "to_batch",
]
