"""Variance of every estimator of the derivative, relative to the plain sampled one.

    python benchmarks/variance.py [responses per prompt of the toy's pool, 16]

Two policies: the built-in toy (512 prompts, float32, along its next AdamW step), and a policy given
by tables, small enough that its exact derivative follows by recursion over its states. From each a
pool is drawn once, with statistics and tangents. The pool is cut at random into batches of B draws,
the estimators are computed on each with the baseline fitted on that batch alone, and the variance per
draw is B^2 times the mean square of the influence values. Its check is the variance of the
derivatives themselves from batch to batch.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from policies import studied
from torch import Tensor

import funcprobe
from funcprobe import Batch, Entropy, TokenStats, response_mask
from funcprobe.adapters import run
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.adapters.stages.batches import sample
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.store import Stages
from funcprobe.policy.layout import select
from funcprobe.statistics import baselines, estimators, regression

DRAWS = 256  # of a batch
CUTS = 6  # of the pool into batches
PLAIN = "sampled, weights of the response"


class Pool(NamedTuple):
    """Draws from one policy: equally many of every prompt, `prompt_N` 0, 0, ..., 1, 1, ..."""

    batch: Batch
    stats: TokenStats
    tangent: TokenStats
    exact: dict[str, float]  # per -> derivative, where it is known


class Variant(NamedTuple):
    integrand: str
    weights: str
    baseline: str = "none"
    normalised: bool = True  # False: the mean of a score times what it is credited with, no SNIS


VARIANTS = {
    "sampled, not normalised": Variant("sampled", "sequence", normalised=False),
    PLAIN: Variant("sampled", "sequence"),
    "sampled, weights per decision": Variant("sampled", "per_decision"),
    "Rao-Blackwell, not normalised": Variant("rao_blackwell", "per_decision", normalised=False),
    "Rao-Blackwell, weights of the response": Variant("rao_blackwell", "sequence"),
    "Rao-Blackwell, weights per decision": Variant("rao_blackwell", "per_decision"),
    "  baseline entropy": Variant("rao_blackwell", "per_decision", "entropy"),
    "  baseline position": Variant("rao_blackwell", "per_decision", "position"),
    "  baseline ridge": Variant("rao_blackwell", "per_decision", "ridge"),
    "  baseline ridge, weighted by l'^2": Variant("rao_blackwell", "per_decision", "weighted"),
}


def influence(pool: Pool, index_n: Tensor, variant: Variant, per: str) -> tuple[float, Tensor]:
    """Derivative on some draws of the pool, and their influence values (draws as units) times n."""
    batch = select(pool.batch, index_n)
    mask = response_mask(pool.batch)[index_n]
    stats, tangent = (TokenStats(*(x[index_n] for x in s)) for s in (pool.stats, pool.tangent))
    entropy = Entropy(per, variant.integrand, variant.weights)
    if not variant.normalised:
        x_n = not_normalised(stats, tangent, variant.integrand)
        return float(x_n.mean()), x_n - x_n.mean()
    if variant.baseline != "none":
        if variant.baseline == "weighted":
            b_NR = regression.ridge(
                baselines.score_target(stats, mask, entropy),
                mask,
                batch.prompt_N,
                regression.prefix_features(batch, stats, mask),
                tangent.logp_NR.square(),
            )
        else:
            b_NR = baselines.baseline(variant.baseline, batch, stats, mask, entropy)
        tangent = baselines.controlled_tangent(tangent, b_NR, mask, entropy)
    first = estimators.first_order(stats, tangent, mask, torch.arange(len(index_n)), entropy)
    return first.derivative, first.influence_N * len(index_n)


def not_normalised(stats: TokenStats, tangent: TokenStats, integrand: str) -> Tensor:
    """Per sequence: -S S', the published imperative probe's; or sum_j h'_j + l'_j sum_{k > j} h_k."""
    if integrand == "sampled":
        return -stats.logp_NR.sum(1) * tangent.logp_NR.sum(1)
    h_NR = stats.entropy_NR
    return (tangent.entropy_NR + tangent.logp_NR * (h_NR.sum(1, keepdim=True) - h_NR.cumsum(1))).sum(1)


class Seen(NamedTuple):
    square_N: Tensor  # mean square of each draw's influence value, times n
    component_N: Tensor  # mean influence value
    between_batches: float  # variance of the derivative from batch to batch, times n
    mean: float


def study(pool: Pool, per: str) -> dict[str, Seen]:
    count = len(pool.batch.prompt_N)
    generator = torch.Generator().manual_seed(0)
    cuts = [
        torch.randperm(count, generator=generator)[: count // DRAWS * DRAWS].view(-1, DRAWS)
        for _ in range(CUTS)
    ]
    found = {}
    for name, variant in VARIANTS.items():
        if per == "token" and not variant.normalised:
            continue
        square_N, component_N, times_N = torch.zeros(3, count, dtype=torch.float64)
        derivatives = []
        for index_n in torch.cat(cuts):
            derivative, c_n = influence(pool, index_n, variant, per)
            square_N[index_n] += c_n.square() * DRAWS / (DRAWS - 1)
            component_N[index_n] += c_n
            times_N[index_n] += 1
            derivatives.append(derivative)
        # Batches of one cut are draws without replacement from the pool: their variance about the
        # cut's own mean is the pool's variance over n.
        by_cut = torch.tensor(derivatives, dtype=torch.float64).view(CUTS, -1)
        found[name] = Seen(
            square_N / times_N,
            component_N / times_N,
            DRAWS * float(by_cut.var(1).mean()),
            float(by_cut.mean()),
        )
    return found


def bootstrap_ratio(
    a_N: Tensor, b_N: Tensor, prompt_N: Tensor, times: int = 1000
) -> tuple[float, float]:
    """mean(a) / mean(b) and its standard error, prompts resampled."""
    sums = [torch.zeros(int(prompt_N.max()) + 1).double().index_add(0, prompt_N, x) for x in (a_N, b_N)]
    prompts = len(sums[0])
    drawn = torch.randint(prompts, (times, prompts), generator=torch.Generator().manual_seed(1))
    ratio = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    return float(a_N.mean() / b_N.mean()), float(ratio.std())


def print_study(pool: Pool, per: str, title: str) -> None:
    found = study(pool, per)
    prompt_N = pool.batch.prompt_N
    plain, rao = found[PLAIN], found["Rao-Blackwell, weights per decision"]
    exact = pool.exact.get(per)
    print(f"\n{title}, per {per}, batches of {DRAWS} draws")
    print("| estimator | sd per draw | by batches | plain / this | RB / this | mean |")
    print("|---|---|---|---|---|---|")
    for name, seen in found.items():
        gain, error = bootstrap_ratio(plain.square_N, seen.square_N, prompt_N)
        against, its_error = bootstrap_ratio(rao.square_N, seen.square_N, prompt_N)
        print(
            f"| {name} | {float(seen.square_N.mean()) ** 0.5:.4g} | {seen.between_batches**0.5:.4g} | "
            f"{gain:.2f} +- {error:.2f} | {against:.2f} +- {its_error:.2f} | {seen.mean:.4g} |"
        )
    if exact is not None:
        print(f"exact derivative {exact:.5g}")
    print_designs(pool, found["  baseline ridge"].component_N)


def print_designs(pool: Pool, c_N: Tensor) -> None:
    """Draws of prompts, at equal forward tokens: variance per forward token over that of one iid draw.

    From the components between and within prompts of the influence values: B prompts drawn with
    replacement, G responses each, have variance (between + within / G) / B and cost
    B (prompt + G response) tokens, or B G (prompt + response) where rows do not share prompts. Every
    prompt equally often: within / G alone (B = all prompts).
    """
    prompt_N = pool.batch.prompt_N
    prompts = int(prompt_N.max()) + 1
    each = len(prompt_N) // prompts
    c_BG = c_N.view(prompts, each)
    within = float(c_BG.var(1).mean())
    between = float(c_BG.mean(1).var()) - within / each
    x = float(pool.batch.prompt_length_N.double().mean())
    y = float(pool.batch.response_length_N.double().mean())
    print(
        f"prompts {x:.2f} tokens, responses {y:.2f}; {between / (between + within):.0%} of ridge's "
        "variance is between prompts. Variance at equal forward tokens, over that of one response to "
        "each of iid prompts:"
    )
    base = (between + within) * (x + y)
    for G in (1, 2, 4, 8):
        v = (between + within / G) * G
        shared, plain = (v * cost / base for cost in (x / G + y, x + y))
        every = within * (x / G + y) / base
        print(
            f"  G = {G}: iid prompts {shared:.2f} (prompts shared), {plain:.2f} (not shared); "
            f"every prompt equally often {every:.2f} (shared), {within / (between + within):.2f} (not)"
        )


def toy_pool(each: int) -> Pool:
    """`each` responses of the toy to each of its 512 prompts, tangents along its next step."""
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.toml"
    sizes = ["sampling.B_E=32", "sampling.B_U=64", "sampling.generation_batch=512"]
    config = read_config(quickstart, [*sizes, "policy.dtype=float32", *studied()])
    narrator = Narrator()
    plan = load(config, narrator)
    direction = run._predict(
        plan, sample(plan, Stages(None), narrator), Stages(None), narrator
    ).direction
    index = [i for i in range(len(plan.prompt_ids)) for _ in range(each)]
    ids = [plan.prompt_ids[i] for i in index]
    responses = sample_responses(plan.policy, ids, plan.config.sampling, seed=7).ids
    batch = funcprobe.collate(ids, responses, index)
    stats, tangent = funcprobe.tangents(plan.policy.params, batch, direction.total, plan.forward)
    return Pool(batch, stats, tangent, {})


def table_pool(prompts: int = 64, each: int = 128, vocabulary: int = 6, longest: int = 8) -> Pool:
    """Next-token logits by tables over (prompt, position, previous token); token 0 ends.

    Logits move along a random direction of the tables. Exact derivatives by recursion: with M the
    expected number of tokens and A the expected entropy still to come from a state, and M', A' theirs.
    """
    generator = torch.Generator().manual_seed(11)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    # Prompts differ, and positions and previous tokens more so.
    shape = (prompts, longest, vocabulary, vocabulary)
    logits, move = (normal(1, *shape[1:]) + 0.5 * normal(shape) for _ in range(2))
    logits[..., 0] -= 0.5
    logp = logits.log_softmax(-1)
    p = logp.exp()
    dlogp = move - (p * move).sum(-1, keepdim=True)
    h, dh = -(p * logp).sum(-1), -(p * dlogp * (1 + logp)).sum(-1)
    M, A, dM, dA = torch.zeros(4, prompts, vocabulary, dtype=torch.float64)  # by the token before
    for k in reversed(range(longest)):
        goes_on = torch.ones(vocabulary, dtype=torch.float64)
        goes_on[0] = 0.0
        q, dq = p[:, k] * goes_on, p[:, k] * dlogp[:, k] * goes_on

        def ahead(q_BVV: Tensor, x_BV: Tensor) -> Tensor:
            return torch.einsum("bvu,bu->bv", q_BVV, x_BV)

        dM, dA = ahead(dq, M) + ahead(q, dM), dh[:, k] + ahead(dq, A) + ahead(q, dA)
        M, A = 1 + ahead(q, M), h[:, k] + ahead(q, A)
    # The prompt's last token is 1.
    M, A, dM, dA = (x[:, 1].mean() for x in (M, A, dM, dA))
    exact = {"sequence": float(dA), "token": float((dA - A / M * dM) / M)}

    prompt_N = torch.arange(prompts).repeat_interleave(each)
    count = len(prompt_N)
    tokens = [torch.full((count,), 2), torch.ones(count, dtype=torch.long)]
    columns: list[tuple[Tensor, ...]] = []
    alive = torch.ones(count, dtype=torch.bool)
    length_N = torch.zeros(count, dtype=torch.long)
    for k in range(longest):
        state = (prompt_N, torch.full_like(prompt_N, k), tokens[-1])
        u = torch.multinomial(p[state], 1, generator=generator).squeeze(1)
        columns.append(
            tuple(x * alive for x in (logp[*state, u], h[state], dlogp[*state, u], dh[state]))
        )
        tokens.append(torch.where(alive, u, 0))
        length_N += alive
        alive = alive & (u != 0)
    logp_NR, h_NR, dlogp_NR, dh_NR = (torch.stack(c, 1) for c in zip(*columns, strict=True))
    batch = Batch(torch.stack(tokens, 1), torch.full((count,), 2), length_N, prompt_N)
    return Pool(batch, TokenStats(logp_NR, h_NR), TokenStats(dlogp_NR, dh_NR), exact)


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    each = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    pools = {"policy of tables": table_pool(), "toy": toy_pool(each)}
    for title, pool in pools.items():
        for per in ("sequence", "token"):
            print_study(pool, per, title)
    print(f"\n{time.perf_counter() - start:.0f} s, torch {torch.__version__}, one thread")


if __name__ == "__main__":
    main()
