"""Coverage over U where prompts differ in the length of their responses, by reward and normalisation.

    python benchmarks/coverage_lengths.py

The policy has no memory: at every position of prompt x it draws one of seven outcomes, of which the
first ends the response, from softmax(b_x + F_x theta). Mean lengths of the prompts spread lognormally,
so that some prompts have ten times the tokens of others. Batches are drawn with replacement from a pool
of 20,000 groups (U) and one of 20,000 responses (E), whose own values are the population's: nothing is
estimated but the coverage. Without memory a response is a vector of sums, and a batch is arithmetic.

v = v_0 + P Y with P fixed; coverage_steps.py has AdamW's whole step.
"""

import math
import time
from typing import NamedTuple, TypeAlias

import torch
from scipy.stats import t as student
from torch import Tensor

from funcprobe.statistics import intervals
from funcprobe.statistics.intervals import Error
from funcprobe.step.objective import STD_EPS

DIMENSIONS = 24  # entries of theta
OUTCOMES = 7
LONGEST = 128
SPREAD = 1.2  # standard deviation of the log of the prompts' mean lengths
PROMPTS = 2000
POOL = 20_000
G = 8
B_E = 512
DRAWS = 2000
GIVEN = ("sequence", "token_mean", "sequence_mean", "longest", "constant")


class Pool(NamedTuple):
    """E: n, d and the vectors n', d' of every response. U: scores and lengths, eight to a prompt."""

    n_N: Tensor
    d_N: Tensor
    dn_NP: Tensor
    dd_NP: Tensor
    score_MGP: Tensor
    length_MG: Tensor
    prompt_M: Tensor


Errors: TypeAlias = tuple[Tensor, Tensor]
"""Standard errors and degrees of freedom of a batch of draws."""


