"""The error of the prediction at 256 sequences, the way it is published. Run by coverage.py.

A pool of 2,048 responses, resampled 256 at a time with replacement: prediction minus measured at a
small eta, over the change measured on the pool; and the spread of the prediction itself, over the same.
"""

from collections.abc import Callable

import torch
from policies import Toy
from torch import Tensor

import funcprobe
from funcprobe import Entropy, TokenStats, tree
from funcprobe.policy.layout import select

TINY = 1e-6
POOL, SIZE, TIMES = 2048, 256, 2000
RIDGE_TIMES = 500  # the first of them


def print_published(pool: Toy) -> None:
    world = pool.world
    n = torch.arange(len(world.probability_N))
    n = n[n % pool.each < POOL // (len(n) // pool.each)]
    assert len(n) == POOL
    batch, stats, tangent = select(world.batch, n), part(world.stats, n), part(world.tangent, n)
    there = tree.axpy(TINY, pool.direction.total, pool.params)
    moved = funcprobe.token_stats(there, batch, pool.forward)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(POOL, (SIZE,), generator=generator) for _ in range(TIMES)]

    def pair(entropy: Entropy) -> Callable[[Tensor], tuple[float, float]]:
        """eta times the derivative, and the change measured, on some of the pool."""

        def of(index: Tensor) -> tuple[float, float]:
            at = funcprobe.evaluate(select(batch, index), part(stats, index), entropy)
            first = funcprobe.derivative(at, part(tangent, index), torch.arange(len(index)))
            return TINY * first.derivative, funcprobe.change(at, part(moved, index)).delta

        return of

    def product(index: Tensor) -> tuple[float, float]:
        """-S S' of whole responses, not normalised, against the change measured with their weights."""
        S_n, slope_n = (s.logp_NR[index].sum(1) for s in (stats, tangent))
        predicted = -TINY * float((S_n * slope_n).mean())
        return predicted, sampled(index)[1]

    sampled = pair(Entropy("sequence", "sampled", "sequence", baseline="none"))
    rows = {
        "per sequence: -S S', not normalised (as published)": product,
        "per sequence: sampled, weights of the response": sampled,
        "per sequence: Rao-Blackwell, weights per decision": pair(Entropy("sequence", baseline="none")),
        "per sequence: the same with ridge": pair(Entropy("sequence")),
        "per token: sampled, weights of the response": pair(
            Entropy("token", "sampled", "sequence", baseline="none")
        ),
        "per token: Rao-Blackwell, weights per decision": pair(Entropy(baseline="none")),
        "per token: the same with ridge (the default)": pair(Entropy()),
    }
    print("\n| over the pool's measured change | error: mean | sd | prediction: mean | sd |")
    print("|---|---|---|---|---|")
    for name, of in rows.items():
        _, whole = of(torch.arange(POOL))
        few = drawn[:RIDGE_TIMES] if "ridge" in name else drawn
        values = torch.tensor([of(index) for index in few], dtype=torch.float64) / whole
        error, predicted = values[:, 0] - values[:, 1], values[:, 0]
        numbers = (error.mean(), error.std(), predicted.mean(), predicted.std())
        print(f"| {name} | " + " | ".join(f"{float(x):.3g}" for x in numbers) + " |", flush=True)


def part(stats: TokenStats, index: Tensor) -> TokenStats:
    """Trimmed to the longest response, as `select` trims the batch."""
    used_NR = (stats.logp_NR[index] != 0) | (stats.entropy_NR[index] != 0)
    width = int(used_NR.any(0).nonzero().max()) + 1
    return TokenStats(*(x[index, :width] for x in stats))
