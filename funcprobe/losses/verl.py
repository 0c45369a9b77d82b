"""The actor's loss of verl 0.9.1, of a whole optimizer step: a PPO mini-batch."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import InputError
from .loss import Loss, LossInputs, LossValue
from .verl_correction import EXPONENT, importance_weights, kept
from .verl_policy import Call, Metrics, geo_mean, token_losses
from .verl_settings import LossAggMode, VerlLoss, require_settings

__all__ = ["VerlLoss", "verl_loss"]

LARGEST_K3 = 10.0  # bound of the k3 estimate of a token, nats


def verl_loss(settings: VerlLoss) -> Loss:
    """The loss of verl 0.9.1's actor, from its update of a mini-batch.

        loss = policy - entropy_coeff * entropy + kl_loss_coef * KL     (the KL with use_kl_loss)

    each aggregated over the tokens in the mask of the mini-batch by `loss_agg_mode`, with the counts
    of all micro-batches and processes, so that it does not depend on how the batch was split:

        token-mean               sum_ik x_ik / number of tokens
        token-sum                sum_ik x_ik
        seq-mean-token-sum       sum_ik x_ik / S,      S = `global_batch_size`
        seq-mean-token-mean      sum_i (sum_k x_ik / T_i) / S
        seq-mean-token-sum-norm  sum_ik x_ik / (S L),  L = `loss_scale_factor`

    The policy losses, with r = exp(l - l_old), A the advantage, e- and e+ the clip ranges, clip(r) =
    min(max(r, 1 - e-), 1 + e+) and [.] held fixed; log r is bounded by +-20 where verl bounds it:

        vanilla      max(-A r, -A clip(r)), where A < 0 at most -A clip_ratio_c
                     (PPO, arXiv:1707.06347; dual clip, arXiv:1912.09729)
        dppo_tv      -A [min(r, clip_ratio_c)] l where A (p - p_old) is not beyond e- or e+
        dppo_kl      the same with the binary KL divergence (arXiv:2602.04879)
        gspo         vanilla's maximum with r = [s_i] exp(l - [l]), log s_i the mean of log r over i
                     (arXiv:2507.18071)
        sapo         -A sigmoid(tau (r - 1)) 4 / tau, always seq-mean-token-mean (arXiv:2511.20347)
        gpg          -A l
        dro          -A l + dro_beta / 2 (log r)**2
        cispo        -A [clip(r)] l (arXiv:2506.13585)
        geo_mean     -A exp(mean over i of log r, clipped to -e-, e+ where that is pessimistic)
                     (arXiv:2507.20673)
        kl_cov       -A r, plus ppo_kl_coef |log r| for the kl_cov_ratio tokens with the largest
                     covariance (A - mean A) (l - mean l)
        clip_cov     max(-A r, -A clip(r)), without clip_cov_ratio of the tokens (both arXiv:2505.22617)
        bypass_mode  vanilla or -A l (`loss_type`), with the sampler as the old policy

    Those that depend on the split, on `microbatch_N` and `process_N`: geo_mean is the mean over each
    micro-batch's sequences, summed over micro-batches; clip_cov and kl_cov choose tokens within each.

    clip_cov drops tokens at random, of those whose covariance is between its bounds. The state of
    verl's generator is not recorded, and so the loss is the expectation over the draw: every candidate
    counts with the probability that it is kept. That is verl's loss where all candidates are dropped,
    and its mean otherwise; the number dropped (actor/pg_clipfrac) is exact. kl_cov has no randomness;
    between equal covariances at its cut it takes those that torch.topk takes, in float64.

    KL by `kl_loss_type`, with x = l - l_ref, and the derivative in l that training follows:

        kl, k1           x                                  1
        abs              |x|                                sign x, 0 at 0
        mse, k2          x**2 / 2                           x
        low_var_kl, k3   exp(-x) - 1 + x, at most 10        1 - exp(-x), 0 beyond 10 or |x| > 20

    With "+" (as "k3+") the value is that of the name and the derivative that of k2, x.

    With `rollout_is` a token's policy loss is multiplied by a weight of the old policy (bypass_mode
    with reinforce: of theta) against the sampler, held fixed; `rollout_rs` removes tokens from the
    mask, in verl's V1 trainer without reducing the number of tokens that token-mean divides by. Both
    are in the mask of U before rejection. `rollout_is_batch_normalize` takes U for the batch that
    verl normalises over: its generation batch (bypass_mode: a micro-batch of all processes).

    `inputs.old_logp_NR` None means theta itself, as in the first mini-batch of a generation batch.
    Advantages are one per sequence; verl's distillation losses and losses registered by a user are not
    here. verl computes in float32: a ratio within its rounding of a bound may fall on the other side.

    Metrics: verl's names, aggregated over micro-batches and processes as verl does for one mini-batch
    (what it prints is their mean over the mini-batches of a training step): actor/loss,
    actor/pg_loss, actor/entropy_loss, actor/kl_loss, actor/kl_coef, actor/pg_clipfrac,
    actor/pg_clipfrac_lower, actor/ppo_kl. (Its actor/entropy is of the generation batch, at the old
    policy; it logs actor/entropy_loss only where it needs the entropy.)

    Where the loss is not differentiable, the subgradient is torch's: at a bound of a clip that of the
    inside, at the dual clip's bound the mean of both sides.

    Source: verl 0.9.1, verl/trainer/ppo/core_algos.py (losses, agg_loss, kl_penalty),
    verl/workers/utils/losses.py (ppo_loss), verl/workers/engine/fsdp/transformer_impl.py (counts),
    rollout_corr_helper.py. Raises InputError for a value that verl rejects; the loss does so for
    missing arrays, and for a step without a token in the mask.
    """
    require_settings(settings)
    by_token = settings.loss_agg_mode == "token-mean"
    policy_by_token = by_token and settings.loss_mode not in {"sapo", "geo_mean"}
    return Loss(
        partial(_step_loss, settings),
        divisor="tokens" if policy_by_token else "sequences",
        entropy_divisor="tokens" if by_token else "sequences",
    )


class _Arrays(NamedTuple):
    """Of the step or of the rows of a call, [N, R], zero off the mask."""

    logp_NR: Tensor
    entropy_NR: Tensor
    old_logp_NR: Tensor
    ref_logp_NR: Tensor
    advantage_NR: Tensor
    weight_NR: Tensor | None  # of the policy loss
    mask_NR: Tensor  # of the entropy and the KL
    policy_mask_NR: Tensor  # of the policy loss
    real_NR: Tensor  # every token of the responses

    def rows(self, rows_N: Tensor) -> "_Arrays":
        found = {name: x_NR[rows_N] for name, x_NR in self._asdict().items() if x_NR is not None}
        return self._replace(**found)


class _Counts(NamedTuple):
    """Of the whole step."""

    tokens: int
    sequences: int
    processes: int


def _step_loss(settings: VerlLoss, l_NR: Tensor, h_NR: Tensor, inputs: LossInputs) -> LossValue:
    """The mean over processes of the sum over micro-batches of what verl's loss returns."""
    tokens = int(inputs.mask_NR.sum())
    if tokens == 0:
        raise InputError("no token of U is in the loss: mask_NR is false everywhere")
    sequences = len(l_NR) if settings.global_batch_size is None else settings.global_batch_size
    counts = _Counts(tokens, sequences, len(inputs.process_N.unique()))
    step = _arrays(settings, l_NR, h_NR, inputs)
    split_2N = torch.stack([inputs.process_N, inputs.microbatch_N])
    call_N = torch.unique(split_2N, dim=1, return_inverse=True)[1]
    policy = entropy = kl = torch.zeros((), dtype=torch.float64)
    logged: list[Metrics] = []
    for i in range(int(call_N.max()) + 1):
        call = step.rows(call_N == i)
        part, metrics = _policy_loss(settings, call, counts)
        policy = policy + part
        entropy = entropy + _sum(settings, call, counts, call.entropy_NR, call.mask_NR)
        if settings.use_kl_loss:
            kl_NR = _kl(settings.kl_loss_type, call.logp_NR - call.ref_logp_NR)
            kl = kl + _sum(settings, call, counts, kl_NR, call.mask_NR)
        logged.append(metrics)
    loss = policy - settings.entropy_coeff * entropy
    means = {name: torch.stack([x[name] for x in logged]).mean() for name in logged[0]}
    means |= {"actor/pg_loss": policy, "actor/entropy_loss": entropy}
    if settings.use_kl_loss:
        loss = loss + settings.kl_loss_coef * kl
        means |= {"actor/kl_loss": kl, "actor/kl_coef": loss.new_tensor(settings.kl_loss_coef)}
    return LossValue(loss, {name: x.detach() for name, x in (means | {"actor/loss": loss}).items()})


