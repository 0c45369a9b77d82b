"""From rewards to the fixed coefficients c of J = sum c l on U: advantages, normalisations, presets."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tree import f64
from ..types import Batch, InputError, UpdateBatch

Advantage: TypeAlias = Literal["mean", "mean_std", "leave_one_out"]
Normalisation: TypeAlias = Literal["sequence", "token_mean", "sequence_mean", "longest", "constant"]

STD_EPS = 1e-4  # added to the standard deviation by TRL's GRPOTrainer; verl adds 1e-6


class Objective(NamedTuple):
    """How rewards become coefficients. `constant` is L in tokens, for normalisation "constant" only.

    Advantage "rollouts": advantages are supplied with the responses, not computed from rewards.
    """

    advantage: Advantage | Literal["rollouts"]
    normalisation: Normalisation
    constant: float | None = None


PRESETS: dict[str, Objective] = {
    "grpo": Objective("mean_std", "sequence_mean"),
    "dapo": Objective("mean_std", "token_mean"),
    "dr_grpo": Objective("mean", "constant"),
    "rloo": Objective("leave_one_out", "sequence"),
}
"""Objectives by their common names, at the policy that sampled: every importance ratio is 1, so that
no clip is active, and beta (the KL term) is 0.

Read in huggingface/trl at commit 00313f2 (1.x, 2026), trl/trainer/grpo_trainer.py
(`_generate_and_score_completions`, `_compute_loss`) and trl/trainer/rloo_trainer.py:

- `grpo`: loss_type="grpo", scale_rewards="group" (Shao et al. 2024, arXiv:2402.03300).
- `dapo`: loss_type="dapo", scale_rewards="group", TRL's default: one mean over all tokens of the
  step, where the paper averages within a prompt's group (Yu et al. 2025, arXiv:2503.14476).
- `dr_grpo`: loss_type="dr_grpo", scale_rewards="none", L = max_completion_length; TRL's default is
  scale_rewards="group" (Liu et al. 2025, arXiv:2503.20783). The preset does not set L: use
  `PRESETS["dr_grpo"]._replace(constant=...)`.
- `rloo`: RLOOTrainer, normalize_advantages=False, the sum of a sequence's log-probabilities
  (Ahmadian et al. 2024, arXiv:2402.14740).
