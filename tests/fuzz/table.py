"""All targets by name."""

from functools import cache

from .target import Target


@cache
def targets() -> dict[str, Target]:
    from . import of_checkpoints, of_data, of_optimizers, of_runs, of_texts

    groups = (of_texts, of_data, of_optimizers, of_checkpoints, of_runs)
    return {target.name: target for group in groups for target in group.targets()}
