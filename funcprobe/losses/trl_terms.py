"""The terms of TRL's losses, each of one equation, on per-token arrays.

Read in TRL 1.16, trl/trainer/grpo_trainer.py. Subgradients are those that torch takes of the same
operations: the two sides of a minimum at a tie share the gradient evenly, and a clamp passes it at its
bounds. Arrays are [N, R], or [N, 1] (suffix N1) with one value per sequence; [N, C] is either.
"""

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Level: TypeAlias = Literal["token", "sequence"]
Correction: TypeAlias = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LOG_FLOOR, LOG_CEILING = math.log(1e-8), 20.0  # of VESPO's log-weights


def importance_ratio(
    log_ratio_NR: Float[Tensor, "N R"], m_NR: Float[Tensor, "N R"], level: Level
) -> Float[Tensor, "N C"]:
    """r = pi_theta / pi_old of every token, or its geometric mean over a sequence's tokens, [N, 1].

    The latter is GSPO's (Zheng et al. 2025, arXiv:2507.18071).
    """
    if level == "token":
        return log_ratio_NR.exp()
    return ((log_ratio_NR * m_NR).sum(1, keepdim=True) / tokens_of_rows(m_NR)).exp()


def tokens_of_rows(m_NR: Float[Tensor, "N R"]) -> Float[Tensor, "N 1"]:
    """Tokens of every sequence in the loss, 1 where there are none, so that they can be divided by."""
    return m_NR.sum(1, keepdim=True).clamp(min=1.0)


