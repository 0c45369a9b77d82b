"""Baselines for the score term: less variance, the same expectation, in prediction and measurement.

The derivative of the entropy is sum_j h'_ij + sum_j l'_ij Q_ij, with Q_ij the integrand still to come
after token j. As E[l'_ij | prefix] = 0, a b_ij that knows nothing of sequence i but its prefix before
token j may be taken off Q_ij. In the measured change its place is that of a control variate: with
r_ij = l_ij(theta') - l_ij(theta), the entropy of token j becomes

    h_ij(theta') - rho_ij (exp(r_ij) - 1) b_ij    weights = "per_decision": those of j's prefix
    h_ij(theta') - (1 - exp(-r_ij)) b_ij          weights = "sequence": those of the response

rho_ij = p_theta / p_sampler of the token. What is taken off, times its weight, has expectation 0
whatever theta' is; at theta' = theta it is 0, with derivative rho l' b (or l' b). So a baseline is a
change of the token statistics that the estimators are given: no estimator knows of it, and the
prediction stays the exact derivative of what measures.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import estimators
from .layout import select
from .types import Batch, Entropy, InputError, ResponseMask, TokenStats

Kind: TypeAlias = Literal["none", "entropy", "position", "ridge"]

Features: TypeAlias = Callable[[Int[Tensor, " n"]], Float[Tensor, "T F"]]
"""Sequences -> the features of every response token of theirs, in order: of its prefix alone."""

FOLDS = 5
PENALTIES = (
    1.0,
    10.0,
    100.0,
    1000.0,
)  # in tokens: a feature seen n times is shrunk by n / (n + penalty)
BUCKETS = 64  # of the previous token's id
AT_ONCE = 256  # sequences whose features are held at one time


def baseline(
    kind: Kind,
    batch: Batch,
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Float[Tensor, "N R"]:
    """b_ij: 0; the token's entropy h_ij; the mean of Q at position j over other prompts; or ridge
    regression of Q on `prefix_features`, cross-fitted by prompt.

    Raises InputError where the estimator has no place for one (`score_target`), and for "ridge" with
    fewer than three prompts.
    """
    target_NR = score_target(stats, mask_NR, entropy, log_ratio_NR)
    if kind == "none":
        return torch.zeros_like(target_NR)
    if kind == "entropy":
        return stats.entropy_NR * mask_NR
    if kind == "position":
        return position_mean(target_NR, mask_NR, batch.prompt_N)
    return ridge(target_NR, mask_NR, batch.prompt_N, prefix_features(batch, stats, mask_NR))


def score_target(
    stats: TokenStats,
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> Float[Tensor, "N R"]:
    """Q_ij: what multiplies rho_ij l'_ij in the derivative, in units of the weight of h'_ij.

    On the policy's own samples, per-decision weights: sum over k > j of h_ik - R. Raises InputError
    for the sampled integrand and for clipped weights, whose expectations a baseline would change.
    """
    if entropy.integrand == "sampled":
        raise InputError(
            'a baseline needs integrand = "rao_blackwell", this is "sampled": change it, or take '
            'baseline = "none"'
        )
    if entropy.clip is not None:
        raise InputError(
            f"a baseline needs importance weights that are not clipped, clip = {entropy.clip}: "
            'take the clip away, or baseline = "none"'
        )
    p_NR, q_NR = estimators.gradient_coefficients(stats, mask_NR, entropy, log_ratio_NR)
    unit_NR = q_NR * _token_ratio(mask_NR, entropy, log_ratio_NR)
    return torch.where(mask_NR & (unit_NR > 0), p_NR / unit_NR.clamp(min=1e-300), 0.0)


def position_mean(
    target_NR: Float[Tensor, "N R"], mask_NR: ResponseMask, unit_N: Int[Tensor, " N"]
) -> Float[Tensor, "N R"]:
    """Mean of Q_kj over the sequences k of other sampling units that reach position j; 0 if none do."""
    _, index_N = unit_N.unique(return_inverse=True)

    def others(x_NR: Tensor) -> Tensor:
        own_MR = x_NR.new_zeros(int(index_N.max()) + 1, x_NR.shape[1]).index_add(0, index_N, x_NR)
        return x_NR.sum(0) - own_MR[index_N]

    count_NR = others(mask_NR.double())
    mean_NR = others(target_NR * mask_NR) / count_NR.clamp(min=1)
    return torch.where(mask_NR & (count_NR > 0), mean_NR, 0.0)


def prefix_features(
    batch: Batch, stats: TokenStats, mask_NR: ResponseMask, buckets: int = BUCKETS
) -> Features:
    """Position, h_j by position, mean entropy and log-probability so far, the token before, hashed.

    Positions are told apart up to 16, then by quarters of an octave. All are known before token j is
    drawn, and of the order of a nat at most of a few, so that one penalty fits all.
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

    Units are dealt to `FOLDS` folds, so that no sequence, and none of its prompt, enters its own
    baseline. For each fold the penalty is the one of `PENALTIES` (in mean weights) that predicts the
    remaining folds best, each from the rest of them: the fold itself has no say. The best weight for
    one direction is l'^2. Raises InputError for fewer than three units.
    """
    _, index_N = unit_N.unique(return_inverse=True)
    folds = min(FOLDS, int(index_N.max()) + 1)
    if folds < 3:
        raise InputError(
            f'{folds} prompts in E: baseline = "ridge" needs three at least; take more, or '
            'baseline = "position"'
        )
    fold_N = index_N % folds
    grams = [_gram(target_NR, mask_NR, features, weight_NR, fold_N == f) for f in range(folds)]
    b_NR = torch.zeros_like(target_NR)
    for f in range(folds):
        beta_F = _fit([g for other, g in enumerate(grams) if other != f])
        for part_n in (fold_N == f).nonzero().squeeze(1).split(AT_ONCE):
            part_nR = mask_NR[part_n]
            b_NR[part_n] = torch.zeros_like(b_NR[part_n]).masked_scatter(
                part_nR, features(part_n) @ beta_F
            )
    return b_NR


def controlled_tangent(
    tangent: TokenStats,
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> TokenStats:
    """(l', h' - rho l' b): what `estimators.first_order` is to be given."""
    rho_NR = _token_ratio(mask_NR, entropy, log_ratio_NR)
    return tangent._replace(
        entropy_NR=tangent.entropy_NR - rho_NR * tangent.logp_NR * baseline_NR * mask_NR
    )


def controlled_stats(
    stats: TokenStats,
    moved: TokenStats,
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> TokenStats:
    """(l, h - control variate) at theta': the `moved` that `estimators.measured_change` takes."""
    rho_NR = _token_ratio(mask_NR, entropy, log_ratio_NR)
    step_NR = (moved.logp_NR - stats.logp_NR) * mask_NR
    sign = 1.0 if entropy.weights == "per_decision" else -1.0
    control_NR = sign * rho_NR * torch.expm1(sign * step_NR) * baseline_NR
    return moved._replace(entropy_NR=moved.entropy_NR - control_NR)


def controlled_coefficients(
    coefficients: tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]],
    baseline_NR: Float[Tensor, "N R"],
    mask_NR: ResponseMask,
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """(p - q rho b, q) of `estimators.gradient_coefficients`' (p, q): X of the derivative with b."""
    p_NR, q_NR = coefficients
    return p_NR - q_NR * _token_ratio(mask_NR, entropy, log_ratio_NR) * baseline_NR, q_NR


def _token_ratio(mask_NR: ResponseMask, entropy: Entropy, log_ratio_NR: Tensor | None) -> Tensor:
    """rho_ij where the weight of position j does not hold token j, else 1."""
    if log_ratio_NR is None or entropy.weights == "sequence":
        return torch.ones(mask_NR.shape, dtype=torch.float64)
    return (log_ratio_NR * mask_NR).exp()


def _position_bin(k_R: Tensor) -> Tensor:
    octaves = (k_R.double().clamp(min=16) / 16).log2()
    return torch.where(k_R < 16, k_R, 16 + (4 * octaves).long())


def _bucket(id_T: Tensor, buckets: int) -> Tensor:
    # Knuth's multiplier: neighbouring ids (digits, say) fall into different buckets.
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
    for part_n in chosen_N.nonzero().squeeze(1).split(AT_ONCE):
        x_TF, mask_nR = features(part_n), mask_NR[part_n]
        q_T = target_NR[part_n][mask_nR]
        w_T = torch.ones_like(q_T) if weight_NR is None else weight_NR[part_n][mask_nR]
        wx_TF = w_T[:, None] * x_TF
        part = (x_TF.T @ wx_TF, q_T @ wx_TF, w_T.sum(), torch.tensor(float(len(q_T))))
        total = tuple(a + b for a, b in zip(total, part, strict=True)) if total else part
    return total


def _fit(grams: list[tuple[Tensor, ...]]) -> Float[Tensor, " F"]:
    """Coefficients from all folds given, at the penalty that predicts each best from the rest."""

    def without(f: int | None) -> list[Tensor]:
        kept = [g for i, g in enumerate(grams) if i != f]
        return [torch.stack(column).sum(0) for column in zip(*kept, strict=True)]

    def solve(total: list[Tensor], penalty: float) -> Tensor:
        xx_FF, xq_F, weight, count = total
        shrink = penalty * (weight / count).clamp(min=1e-300)
        beta_F: Tensor = torch.linalg.solve(xx_FF + shrink * torch.eye(len(xq_F)).double(), xq_F)
        return beta_F

    def error(penalty: float) -> float:
        """Squared error of prediction, but for the sum of w Q^2 that all penalties share."""
        betas = [solve(without(f), penalty) for f in range(len(grams))]
        return sum(
            float(beta_F @ xx_FF @ beta_F - 2 * beta_F @ xq_F)
            for beta_F, (xx_FF, xq_F, *_) in zip(betas, grams, strict=True)
        )

    return solve(without(None), min(PENALTIES, key=error))
