"""Cross-fitted ridge regression on features of the prefix, of the entropy that follows a token."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..policy.layout import select
from ..types import Batch, InputError, ResponseMask, TokenStats

Features: TypeAlias = Callable[[Int[Tensor, " n"]], Float[Tensor, "T F"]]
"""Sequence indices -> features of all their response tokens, in order, each from its prefix alone."""

FOLDS = 5
LEAST_PROMPTS = 3  # so that the penalty is chosen without the fold that is predicted
PENALTIES = (
    1.0,
    10.0,
    100.0,
    1000.0,
)  # in tokens: the coefficient of a feature seen n times shrinks by n / (n + penalty)
BUCKETS = 64  # hash values of the previous token's id
AT_ONCE = 65_536  # tokens whose features are held at once


def prefix_features(
    batch: Batch, stats: TokenStats, mask_NR: ResponseMask, buckets: int = BUCKETS
) -> Features:
    """Position, h_j by position, mean entropy and log-probability so far, previous token (hashed).

    Positions have one bin each up to 16, then four per octave. All features are known before token j is
    drawn and are a few nats at most, so that one penalty suits all.
    """
    places = _position_bin(torch.arange(mask_NR.shape[1]))
    bins = int(places.max()) + 1

    def features(index_n: Tensor) -> Tensor:
        rows = select(batch, index_n)
        row_T, k_T = mask_NR[index_n].nonzero(as_tuple=True)
        before_T = rows.tokens_NL[row_T, rows.prompt_length_N[row_T] + k_T - 1]
        h_NR = stats.entropy_NR[index_n]
        logp_NR = stats.logp_NR[index_n]
        h_T = h_NR[row_T, k_T]
        logp_before_NR = logp_NR.cumsum(1) - logp_NR
        place_TF = _one_hot(places[k_T], bins)
        return torch.cat(
            [
                place_TF,
                place_TF * h_T[:, None],
                (h_NR.cumsum(1)[row_T, k_T] / (k_T + 1))[:, None],
                (logp_before_NR[row_T, k_T] / k_T.clamp(min=1))[:, None],
                _one_hot(_bucket(before_T, buckets), buckets),
            ],
            dim=1,
        )

    return features


def ridge(
    target_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    unit_N: Int[Tensor, " N"],
    features: Features,
    weight_NR: Float[Tensor, "N R"] | None = None,
) -> Float[Tensor, "N R"]:
    """b = x beta, with beta = argmin of sum weight (Q - x beta)^2 + penalty |beta|^2 over other folds.

    Sampling units are divided into `FOLDS` folds, so that neither a sequence nor another one of its
    prompt enters its own baseline. For each fold the penalty is the one of `PENALTIES` (in units of the
    mean weight) with the smallest cross-validation error on the remaining folds; the fold itself does
    not enter. The optimal weight for one direction is l'^2. Raises InputError for fewer than three
    units.
    """
    _, index_N = unit_N.unique(return_inverse=True)
    folds = min(FOLDS, int(index_N.max()) + 1)
    if folds < LEAST_PROMPTS:
        raise InputError(
            f'{folds} prompts in E: baseline = "ridge" needs at least three: raise sampling.B_E, add '
            'prompts, or set baseline = "position"'
        )
    fold_N = index_N % folds
    grams = [_gram(target_NR, mask_NR, features, weight_NR, fold_N == f) for f in range(folds)]
    b_NR = torch.zeros_like(target_NR)
    for f in range(folds):
        beta_F = _fit([g for other, g in enumerate(grams) if other != f])
        for part_n in (fold_N == f).nonzero().squeeze(1).split(max(1, AT_ONCE // mask_NR.shape[1])):
            part_nR = mask_NR[part_n]
            b_NR[part_n] = torch.zeros_like(b_NR[part_n]).masked_scatter(
                part_nR, features(part_n) @ beta_F
            )
    return b_NR


def _position_bin(k_R: Tensor) -> Tensor:
    octaves = (k_R.double().clamp(min=16) / 16).log2()
    return torch.where(k_R < 16, k_R, 16 + (4 * octaves).long())


def _bucket(id_T: Tensor, buckets: int) -> Tensor:
    # Knuth's multiplicative hash: neighbouring ids (of digits, say) fall into different buckets.
    return ((id_T * 2654435761) % 2**32 * buckets) >> 32


def _one_hot(index_T: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(index_T, count).double()


def _gram(
    target_NR: Tensor,
    mask_NR: ResponseMask,
    features: Features,
    weight_NR: Tensor | None,
    chosen_N: Tensor,
) -> tuple[Tensor, ...]:
    """x'wx, x'wQ, sum of w and count over the tokens of the chosen sequences."""
    total: tuple[Tensor, ...] = ()
    for part_n in chosen_N.nonzero().squeeze(1).split(max(1, AT_ONCE // mask_NR.shape[1])):
        x_TF, mask_nR = features(part_n), mask_NR[part_n]
        q_T = target_NR[part_n][mask_nR]
        w_T = torch.ones_like(q_T) if weight_NR is None else weight_NR[part_n][mask_nR]
        wx_TF = w_T[:, None] * x_TF
        part = (x_TF.T @ wx_TF, q_T @ wx_TF, w_T.sum(), torch.tensor(float(len(q_T))))
        total = tuple(a + b for a, b in zip(total, part, strict=True)) if total else part
    return total


def _fit(grams: list[tuple[Tensor, ...]]) -> Float[Tensor, " F"]:
    """Coefficients from all given folds, at the penalty with the least leave-one-fold-out error."""

    def without(f: int | None) -> list[Tensor]:
        kept = [g for i, g in enumerate(grams) if i != f]
        return [torch.stack(column).sum(0) for column in zip(*kept, strict=True)]

    def solve(total: list[Tensor], penalty: float) -> Tensor:
        xx_FF, xq_F, weight, count = total
        shrink = penalty * (weight / count).clamp(min=1e-300)
        beta_F: Tensor = torch.linalg.solve(xx_FF + shrink * torch.eye(len(xq_F)).double(), xq_F)
        return beta_F

    def error(penalty: float) -> float:
        """Squared prediction error, without the sum of w Q^2, which all penalties share."""
        betas = [solve(without(f), penalty) for f in range(len(grams))]
        return sum(
            float(beta_F @ xx_FF @ beta_F - 2 * beta_F @ xq_F)
            for beta_F, (xx_FF, xq_F, *_) in zip(betas, grams, strict=True)
        )

    return solve(without(None), min(PENALTIES, key=error))
