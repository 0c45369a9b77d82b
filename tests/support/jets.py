"""A batch, and the first and second derivatives of its tokens' statistics along a direction."""

import funcprobe
from support.policies import random_batch

LENGTHS = [(0, 2, 6), (1, 4, 1), (2, 1, 4), (0, 2, 3), (3, 5, 2)]
BATCH = random_batch(LENGTHS)
MASK = funcprobe.response_mask(BATCH)
UNIT = BATCH.prompt_N
STEP = 1e-4  # |v| is 2 here: truncation STEP^2 and rounding 1e-16 / STEP of central differences


def seconds(probe, batch, v, max_tokens=64):
    return funcprobe.second_tangents(probe.params, batch, v, probe.forward, max_tokens)
