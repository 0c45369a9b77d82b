"""Coverage over U of AdamW's whole step, which depends on Y through second moment and clip as well.

    python benchmarks/coverage_steps.py

The policy and the pool are those of coverage_lengths.py, J is divided by the tokens. The interval over
U holds P fixed; or the second moment alone, so that the clip follows Y (as the library does); or takes
the derivative of the step, D = dv / dY. Covered is the mean of the steps of all batches.
"""

import math
from typing import NamedTuple

import torch
from coverage_lengths import DIMENSIONS, DRAWS, POOL, Pool, covered, of_prompts, over_U, pool, rewards
from torch import Tensor


class Adam(NamedTuple):
    """Moments of J's gradient as saved, the steps taken, and the norm that gradients are clipped to."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    taken: int
    beta2: float
    clip: float


def print_whole_step(world: Pool, generator: torch.Generator) -> None:
    """A row a regime and reward: the three intervals at 16 prompts, and at 64."""
    X = torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    columns = "P fixed, 16 | with the clip | D | P fixed, 64 | with the clip | D"
    print(f"| AdamW's step | reward | {columns} |\n" + "|---" * 8 + "|")
    regimes = {
        "beta2 = 0.999, 1000 steps taken": (1000, 0.999, 0.0),
        "beta2 = 0.95, 1000 steps": (1000, 0.95, 0.0),
        "beta2 = 0.999, 10 steps": (10, 0.999, 0.0),
        "beta2 = 0.999, none": (0, 0.999, 0.0),
        "beta2 = 0.999, 1000 steps, clipped to half": (1000, 0.999, 0.5),
    }
    for title, (taken, beta2, clip) in regimes.items():
        for name, reward_MG in rewards(world, X, generator).items():
            if name not in ("slope", "short", "neither"):
                continue
            g_MP, share_M = of_prompts(world, reward_MG, "token_mean")
            row = []
            for B_U in (16, 64):
                m_DM = torch.randint(POOL, (DRAWS, B_U), generator=generator)
                share_DM = share_M[m_DM]
                each_DMP = g_MP[m_DM] / share_DM.sum(1)[:, None, None]
                Y_DP = each_DMP.sum(1)
                most = clip * float(Y_DP.norm(dim=1).mean()) or math.inf
                scale = clip or 1.0  # moments of gradients that were clipped alike
                m_P, nu_P = scale * Y_DP.mean(0) / 2, scale**2 * Y_DP.square().mean(0)
                given = Adam(m_P, nu_P, taken, beta2, most)
                again_DM = torch.randint(POOL, (4 * DRAWS, B_U), generator=generator)
                Y = g_MP[again_DM].sum(1) / share_M[again_DM].sum(1, keepdim=True)
                truth = float((adam_step(Y, given)[0] @ X).mean())
                Y_DP.requires_grad_()
                v_DP, P_DP = adam_step(Y_DP, given)
                (DX_DP,) = torch.autograd.grad((v_DP @ X).sum(), Y_DP)
                PX_DP = (P_DP * X).detach()
                for w_DP in (PX_DP, clipped(PX_DP, Y_DP.detach(), most), DX_DP):
                    t_DM = torch.einsum("dmp,dp->dm", each_DMP, w_DP)
                    row.append(covered((v_DP @ X).detach(), truth, over_U(t_DM, share_DM)))
            print(f"| {title} | {name} | {' | '.join(row)} |", flush=True)


def clipped(PX_DP: Tensor, Y_DP: Tensor, most: float) -> Tensor:
    """P X less its part along Y where Y is clipped: of the derivative of Y / |Y|."""
    norm_D = Y_DP.norm(dim=1, keepdim=True)
    along_D = (PX_DP * Y_DP).sum(1, keepdim=True) / norm_D / (norm_D + 1e-6)
    return PX_DP - torch.where(norm_D + 1e-6 > most, along_D, 0.0) * Y_DP


def adam_step(Y_DP: Tensor, given: Adam) -> tuple[Tensor, Tensor]:
    """v without decay, and P, of `step.adam.update_direction`, for a batch of gradients."""
    beta1, t = 0.9, given.taken + 1
    clip_D = torch.ones(len(Y_DP), 1).double()
    if given.clip < math.inf:
        clip_D = (given.clip / (Y_DP.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
    g = clip_D * Y_DP
    # The saved moments are those of `taken` steps, which bias correction divides by.
    m, nu = (
        x * (1 - beta**given.taken)
        for x, beta in ((given.exp_avg, beta1), (given.exp_avg_sq, given.beta2))
    )
    nu_hat = (given.beta2 * nu + (1 - given.beta2) * g**2) / (1 - given.beta2**t)
    per_moment = 1 / ((1 - beta1**t) * (nu_hat.sqrt() + 1e-8))
    return (beta1 * m + (1 - beta1) * g) * per_moment, (1 - beta1) * clip_D * per_moment


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print_whole_step(pool(generator), generator)
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