def _arrays(settings: VerlLoss, l_NR: Tensor, h_NR: Tensor, inputs: LossInputs) -> _Arrays:
    """The step's arrays after the rollout correction."""
    mask_NR, bypass = inputs.mask_NR, settings.loss_mode == "bypass_mode"

    def masked(x_NR: Tensor) -> Tensor:
        # Where padding is not a number, neither would a product with the mask be.
        return torch.where(mask_NR, x_NR, 0.0).double()

    def given(name: str, needed_by: str) -> Tensor:
        x_NR = getattr(inputs, name)
        if x_NR is None:
            raise InputError(f"{needed_by} needs {name}, which is None: record it with the rollouts")
        if not bool(x_NR.isfinite()[mask_NR].all()):
            raise InputError(
                f"{needed_by} needs {name} of every token in the loss, and some are not finite"
            )
        return masked(x_NR)

    logp_NR = masked(l_NR)
    theta_NR = logp_NR.detach()
    if bypass:
        old_NR = given("sampler_logp_NR", 'loss_mode "bypass_mode"')
    else:
        old_NR = theta_NR if inputs.old_logp_NR is None else masked(inputs.old_logp_NR)
    weight_NR, kept_NR = None, mask_NR
    if settings.rollout_is is not None or settings.rollout_rs is not None:
        sampler_NR = given("sampler_logp_NR", "the rollout correction (rollout_is, rollout_rs)")
        log_ratio_NR = (theta_NR if bypass else old_NR) - sampler_NR
        kept_NR = mask_NR & kept(settings, log_ratio_NR, mask_NR)
        if not bypass or settings.loss_type == "reinforce":
            over_N = inputs.microbatch_N if bypass else torch.zeros_like(inputs.microbatch_N)
            weight_NR = importance_weights(settings, log_ratio_NR, mask_NR, over_N)
    return _Arrays(
        logp_NR=logp_NR,
        entropy_NR=masked(h_NR),
        old_logp_NR=old_NR,
        ref_logp_NR=given("ref_logp_NR", "use_kl_loss") if settings.use_kl_loss else theta_NR,
        advantage_NR=masked(inputs.advantage_N[:, None].expand(mask_NR.shape)),
        weight_NR=weight_NR,
        mask_NR=mask_NR if bypass else kept_NR,
        policy_mask_NR=kept_NR,
        # Past the end of a response l and h are 0, else both only at a probability of exactly 1.
        real_NR=mask_NR | (l_NR.detach() != 0) | (h_NR.detach() != 0),
    )


