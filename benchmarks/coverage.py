"""Coverage of the 95 % intervals, and the prediction error at 256 sequences as it was once published.

    python benchmarks/coverage.py

Batches are drawn from two policies: one enumerated, whose population values are exact, and a pool of
the built-in toy's responses, whose population values are the pool's own. Counted is how often an
interval holds the population value: of the derivative given U, of the measured change where the
effective sample size is about 0.8 of the actual, and of their paired difference; with the draws of E as
its units, or its prompts; over U, and in total.
"""

import math
import time
from statistics import NormalDist
from typing import TypeAlias

import torch
from coverage_cells import PLAIN, RIDGE, cells, draw, influences, label, population, statistics
from coverage_updates import print_updates
from policies import World, effective_share, table_world, tables, toy
from published import print_published
from scipy.stats import t as student
from torch import Tensor

from funcprobe import Entropy
from funcprobe.statistics import intervals
from funcprobe.statistics.intervals import Error, Interval

EACH = 40  # responses to each of the toy's 512 prompts
SIZES = (64, 256, 1024)  # draws of E
DRAWS = 2000  # batches
RESAMPLED = 500  # of them are bootstrapped, or given a ridge baseline
AT_ONCE = 60_000  # sequences held at one time

Coverage: TypeAlias = dict[tuple[Entropy, str, str, int], float]
"""(estimator, quantity, method, draws) -> share of the batches whose interval holds the truth."""


def half_widths(influence_DM: Tensor, left_out_DM: Tensor) -> dict[str, Tensor]:
    """Half the intervals' widths, by method; the same arithmetic as funcprobe.intervals, by batches."""
    M = influence_DM.shape[1]

    def half(centred_DM: Tensor, factor: float, heavy: bool) -> Tensor:
        second_D = centred_DM.square().mean(1)
        excess_D = (centred_DM**4).mean(1) / second_D.square() - (M - 3) / (M - 1)
        dof_D = (2 * M / excess_D).clamp(max=M - 1) if heavy else torch.full_like(second_D, M - 1)
        return torch.from_numpy(student.ppf(0.975, dof_D.numpy())) * (factor * M * second_D).sqrt()

    left_out_DM = left_out_DM - left_out_DM.mean(1, keepdim=True)
    return {
        "delta, t of M - 1": half(influence_DM, M / (M - 1), False),
        "delta": half(influence_DM, M / (M - 1), True),
        "jackknife": half(left_out_DM, (M - 1) / M, True),
    }