def divergence(log_ratio_NR: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
    """e^x - x - 1 with x = log(pi_ref / pi_theta): an estimate of KL(pi_theta || pi_ref), nats.

    Schulman 2020, "Approximating KL divergence" (k3); GRPO, arXiv:2402.03300, equation 4.
    """
    return log_ratio_NR.exp() - log_ratio_NR - 1


def clipped(
    r: Float[Tensor, "N C"],
    unclipped: Float[Tensor, "N C"],
    A_N1: Float[Tensor, "N 1"],
    low: float,
    high: float,
) -> Float[Tensor, "N C"]:
    """-min(r' A, clip(r, low, high) A), r' = `unclipped`: r, or min(r, delta) for two-sided clipping.

    PPO (arXiv:1707.06347), equation 7; delta as in INTELLECT-2 (arXiv:2505.07291).
    """
    return -torch.min(unclipped * A_N1, r.clamp(low, high) * A_N1)


def truncated(
    r: Float[Tensor, "N C"], l_NR: Float[Tensor, "N R"], A_N1: Float[Tensor, "N 1"], high: float
) -> Float[Tensor, "N R"]:
    """-sg(min(r, high)) A l, sg holding its argument fixed: CISPO (arXiv:2506.13585)."""
    return -r.clamp(max=high).detach() * A_N1 * l_NR


def gated(
    r: Float[Tensor, "N C"], A_N1: Float[Tensor, "N 1"], positive: float, negative: float
) -> Float[Tensor, "N C"]:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau = `positive` where A > 0, else `negative`.

    SAPO (arXiv:2511.20347). TRL holds tau in float32, which 1.05 is not exact in: so does this.
    """
    tau_N1 = torch.where(A_N1 > 0, positive, negative)
    return -(tau_N1 * (r - 1)).sigmoid() * 4 / tau_N1 * A_N1


def gamma_weight(
    log_ratio_NR: Float[Tensor, "N R"],
    correction_NR: Float[Tensor, "N R"] | None,
    A_N1: Float[Tensor, "N 1"],
    m_NR: Float[Tensor, "N R"],
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Float[Tensor, "N 1"]:
    """VESPO's weight of a sequence, phi(w) = e^(lambda (1 - w)) w^k, held fixed, [N, 1].

    log w is the sum over the sequence of log(pi_theta / pi_old), each within [-20, 20], and of the log
    of the correction for the sampler, each within [log 1e-8, 20], as is the sum.
    (k, lambda) = `positive` where A >= 0, else `negative`, in float32 as in TRL; lambda is at least
    1e-4, and a phi that overflows is 0. Source: arXiv:2602.10693.
    """
    log_w_N1 = (log_ratio_NR.detach().clamp(-LOG_CEILING, LOG_CEILING) * m_NR).sum(1, keepdim=True)
    if correction_NR is not None:
        each_NR = correction_NR.log().clamp(LOG_FLOOR, LOG_CEILING)
        log_w_N1 = log_w_N1 + (each_NR * m_NR).sum(1, keepdim=True)
    log_w_N1 = log_w_N1.clamp(LOG_FLOOR, LOG_CEILING)
    k_N1, lambda_N1 = (torch.where(A_N1 >= 0, *both) for both in zip(positive, negative, strict=True))
    lambda_N1 = lambda_N1.clamp(min=1e-4)
    phi_N1 = (lambda_N1 + k_N1 * log_w_N1 - lambda_N1 * log_w_N1.exp()).exp()
    return phi_N1.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def on_policy(
    l_NR: Float[Tensor, "N R"],
    sampler_NR: Float[Tensor, "N R"],
    A_N1: Float[Tensor, "N 1"],
    m_NR: Float[Tensor, "N R"],
    threshold: float,
) -> Bool[Tensor, "N 1"]:
    """Which sequences are kept: those of A >= 0, and those of a KL to theta up to `threshold`, nats.

    The KL is the mean over the sequence of log(pi_sampler / pi_theta); a token that the sampler gave no
    log-probability (NaN) adds 0. Source: DeepSeek-V3.2 (arXiv:2512.02556), equation 9.
    """
    gap_NR = (sampler_NR - l_NR.detach()).nan_to_num(nan=0.0)
    kl_N1 = (gap_NR * m_NR).sum(1, keepdim=True) / tokens_of_rows(m_NR)
    return (A_N1 >= 0) | (kl_N1 <= threshold)


def sampler_correction(
    old_NR: Float[Tensor, "N R"],
    sampler_NR: Float[Tensor, "N R"],
    m_NR: Float[Tensor, "N R"],
    mode: Correction,
    low: float | None,
    high: float | None,
) -> Float[Tensor, "N C"]:
    """pi_old / pi_sampler of every token, or of the sequence [N, 1], held fixed.

    "truncate" clamps it to [low, high], "mask" sets it to 0 outside; None is no bound. A token that the
    sampler gave no log-probability (NaN) has the ratio 1.
    """
    gap_NR = ((old_NR - sampler_NR) * m_NR).nan_to_num(nan=0.0)
    ratio = (gap_NR.sum(1, keepdim=True) if mode.startswith("sequence") else gap_NR).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    outside = (ratio < (-math.inf if low is None else low)) | (
        ratio > (math.inf if high is None else high)
    )
    return ratio.masked_fill(outside, 0.0)


def high_entropy(
    h_NR: Float[Tensor, "N R"],
    mask_NR: Bool[Tensor, "N R"],
    microbatch_N: Int[Tensor, " N"],
    share: float,
) -> Bool[Tensor, "N R"]:
    """Tokens in the loss whose entropy is in the upper `share` of their micro-batch, of all processes.

    The threshold is the (1 - share) quantile, linear between two entropies, in float32 like the
    entropies that it is compared to: in float64 its own token could be below it. Tokens of one context,
    such as the first of all responses to a prompt, have equal entropies; where the threshold is among
    them, rounding decides which of them TRL keeps. Source: Wang et al. 2025 (arXiv:2506.01939).
    """
    h_NR = h_NR.detach().float()
    kept_NR = mask_NR
    for microbatch in microbatch_N.unique():
        of_it_NR = mask_NR & (microbatch_N == microbatch)[:, None]
        if bool(of_it_NR.any()):
            threshold = torch.quantile(h_NR[of_it_NR], 1 - share)
            kept_NR = kept_NR & ~(of_it_NR & (h_NR < threshold))
    return kept_NR