def _policy_loss(settings: VerlLoss, call: _Arrays, counts: _Counts) -> tuple[Tensor, Metrics]:
    """The call's part of the step's policy loss, and what verl logs of it."""
    mask_NR = call.policy_mask_NR
    rows = Call(
        torch.where(mask_NR, call.logp_NR, 0.0),
        torch.where(mask_NR, call.old_logp_NR, 0.0),
        torch.where(mask_NR, call.advantage_NR, 0.0),
        mask_NR,
        call.weight_NR,
    )
    if settings.loss_mode == "geo_mean":
        mean, metrics = geo_mean(settings, rows)
        return mean / counts.processes, metrics
    loss_NR, metrics = token_losses(settings, rows)
    mode = "seq-mean-token-mean" if settings.loss_mode == "sapo" else settings.loss_agg_mode
    return _sum(settings, call, counts, loss_NR, mask_NR, mode), metrics


def _sum(
    settings: VerlLoss,
    call: _Arrays,
    counts: _Counts,
    x_NR: Tensor,
    mask_NR: Tensor,
    mode: LossAggMode | None = None,
) -> Float[Tensor, ""]:
    """The call's part of the aggregate over the step; mode None: `loss_agg_mode`."""
    mode = settings.loss_agg_mode if mode is None else mode
    sum_N = (x_NR * mask_NR).sum(1)
    if mode == "token-mean":
        return sum_N.sum() / counts.tokens
    if mode == "token-sum":
        return sum_N.sum()
    if mode == "seq-mean-token-mean":
        sum_N = sum_N / mask_NR.sum(1).clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        sum_N = sum_N / _horizon(settings, call)
    return sum_N.sum() / counts.sequences


def _horizon(settings: VerlLoss, call: _Arrays) -> float:
    """L in tokens: `loss_scale_factor`, else the length of the call's longest response."""
    if settings.loss_scale_factor is not None:
        return settings.loss_scale_factor
    positions = call.real_NR.any(0).nonzero()
    return float(positions.max()) + 1 if len(positions) else 1.0


def _kl(kind: str, x_NR: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
    """Estimate of the KL divergence to the reference per token, x = l - l_ref."""
    squares_NR = x_NR.square() / 2
    name = kind.removesuffix("+")
    if name in {"kl", "k1"}:
        value_NR = x_NR
    elif name == "abs":
        value_NR = x_NR.abs()
    elif name in {"mse", "k2"}:
        value_NR = squares_NR
    else:
        y_NR = (-x_NR).clamp(-EXPONENT, EXPONENT)
        value_NR = (y_NR.exp() - y_NR - 1).clamp(max=LARGEST_K3)
    return value_NR if name == kind else squares_NR - squares_NR.detach() + value_NR.detach()
