"""Structures of stored results, with any tensor in place of theirs."""

import torch

from funcprobe.types import TokenStats

LEAVES = torch.zeros(0)
STATS = TokenStats(LEAVES, LEAVES)
