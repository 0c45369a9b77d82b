"""The eight estimators, and statistics to give them."""

import itertools

import pytest
import torch

from funcprobe import Entropy, TokenStats

ESTIMATORS = [
    Entropy(per, integrand, weights, baseline="none")
    for per, integrand, weights in itertools.product(
        ("token", "sequence"), ("rao_blackwell", "sampled"), ("per_decision", "sequence")
    )
]
each_estimator = pytest.mark.parametrize("entropy", ESTIMATORS, ids=lambda e: "-".join(e[:3]))


def rows(stats: TokenStats, index: torch.Tensor) -> TokenStats:
    return TokenStats(*(x[index] for x in stats))


def random_statistics(seed):
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([3, 1, 5, 2])
    mask = torch.arange(5) < length[:, None]

    def draw(scale):
        return scale * torch.randn(4, 5, generator=generator, dtype=torch.float64) * mask

    stats = TokenStats(-draw(1).abs(), draw(1).abs())
    moved = TokenStats(stats.logp_NR + draw(0.3), stats.entropy_NR + draw(0.3))
    return stats, moved, draw(0.3), mask