"""


def advantages(
    reward_N: Float[Tensor, " N"], prompt_N: Int[Tensor, " N"], mode: Advantage
) -> Float[Tensor, " N"]:
    """Advantage of every response among the G responses of its prompt, [N], float64.

        mean:           A_i = r_i - mean(r)
        mean_std:       A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with Bessel's correction
        leave_one_out:  A_i = r_i - mean of the other G - 1 rewards

    In the unit of the reward, except `mean_std`, which has none; equal rewards give exactly 0.
    Sources: GRPO (arXiv:2402.03300) with TRL's 1e-4, Dr. GRPO (arXiv:2503.20783), RLOO
    (arXiv:2402.14740).
    Raises InputError for an unknown mode, a reward that is not finite, a group of one response.
    """
    _require_known("advantage", mode, get_args(Advantage))
    r_N, group_N, size_M = _groups(reward_N, prompt_N)
    if bool((size_M == 1).any()):
        prompt = prompt_N[(size_M[group_N] == 1).nonzero()[0, 0]]
        raise InputError(
            f"prompt {int(prompt)} has one response: its advantage ({mode}) is relative to the other "
            "responses to the prompt; sample at least 2 responses per prompt"
        )
    # Advantages are invariant to a shift. Relative to the group's minimum, equal rewards are exactly
    # 0 throughout, whereas (0.1 + 0.1 + 0.1) / 3 is not 0.1.
    r_N = r_N - _extreme(r_N, group_N, len(size_M), "amin")[group_N]
    sum_M = _sum(r_N, group_N, len(size_M))
    if mode == "leave_one_out":
        return r_N - (sum_M[group_N] - r_N) / (size_M[group_N] - 1)
    centred_N = r_N - (sum_M / size_M)[group_N]
    if mode == "mean":
        return centred_N
    std_M = (_sum(centred_N**2, group_N, len(size_M)) / (size_M - 1)).sqrt()
    return centred_N / (std_M[group_N] + STD_EPS)


def equal_reward_groups(reward_N: Float[Tensor, " N"], prompt_N: Int[Tensor, " N"]) -> int:
    """Number of prompts whose responses all have the same reward, so that they do not enter the step.

    Raises InputError for a reward that is not finite.
    """
    r_N, group_N, size_M = _groups(reward_N, prompt_N)
    low_M = _extreme(r_N, group_N, len(size_M), "amin")
    high_M = _extreme(r_N, group_N, len(size_M), "amax")
    return int((low_M == high_M).sum())


def update_batch(
    batch: Batch,
    advantage_N: Float[Tensor, " N"],
    normalisation: Normalisation,
    constant: float | None = None,
) -> UpdateBatch:
    """U with the `coefficients` of J and what every sequence adds to their divisor.

    That is T_i tokens for `token_mean`, else 1: N is the number of responses to the prompts drawn. (The
    factors T_i, L_max and L of the others belong to the sequence, and do not vary with the other
    prompts.) Raises InputError where `coefficients` does.
    """
    T_N, prompt_N = batch.response_length_N, batch.prompt_N
    coef_NR = coefficients(advantage_N, T_N, prompt_N, normalisation, constant)
    adds_N = f64(T_N) if normalisation == "token_mean" else torch.ones(len(coef_NR)).double()
    return UpdateBatch(batch, coef_NR, adds_N)


def coefficients(
    advantage_N: Float[Tensor, " N"],
    response_length_N: Int[Tensor, " N"],
    prompt_N: Int[Tensor, " N"],
    normalisation: Normalisation,
    constant: float | None = None,
) -> Float[Tensor, "N R"]:
    """Coefficients c_ik = A_i z_i of J = sum_ik c_ik l_ik, [N, R] with R = max T_i, float64.

        sequence:       z_i = 1 / N               (N = B G sequences)
        token_mean:     z_i = 1 / sum_j T_j
        sequence_mean:  z_i = 1 / (N T_i)
        longest:        z_i = 1 / (N max of T_j over the responses j to the same prompt)
        constant:       z_i = 1 / (N L), L = `constant` in tokens, which the others ignore

    c_ik is 0 for k >= T_i, past the end of the response. Sources: see PRESETS.
    Raises InputError for an unknown normalisation, an empty response, a missing or
    non-positive L.
    """
    _require_known("normalisation", normalisation, get_args(Normalisation))
    _require_vectors(advantage_N, response_length_N, prompt_N)
    T_N = response_length_N.detach().to(device="cpu", dtype=torch.int64)
    if bool((T_N < 1).any()):
        empty = int((T_N < 1).nonzero()[0, 0])
        raise InputError(
            f"sequence {empty} has {int(T_N[empty])} response tokens, expected at least 1 "
            "(the first EOS counts): drop the sequence"
        )
    z_N = 1 / _divisor(T_N, prompt_N, normalisation, constant)
    real_NR = torch.arange(int(T_N.max()))[None, :] < T_N[:, None]
    return torch.where(real_NR, (f64(advantage_N) * z_N)[:, None], 0.0)


def _divisor(
    T_N: Tensor, prompt_N: Tensor, normalisation: Normalisation, constant: float | None
) -> Tensor:
    N = len(T_N)
    ones_N = torch.ones(N, dtype=torch.float64)
    if normalisation == "sequence":
        return N * ones_N
    if normalisation == "token_mean":
        return T_N.sum() * ones_N
    if normalisation == "sequence_mean":
        return N * T_N * ones_N
    if normalisation == "longest":
        group_N = torch.unique(prompt_N.cpu(), return_inverse=True)[1]
        return N * _extreme(T_N * ones_N, group_N, int(group_N.max()) + 1, "amax")[group_N]
    if constant is None or not 0 < constant < float("inf"):
        raise InputError(
            f'normalisation "constant" divides by L = {constant}, expected a positive number of '
            "tokens: set it, usually to max_new_tokens"
        )
    return N * constant * ones_N


def _groups(reward_N: Tensor, prompt_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards as float64, the group number of every sequence, the size of every group."""
    _require_vectors(reward_N, prompt_N)
    r_N = f64(reward_N)
    if not bool(r_N.isfinite().all()):
        bad = int((~r_N.isfinite()).nonzero()[0, 0])
        raise InputError(f"the reward of sequence {bad} is {float(r_N[bad])}, expected a finite number")
    _, group_N, size_M = torch.unique(prompt_N.cpu(), return_inverse=True, return_counts=True)
    return r_N, group_N, size_M


def _sum(x_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64).index_add(0, group_N, x_N)


def _extreme(x_N: Tensor, group_N: Tensor, groups: int, which: Literal["amin", "amax"]) -> Tensor:
    empty_M = torch.zeros(groups, dtype=torch.float64)
    return empty_M.scatter_reduce(0, group_N, x_N, reduce=which, include_self=False)


def _require_vectors(*vectors: Tensor) -> None:
    shapes = [tuple(v.shape) for v in vectors]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise InputError(f"found shapes {shapes}, expected one entry per sequence in each")


def _require_known(what: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise InputError(f"unknown {what} {found!r}: expected one of {', '.join(known)}")
