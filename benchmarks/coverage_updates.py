"""Coverage over U: of the interval given U, of the one over U, and of their total. Run by coverage.py.

v = v_0 + P Y with P held fixed, so that everything is linear in v. Tables: Y is the mean over prompts
drawn with their weights, eight responses each with random rewards, advantages against the group's
mean; the exact mean step is known. Toy: a pool of one gradient P Y_m a prompt and one gradient X_n a
sequence, of an estimator that is a plain mean (weights per decision, not normalised, the score's
baseline the mean of its target at each position); its population is the pool, and U's prompts are drawn
without replacement.
"""

import math
from typing import TypeAlias

import torch
from policies import Tables, Toy, World
from torch import Tensor
from torch.func import grad, jacfwd

from funcprobe import Entropy, TokenStats, response_mask, tree
from funcprobe.passes.gradients import weighted_grad
from funcprobe.policy.layout import select
from funcprobe.statistics import estimators, intervals
from funcprobe.statistics.baselines import position_mean
from funcprobe.statistics.intervals import Error

DRAWS = 500
GROUP = 8  # responses to a prompt of U

Covered: TypeAlias = dict[str, list[bool]]


def print_updates(policy: Tables, world: World, pool: Toy) -> None:
    found = {}
    for per in ("token", "sequence"):
        for B_E, B_U in ((256, 16), (1024, 64)):
            title = f"tables, per {per}, B_E = {B_E}, B_U = {B_U}"
            found[title] = of_tables(policy, world, Entropy(per, baseline="none"), B_E, B_U)
    products = toy_products(pool)
    for B_E, B_U in ((64, 16), (256, 16), (256, 64), (1024, 64)):
        found[f"toy, B_E = {B_E}, B_U = {B_U}"] = of_products(*products, B_E, B_U)
    names = list(next(iter(found.values())))
    print("\n| over U | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for title, held in found.items():
        row = (f"{100 * sum(held[name]) / DRAWS:.1f}" for name in names)
        print(f"| {title} | {' | '.join(row)} |")


def of_tables(policy: Tables, world: World, entropy: Entropy, B_E: int, B_U: int) -> Covered:
    generator = torch.Generator().manual_seed(1)
    mask_NR, prompt_N, p_N = response_mask(policy.batch), policy.batch.prompt_N, policy.probability_N
    J_NRP, K_NRP = jacfwd(policy.stats)(policy.theta)
    score_NP = J_NRP.sum(1)
    reward_N = torch.randint(2, (len(p_N),), generator=generator).double()
    P = torch.rand(len(policy.theta), generator=generator).double()
    v_0 = 0.02 * torch.randn(len(policy.theta), generator=generator).double()
    of_prompt_BN = p_N * (prompt_N == prompt_N.unique()[:, None])
    X = grad(lambda theta: exact_entropy(policy, theta, entropy.per))(policy.theta)

    def update() -> Tensor:
        """Y_m of the prompts drawn; their sum is Y."""
        prompts = torch.multinomial(of_prompt_BN.sum(1), B_U, replacement=True, generator=generator)
        n_BG = torch.multinomial(of_prompt_BN[prompts], GROUP, replacement=True, generator=generator)
        advantage_BG = reward_N[n_BG] - reward_N[n_BG].mean(1, keepdim=True)
        return torch.einsum("bg,bgp->bp", advantage_BG, score_NP[n_BG]) / (B_U * GROUP)

    # E[(r - the group's mean) grad S] = (1 - 1 / G) E[r grad S], as E[grad S] = 0.
    mean_v = v_0 + P * (1 - 1 / GROUP) * ((p_N * reward_N) @ score_NP)
    unit, found = torch.arange(B_E), Covered()
    for _ in range(DRAWS):
        n = torch.multinomial(p_N, B_E, replacement=True, generator=generator)
        Y_BP, new_Y_BP = update(), update()
        v, new_v = (v_0 + P * y.sum(0) for y in (Y_BP, new_Y_BP))
        stats, mask = TokenStats(*(x[n] for x in world.stats)), mask_NR[n]
        tangent = TokenStats(J_NRP[n] @ v, K_NRP[n] @ v)
        first = estimators.first_order(stats, tangent, mask, unit, entropy)
        p, q = estimators.gradient_coefficients(stats, mask, entropy)
        X_E = p.flatten() @ J_NRP[n].flatten(0, 1) + q.flatten() @ K_NRP[n].flatten(0, 1)
        truths = {
            "this step": float(X @ v),
            "this E": float(X_E @ mean_v),
            "mean step": float(X @ mean_v),
            "new step": float(X @ new_v),
        }
        over = equal_shares(Y_BP @ (P * X_E))
        count(found, intervals.delta_error(first.influence_N, unit), over, first.derivative, truths)
    return found


def exact_entropy(policy: Tables, theta: Tensor, per: str) -> Tensor:
    """Sum over every response, its prompt's weight held fixed."""
    logp_NR, h_NR = policy.stats(theta)
    score_N = logp_NR.sum(1)
    p_N = policy.probability_N * (score_N - policy.stats(policy.theta)[0].sum(1)).exp()
    H = (p_N * h_NR.sum(1)).sum()
    return H / (p_N * policy.batch.response_length_N).sum() if per == "token" else H


def toy_products(pool: Toy) -> tuple[Tensor, Tensor]:
    """<X_n, P Y_m> of every sequence taken and every prompt, and <X_n, v_0> [N, M], [N]."""
    world, params, forward = pool.world, pool.params, pool.forward
    n = torch.arange(len(world.probability_N))
    n = n[n % pool.each == 0]
    batch, stats = select(world.batch, n), TokenStats(*(x[n] for x in world.stats))
    mask_NR = response_mask(world.batch)[n]
    h_NR = stats.entropy_NR
    p_NR = (h_NR.sum(1, keepdim=True) - h_NR.cumsum(1)) * mask_NR
    p_NR = p_NR - position_mean(p_NR, mask_NR, torch.arange(len(n)))
    prompts = len(pool.update.batch.prompt_N.unique())
    columns = []
    for m in pool.update.batch.prompt_N.unique():
        chosen = (pool.update.batch.prompt_N == m).nonzero().squeeze(1)
        coef_nR = prompts * pool.update.coef_NR[chosen]
        part = select(pool.update.batch, chosen)
        width = int(part.response_length_N.max())
        Y_m = weighted_grad(
            params, part, coef_nR[:, :width], torch.zeros_like(coef_nR[:, :width]), forward
        )
        columns.append(flat(tree.multiply(pool.direction.scale, Y_m)).float())
    v_0 = tree.axpy(1.0, pool.direction.momentum, pool.direction.decay)
    directions_PM = torch.stack([*columns, flat(v_0).float()], 1)
    products = []
    for block in torch.arange(len(n)).split(64):
        rows = []
        for i in block.tolist():
            one = select(batch, torch.tensor([i]))
            width = int(one.response_length_N)
            X_n = weighted_grad(
                params, one, p_NR[i : i + 1, :width], mask_NR[i : i + 1, :width].double(), forward
            )
            rows.append(flat(X_n).float())
        products.append((torch.stack(rows) @ directions_PM).double())
    table = torch.cat(products)
    return table[:, :-1], table[:, -1]


def of_products(s_NM: Tensor, s_N: Tensor, B_E: int, B_U: int) -> Covered:
    generator, found = torch.Generator().manual_seed(2), Covered()
    mean_N = s_N + s_NM.mean(1)
    for _ in range(DRAWS):
        n = torch.randint(len(s_N), (B_E,), generator=generator)
        m, new_m = (torch.randperm(s_NM.shape[1], generator=generator)[:B_U] for _ in range(2))
        own_N, new_N = (s_N + s_NM[:, u].mean(1) for u in (m, new_m))
        truths = {
            "this step": float(own_N.mean()),
            "this E": float(mean_N[n].mean()),
            "mean step": float(mean_N.mean()),
            "new step": float(new_N.mean()),
        }
        given = equal_shares(own_N[n] / B_E)
        over = equal_shares(s_NM[n][:, m].mean(0) / B_U)
        count(found, given, over, float(own_N[n].mean()), truths)
    return found


def count(found: Covered, given: Error, over: Error, estimate: float, truths: dict[str, float]) -> None:
    """Which interval holds what."""
    both = intervals.total(given, over)
    twice = intervals.total(given, Error(math.sqrt(2) * over.se, over.dof))
    for name, error, truth in (
        ("given U: along this step", given, "this step"),
        ("over U: of this E, along the mean step", over, "this E"),
        ("given U alone: along the mean step", given, "mean step"),
        ("total: along the mean step", both, "mean step"),
        ("total: along a new U's step", both, "new step"),
        ("total, over U twice: along a new U's step", twice, "new step"),
    ):
        low, high = intervals.student(estimate, error)
        found.setdefault(name, []).append(low <= truths[truth] <= high)


def equal_shares(t_M: Tensor) -> Error:
    """Of the sum, where every unit adds equally much to the divisor."""
    return intervals.update_error(
        [intervals.UpdatePart(t_M, torch.ones(len(t_M)))], torch.arange(len(t_M))
    )


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in params.values()])