def by_errors(world: World, exact: bool) -> Coverage:
    """All eight estimators, intervals that take a standard error."""
    found: Coverage = {}
    whole = torch.arange(len(world.probability_N))
    for entropy in PLAIN:
        all_cells, truth = cells(world, whole, entropy), population(world, entropy, exact)
        for size in SIZES:
            index_DM = draw(world, DRAWS, size, seed=size)
            for name, f in statistics(world.eta).items():
                held: dict[str, int] = {}
                for part in index_DM.split(AT_ONCE // size):
                    drawn = tuple(c[part] for c in all_cells)
                    estimate_D, influence_DM = influences(drawn, f)
                    left_out_DM = f(*(c.sum(1, keepdim=True) - c for c in drawn))
                    halves = half_widths(influence_DM, left_out_DM)
                    require_same(halves, influence_DM, left_out_DM)
                    for method, half_D in halves.items():
                        hits = int(((estimate_D - truth[name]).abs() <= half_D).sum())
                        held[method] = held.get(method, 0) + hits
                found |= {(entropy, name, m, size): h / DRAWS for m, h in held.items()}
    return found


def require_same(halves: dict[str, Tensor], influence_DM: Tensor, left_out_DM: Tensor) -> None:
    """The library's own intervals on the first batch."""
    unit = torch.arange(influence_DM.shape[1])
    delta = intervals.student(0.0, intervals.delta_error(influence_DM[0], unit))
    jackknife = intervals.student(0.0, intervals.jackknife_error(left_out_DM[0]))
    assert math.isclose(delta.high, float(halves["delta"][0]), rel_tol=1e-9)
    assert math.isclose(jackknife.high, float(halves["jackknife"][0]), rel_tol=1e-9)


def by_resampling(world: World, exact: bool, ridge: list[Entropy]) -> Coverage:
    """Bootstrap intervals; and the delta method where a ridge baseline is fitted on every batch."""
    held: dict[tuple[Entropy, str, str, int], int] = {}
    whole = torch.arange(len(world.probability_N))
    pool = {e: cells(world, whole, e) for e in PLAIN}
    truth = {e: population(world, e, exact) for e in (*PLAIN, *ridge)}
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        for index_M in draw(world, RESAMPLED, size, seed=size + 1):
            drawn = {e: tuple(c[index_M] for c in pool[e]) for e in PLAIN}
            drawn |= {e: cells(world, index_M, e) for e in ridge}
            counts = intervals.bootstrap_counts(size, 1000, generator)
            sums = (counts @ torch.cat([c for e in PLAIN for c in drawn[e]], 1)).split(
                [c.shape[1] for e in PLAIN for c in drawn[e]], 1
            )
            for i, (entropy, parts) in enumerate(drawn.items()):
                for name, f in statistics(world.eta).items():
                    if entropy.baseline == "ridge":
                        estimate_D, influence_DM = influences(tuple(c[None] for c in parts), f)
                        error = intervals.delta_error(influence_DM[0], torch.arange(size))
                        found = {"delta": intervals.student(float(estimate_D[0]), error)}
                    else:
                        left_out_M = intervals.jackknife(parts, torch.arange(size), f)
                        resampled = f(*sums[6 * i : 6 * i + 6])
                        found = bootstraps(float(f(*(c.sum(0) for c in parts))), resampled, left_out_M)
                    for method, (low, high) in found.items():
                        key = (entropy, name, method, size)
                        held[key] = held.get(key, 0) + (low <= truth[entropy][name] <= high)
    return {key: hits / RESAMPLED for key, hits in held.items()}


def bootstraps(estimate: float, resampled: Tensor, left_out_M: Tensor) -> dict[str, Interval]:
    basic = intervals.basic(estimate, resampled)
    error = Error(float(resampled.std()), len(left_out_M) - 1)
    # BCa (Efron 1987): bias z and acceleration a shift the percentiles.
    d = left_out_M.mean() - left_out_M
    a = float((d**3).sum() / (6 * d.square().sum() ** 1.5))
    normal = NormalDist()
    z = normal.inv_cdf(float(((resampled < estimate).sum() + 0.5) / (len(resampled) + 1)))
    shifted = [z + normal.inv_cdf(p) for p in (0.025, 0.975)]
    p = [normal.cdf(z + s / (1 - a * s)) for s in shifted]
    return {
        "bootstrap basic": basic,
        "bootstrap percentile": Interval(2 * estimate - basic.high, 2 * estimate - basic.low),
        "bootstrap BCa": Interval(*resampled.quantile(torch.tensor(p, dtype=torch.float64)).tolist()),
        "bootstrap se, t": intervals.student(estimate, error),
    }


def print_tables(title: str, found: Coverage) -> None:
    names = ("derivative", "measured", "difference")
    print(
        f"\n{title}: coverage in %, at {', '.join(map(str, SIZES))} draws\n| delta | "
        + " | ".join(names)
    )
    print("|---" * (1 + len(names)) + "|")
    for entropy in (*PLAIN, *RIDGE):
        if (entropy, "derivative", "delta", SIZES[0]) in found:
            row = (
                ", ".join(f"{100 * found[entropy, name, 'delta', size]:.1f}" for size in SIZES)
                for name in names
            )
            print(f"| {label(entropy)} | {' | '.join(row)} |")
    print(
        "\n| mean (least, most) of eight | "
        + " | ".join(names)
        + " |\n"
        + "|---" * (1 + len(names))
        + "|"
    )
    for method in dict.fromkeys(m for e, _, m, _ in found if e in PLAIN):
        row = []
        for name in names:
            c = [[100 * found[e, name, method, size] for e in PLAIN] for size in SIZES]
            row.append(", ".join(f"{sum(x) / len(x):.1f} ({min(x):.1f}, {max(x):.1f})" for x in c))
        print(f"| {method} | {' | '.join(row)} |")


def print_tails(title: str, world: World) -> None:
    """How much of the population variance of the influence values few sequences carry."""
    count = len(world.probability_N)
    print(f"\n{title}: of the variance, ten of {count} sequences carry")
    for entropy in PLAIN:
        all_cells, row = cells(world, torch.arange(count), entropy), []
        for name, f in statistics(world.eta).items():
            _, influence_DM = influences(tuple(c[None] for c in all_cells), f)
            square_M = influence_DM[0].square()
            row.append(f"{name} {100 * float(square_M.topk(10).values.sum() / square_M.sum()):.0f} %")
        print(f"  {label(entropy)}: {', '.join(row)}")


def print_units(title: str, world: World, exact: bool, supplied: bool = False) -> None:
    """Draws or prompts as units, of the derivative by Rao-Blackwell per token.

    `supplied`: 64 prompts drawn with replacement, four responses each, in place of 256 draws.
    """
    entropy, f = PLAIN[0], statistics(world.eta)["derivative"]
    all_cells = cells(world, torch.arange(len(world.probability_N)), entropy)
    truth = population(world, entropy, exact)["derivative"]
    for size in [256] if supplied else SIZES[1:]:
        index_DM = draw(world, DRAWS, size, seed=9)
        unit_DM = world.batch.prompt_N[index_DM]
        if supplied:
            index_DM, unit_DM = four_of_each(world, index_DM[:, : size // 4])
        held = dict.fromkeys(("draws", "prompts"), 0)
        for index_dM, unit_dM in zip(index_DM.split(100), unit_DM.split(100), strict=True):
            estimate_d, influence_dM = influences(tuple(c[index_dM] for c in all_cells), f)
            for estimate, c_M, unit_M in zip(estimate_d, influence_dM, unit_dM, strict=True):
                for name, unit in (("draws", torch.arange(size)), ("prompts", unit_M)):
                    low, high = intervals.student(float(estimate), intervals.delta_error(c_M, unit))
                    held[name] += low <= truth <= high
        print(
            f"| {title}, {size} | " + " | ".join(f"{100 * h / DRAWS:.1f}" for h in held.values()) + " |"
        )


def four_of_each(world: World, index_DB: Tensor) -> tuple[Tensor, Tensor]:
    """Four of the pool's responses to the prompts of the draws; each draw of a prompt is a unit."""
    each = int((world.batch.prompt_N == 0).sum())
    first_DB = world.batch.prompt_N[index_DB] * each
    generator = torch.Generator().manual_seed(4)
    offset = torch.randint(each, (*first_DB.shape, 4), generator=generator)
    unit = torch.arange(first_DB.shape[1])[None, :, None].expand_as(offset)
    return (first_DB[..., None] + offset).flatten(1), unit.flatten(1)


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()

    def done(what: str) -> None:
        wall, used = time.perf_counter() - start, time.process_time()
        print(f"\n({wall:.0f} s, {used:.0f} of this process: {what})", flush=True)

    policy = tables()
    enumerated = table_world(policy)
    pool = toy(EACH)
    done("pools drawn")
    print("\n| units of E | draws | prompts |\n|---|---|---|")
    print_units("tables, 3 prompts", enumerated, True)
    print_units("toy, 512 prompts", pool.world, False)
    print_units("toy, 64 prompts x 4", pool.world, False, supplied=True)
    print_tails("toy", pool.world)
    print_updates(policy, enumerated, pool)
    done("units and updates")
    print_published(pool)
    done("published experiment")
    for title, world, exact in (("tables", enumerated, True), ("toy", pool.world, False)):
        found = by_errors(world, exact)
        done(f"{title}: delta and jackknife")
        found |= by_resampling(world, exact, RIDGE)
        print_tables(f"{title}, effective share {effective_share(world):.2f}", found)
        done(f"{title}: bootstrap and ridge")
    print(f"torch {torch.__version__}, one thread")


if __name__ == "__main__":
    main()
