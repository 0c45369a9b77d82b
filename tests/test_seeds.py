"""E6: the same checkpoint with other seeds gives predictions that agree within their intervals."""

import json
import math
from itertools import combinations, pairwise

import pytest

from funcprobe.adapters import run as run_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from support.checkpoints import make_checkpoint, sets

pytestmark = pytest.mark.slow

SEEDS = 40
Seen = list[tuple[float, float]]  # (prediction, se_total) of every seed


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Seen:
    """Derivatives along the next step; under every seed E and U are other draws, and nothing else."""
    folder = tmp_path_factory.mktemp("seeds")
    checkpoint = make_checkpoint(folder)
    # Prompts enough for U: with few, all the seeds would draw nearly the same ones.
    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(20) for b in range(20)]
    checkpoint.prompts.write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    given = checkpoint.settings() | {
        "run.folder": str(folder / "runs"),
        "sampling.B_E": 256,
        "sampling.B_U": 32,
        "sampling.G": 4,
        "sampling.generation_batch": 128,
        "measure.etas": [1e-6],
    }
    (folder / "c.toml").touch()
    found = []
    for seed in range(SEEDS):
        arguments = sets(given | {"run.name": f"seed-{seed}", "run.seed": seed})[1::2]
        results, _ = run_module.run(read_config(folder / "c.toml", arguments), Narrator())
        first = results.model_dump()["first_order"]
        found.append((first["derivative"]["value"], first["se_total"]["value"]))
    return found


def chi_square(seen: Seen) -> float:
    """Sum of squared deviations from the weighted mean, each in units of its standard error."""
    weights = [1 / se**2 for _, se in seen]
    mean = sum(w * x for w, (x, _) in zip(weights, seen, strict=True)) / sum(weights)
    return sum(((x - mean) / se) ** 2 for x, se in seen)


def within(seen: Seen) -> float:
    """Share of the pairs whose difference lies in its 95 % interval about 0."""
    pairs = list(combinations(seen, 2))
    return sum(abs(a - b) < 1.96 * math.hypot(s, t) for (a, s), (b, t) in pairs) / len(pairs)


def agree(seen: Seen) -> bool:
    """Three predictions, at a level of 1 %: exp(-x / 2) is chi-square's tail with two degrees."""
    assert len(seen) == 3
    return chi_square(seen) < -2 * math.log(0.01)


def calibrated(seen: Seen) -> bool:
    """Forty predictions, at a level of 1 %: between the quantiles 0.005 and 0.995 with 39 degrees."""
    assert len(seen) == 40
    return 19.996 < chi_square(seen) < 65.476


def test_three_seeds_agree(seen):
    assert agree(seen[:3])
    assert within(seen[:3]) == 1.0
    # They are three draws, and errors that hide everything are none.
    assert len({x for x, _ in seen}) == SEEDS
    assert all(abs(a - b) > 0.01 * s for (a, s), (b, _) in pairwise(seen[:3]))


def test_errors_are_as_large_as_the_scatter(seen):
    assert calibrated(seen)
    # Of 40 normal draws with known errors, in 99 % of cases between these two shares.
    assert 0.87 < within(seen) < 0.999


def test_a_shift_by_five_errors_is_seen_in_most_threes(seen):
    threes = [seen[i : i + 3] for i in range(0, SEEDS - 2, 3)]
    # At a level of 1 %, more than two of 13 disagree with probability 2e-4.
    assert sum(not agree(three) for three in threes) <= 2
    shifted = [
        [(x + sign * 5 * se * (i == which), se) for i, (x, se) in enumerate(three)]
        for three in threes
        for which in range(3)
        for sign in (1, -1)
    ]
    # Chi-square with two degrees and non-centrality 25 * 2 / 3 passes the bound in 88 % of cases.
    assert sum(not agree(three) for three in shifted) > 0.75 * len(shifted)
    assert sum(within(three) < 1 for three in shifted) > 0.75 * len(shifted)


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_errors_of_another_size_are_seen(seen, factor):
    assert not calibrated([(x, factor * se) for x, se in seen])
