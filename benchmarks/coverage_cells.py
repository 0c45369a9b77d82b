"""What the coverage studies share: estimators as functions of sums, batches, influence values."""

import itertools
from collections.abc import Callable
from typing import TypeAlias

import torch
from policies import World
from torch import Tensor

from funcprobe import Entropy, TokenStats, response_mask
from funcprobe.policy.layout import select
from funcprobe.statistics import baselines, estimators

PLAIN = [
    Entropy(per, integrand, weights, baseline="none")
    for per, integrand, weights in itertools.product(
        ("token", "sequence"), ("rao_blackwell", "sampled"), ("per_decision", "sequence")
    )
]
RIDGE = [Entropy(per, baseline="ridge") for per in ("token", "sequence")]  # weights per decision


Cells: TypeAlias = tuple[Tensor, ...]  # n, d, n', d', dn, dd
Statistic: TypeAlias = Callable[..., Tensor]


def statistics(eta: float) -> dict[str, Statistic]:
    """The three quantities as functions of the cells' sums."""

    def derivative(n: Tensor, d: Tensor, dn: Tensor, dd: Tensor, *_: Tensor) -> Tensor:
        return estimators.ratio_derivative(n, d, dn, dd).sum(-1)

    def measured(n: Tensor, d: Tensor, _: Tensor, __: Tensor, dn: Tensor, dd: Tensor) -> Tensor:
        return estimators.ratio_change(n, d, dn, dd).sum(-1)

    def difference(*sums: Tensor) -> Tensor:
        return measured(*sums) - eta * derivative(*sums)

    return {"derivative": derivative, "measured": measured, "difference": difference}


def cells(world: World, index_n: Tensor, entropy: Entropy) -> Cells:
    """What the sequences add to the sums, the baseline fitted on these sequences alone."""
    mask = response_mask(world.batch)[index_n]
    stats, tangent, moved = (
        TokenStats(*(x[index_n] for x in s)) for s in (world.stats, world.tangent, world.moved)
    )
    if entropy.baseline == "ridge":
        b_NR = baselines.baseline("ridge", select(world.batch, index_n), stats, mask, entropy)
        tangent = baselines.controlled_tangent(tangent, b_NR, mask, entropy)
        moved = baselines.controlled_stats(stats, moved, b_NR, mask, entropy)
    first = estimators.first_order_cells(stats, tangent, mask, entropy)
    return *first, *estimators.measured_cells(stats, moved, mask, entropy)[2:]


def population(world: World, entropy: Entropy, exact: bool) -> dict[str, float]:
    """Population values. A baseline changes none, but in a pool its control variate's mean is not 0."""
    entropy = entropy._replace(baseline="none") if exact else entropy
    everything = cells(world, torch.arange(len(world.probability_N)), entropy)
    sums = [(world.probability_N[:, None] * c).sum(0) for c in everything]
    return {name: float(f(*sums)) for name, f in statistics(world.eta).items()}


def draw(world: World, batches: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(
        world.probability_N, batches * size, replacement=True, generator=generator
    )
    return drawn.view(batches, size)


def influences(cells_DMg: Cells, f: Statistic) -> tuple[Tensor, Tensor]:
    """Estimates [D] of D batches and the draws' influence values [D, M]: sums' derivatives x cells."""
    sums = [c.sum(1).requires_grad_() for c in cells_DMg]
    estimate_D = f(*sums)
    grads = torch.autograd.grad(estimate_D.sum(), sums, allow_unused=True)
    influence = sum(
        (c * g[:, None]).sum(2) for c, g in zip(cells_DMg, grads, strict=True) if g is not None
    )
    return estimate_D.detach(), influence


def label(entropy: Entropy) -> str:
    integrand = {"rao_blackwell": "Rao-Blackwell", "sampled": "sampled"}[entropy.integrand]
    weights = {"per_decision": "per decision", "sequence": "of the response"}[entropy.weights]
    ridge = ", ridge" if entropy.baseline == "ridge" else ""
    return f"per {entropy.per}, {integrand}, weights {weights}{ridge}"