def pool(generator: torch.Generator) -> Pool:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    F_QVP = 0.5 * normal(PROMPTS, OUTCOMES, DIMENSIONS)
    F_QVP[:, 0] += 1.2  # ending is much the same thing for all prompts
    logit_QV = normal(PROMPTS, OUTCOMES) + F_QVP @ (0.3 * normal(DIMENSIONS))
    more_Q = ((math.log(20) + SPREAD * normal(PROMPTS)).exp() - 1).clamp(min=0.5)
    logit_QV[:, 0] = logit_QV[:, 1:].logsumexp(1) - more_Q.log()
    logp_QV = logit_QV.log_softmax(1)
    h_Q = -(logp_QV.exp() * logp_QV).sum(1)
    F_QVP = F_QVP - (logp_QV.exp()[:, :, None] * F_QVP).sum(1, keepdim=True)  # scores of a token
    dh_QP = -((logp_QV.exp() * logp_QV)[:, :, None] * F_QVP).sum(1)

    # Expected number of tokens still to come after one that does not end; 0 after one that does.
    end_Q1, left_1R = logp_QV[:, :1].exp(), LONGEST - 1.0 - torch.arange(LONGEST)
    ahead_QR = (1 - end_Q1) * (1 - (1 - end_Q1) ** left_1R) / end_Q1

    def responses(prompt_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths; sums of the tokens' scores; the same, each times the tokens still to come, less
        their expected number: the baseline that ridge regression approaches.
        """
        parts = []
        for x in prompt_N.split(4000):
            token = torch.multinomial(logp_QV[x].exp(), LONGEST, replacement=True, generator=generator)
            ends, k = token == 0, torch.arange(LONGEST)
            T = torch.where(ends.any(1), ends.int().argmax(1) + 1, LONGEST)
            real = (k < T[:, None]).double()
            count, later = torch.zeros(2, len(x), OUTCOMES, dtype=torch.float64)
            count.scatter_add_(1, token, real)
            later.scatter_add_(1, token, real * (T[:, None] - 1 - k - ahead_QR[x]))
            sums = (torch.einsum("nv,nvp->np", c, F_QVP[x]) for c in (count, later))
            parts.append((T.double(), *sums))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]

    prompt_N = torch.randint(PROMPTS, (POOL,), generator=generator)
    T_N, _, a_NP = responses(prompt_N)
    h_N = h_Q[prompt_N]
    prompt_M = torch.randint(PROMPTS, (POOL,), generator=generator)
    length, score, _ = responses(prompt_M.repeat_interleave(G))
    return Pool(
        T_N * h_N,
        T_N,
        T_N[:, None] * dh_QP[prompt_N] + h_N[:, None] * a_NP,
        a_NP,
        score.view(POOL, G, DIMENSIONS),
        length.view(POOL, G),
        prompt_M,
    )


def rewards(world: Pool, PX: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """0 or 1 for every response of U."""
    slope_MG = world.score_MGP @ PX
    slope_MG = slope_MG / slope_MG.std()
    uniform_MG, often_Q = (
        torch.rand(*shape, generator=generator, dtype=torch.float64)
        for shape in (world.length_MG.shape, (PROMPTS,))
    )
    return {
        "slope": (uniform_MG < (2 * slope_MG).sigmoid()).double(),
        "slope alone": (slope_MG > 0).double(),
        "short": (uniform_MG < ((20 - world.length_MG) / 8).sigmoid()).double(),
        "long": (uniform_MG < ((world.length_MG - 20) / 8).sigmoid()).double(),
        "neither": (uniform_MG < often_Q[world.prompt_M][:, None]).double(),
    }


def of_prompts(world: Pool, reward_MG: Tensor, normalisation: str) -> tuple[Tensor, Tensor]:
    """What every prompt adds to numerator and divisor of Y, with advantages "mean_std"."""
    centred_MG = reward_MG - reward_MG.mean(1, keepdim=True)
    advantage_MG = centred_MG / (reward_MG.std(1, keepdim=True) + STD_EPS)
    T_MG = world.length_MG
    own_MG = {
        "sequence_mean": T_MG,
        "longest": T_MG.amax(1, keepdim=True).expand_as(T_MG),
        "constant": torch.full_like(T_MG, LONGEST),
    }.get(normalisation, torch.ones_like(T_MG))
    share_M = T_MG.sum(1) if normalisation == "token_mean" else torch.full((POOL,), float(G)).double()
    return torch.einsum("mg,mgp->mp", advantage_MG / own_MG, world.score_MGP), share_M


def errors(value_DM: Tensor, jackknife: bool) -> Errors:
    """The arithmetic of `intervals.jackknife_error` or `intervals.delta_error`, by batches."""
    M = value_DM.shape[1]
    c_DM = value_DM - value_DM.mean(1, keepdim=True) if jackknife else value_DM
    square_D, factor = c_DM.square().sum(1), (M - 1) / M if jackknife else M / (M - 1)
    excess_D = M * (c_DM**4).sum(1) / square_D.square() - (M - 3) / (M - 1)
    return (factor * square_D).sqrt(), (2 * M / excess_D).clamp(max=M - 1)


def over_U(t_DM: Tensor, share_DM: Tensor) -> Errors:
    """The arithmetic of `intervals.update_error`, which the first batch is compared with."""
    share_DM = share_DM / share_DM.sum(1, keepdim=True)
    se_D, dof_D = errors((t_DM - t_DM.sum(1, keepdim=True) * share_DM) / (share_DM - 1), True)
    own = intervals.update_error(
        [intervals.UpdatePart(t_DM[0], share_DM[0])], torch.arange(t_DM.shape[1])
    )
    require_same(own, (se_D, dof_D))
    return se_D, dof_D


def together(first: Errors, second: Errors) -> Errors:
    """`intervals.total`, by batches."""
    variance_D = first[0] ** 2 + second[0] ** 2
    inverse_D = sum((e[0] ** 2 / variance_D) ** 2 / e[1] for e in (first, second))
    found = variance_D.sqrt(), 1 / inverse_D
    own = intervals.total(*(Error(float(e[0][0]), float(e[1][0])) for e in (first, second)))
    require_same(own, found)
    return found


def require_same(own: Error, found: Errors) -> None:
    for a, b_D in zip(own, found, strict=True):
        assert math.isclose(a, float(b_D[0]), rel_tol=1e-6), (own, [x[0] for x in found])


def covered(estimate_D: Tensor, truth: Tensor | float, error: Errors) -> str:
    half_D = torch.from_numpy(student.ppf(0.975, error[1].numpy())) * error[0]
    return f"{100 * float(((estimate_D - truth).abs() <= half_D).double().mean()):.1f}"


def draws_of_E(world: Pool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """X of every batch [D, P], and the influence values of its derivatives [D, M, P]."""
    X_DP, influence_DMP = [], []
    for _ in range(0, DRAWS, 100):
        n, d, dn, dd = (c[torch.randint(POOL, (100, B_E), generator=generator)] for c in world[:4])
        N, D = n.sum(1)[:, None], d.sum(1)[:, None]
        R, dD = N / D, dd.sum(1)
        X = (dn.sum(1) - R * dD) / D
        centred = (n - R * d)[:, :, None]
        influence_DMP.append(
            (dn - R[:, :, None] * dd - (dD / D)[:, None] * centred - X[:, None] * d[:, :, None])
            / D[:, :, None]
        )
        X_DP.append(X)
    return torch.cat(X_DP), torch.cat(influence_DMP)


def print_fixed_P(world: Pool, generator: torch.Generator) -> None:
    """Every reward and normalisation, over U and in total; and as if the divisor were given."""
    X_DP, influence_DMP = draws_of_E(world, generator)
    d, dd = world.d_N.sum(), world.dd_NP.sum(0)
    X = (world.dn_NP.sum(0) - world.n_N.sum() / d * dd) / d
    P = (0.7 * torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)).exp()
    noise = torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    print("| reward | normalisation | over U, 16 | total | over U, 64 | total |\n" + "|---" * 6 + "|")
    for name, reward_MG in rewards(world, P * X, generator).items():
        for normalisation in GIVEN:
            g_MP, share_M = of_prompts(world, reward_MG, normalisation)
            mean_Y, row, before = g_MP.sum(0) / share_M.sum(), [], []
            for B_U in (16, 64):
                m_DM = torch.randint(POOL, (DRAWS, B_U), generator=generator)
                share_DM = share_M[m_DM]
                each_DMP = g_MP[m_DM] / share_DM.sum(1)[:, None, None]
                Y_DP = each_DMP.sum(1)
                v_0 = momentum(P, mean_Y, noise * Y_DP.std(0))
                v_DP, mean_v = v_0 + P * Y_DP, v_0 + P * mean_Y
                t_DM = torch.einsum("dmp,dp->dm", each_DMP, P * X_DP)
                estimate_D = (X_DP * v_DP).sum(1)
                over = over_U(t_DM, share_DM)
                given = errors(torch.einsum("dmp,dp->dm", influence_DMP, v_DP), False)
                before.append(covered(estimate_D, X_DP @ mean_v, over_U(t_DM, torch.ones_like(t_DM))))
                row += [
                    covered(estimate_D, X_DP @ mean_v, over),
                    covered(estimate_D, X @ mean_v, together(given, over)),
                ]
            if normalisation == "token_mean":
                row[0] += f" ({before[0]})"
                row[2] += f" ({before[1]})"
            print(f"| {name} | {normalisation} | {' | '.join(row)} |", flush=True)


def momentum(P: Tensor, mean_Y: Tensor, noise: Tensor) -> Tensor:
    """Of beta1 = 0.9: nine times P times an average of gradients, with sqrt(1 / 19) of one's noise."""
    return 9 * P * (mean_Y + noise / math.sqrt(19))


def main() -> None:
    torch.set_num_threads(1)
    start, generator = time.process_time(), torch.Generator().manual_seed(0)
    world = pool(generator)
    own_M = world.length_MG.mean(1)
    print(
        f"mean length {float(own_M.mean()):.1f}, sd over groups {float(own_M.std()):.1f}; {DRAWS} "
        f"draws: two standard errors of 95 % are {200 * math.sqrt(0.95 * 0.05 / DRAWS):.1f} points\n"
    )
    print_fixed_P(world, generator)
    print(f"\n({time.process_time() - start:.0f} s of one thread, torch {torch.__version__})")


if __name__ == "__main__":
    main()
