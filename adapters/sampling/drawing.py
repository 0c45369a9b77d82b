"""Which prompts E and U are of: drawn by the run's seed, the same for the same number of prompts."""

import hashlib

from ..config.schema import Config
from .prompts import draw_distinct, draw_with_replacement


def derived_seed(seed: int, purpose: str) -> int:
    """Independent seeds of E and U from one; those of neighbouring run seeds are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:6])


def eval_index(config: Config, population: int) -> list[int]:
    """E's prompts, with replacement. InputError as `draw_with_replacement`."""
    seed = derived_seed(config.run.seed, "E")
    return draw_with_replacement(config.sampling.B_E, population, seed)


def update_index(config: Config, population: int) -> list[int]:
    """U's distinct prompts, each of which has G responses. InputError as `draw_distinct`."""
    return draw_distinct(config.sampling.B_U, population, derived_seed(config.run.seed, "U"))
