"""The policy losses of verl 0.9.1, token by token, on the rows of one call of its loss.

They are verl's in its torch operations where the loss is not smooth, so that autograd takes verl's
subgradients (verl/trainer/ppo/core_algos.py).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .verl_correction import EXPONENT
from .verl_settings import VerlLoss, clip_range

SEQUENCE_EXPONENT = 10.0  # bound of the log-ratio of a sequence, gspo

CLIPPED, CLIPPED_BELOW, KL = "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"

Metrics: TypeAlias = Mapping[str, Tensor]


class Call(NamedTuple):
    """The rows that one call of the loss is of, [N, R], zero off the mask."""

    logp_NR: Float[Tensor, "N R"]
    old_logp_NR: Float[Tensor, "N R"]
    advantage_NR: Float[Tensor, "N R"]
    mask_NR: Bool[Tensor, "N R"]
    weight_NR: Float[Tensor, "N R"] | None = None  # importance weights against the sampler


def token_losses(settings: VerlLoss, call: Call) -> tuple[Float[Tensor, "N R"], Metrics]:
    """Policy loss of every token, and what verl logs of it; of all modes but geo_mean."""
    loss_NR, metrics = TOKEN_LOSSES[settings.loss_mode](settings, call)
    return loss_NR if call.weight_NR is None else loss_NR * call.weight_NR, metrics


def geo_mean(settings: VerlLoss, call: Call) -> tuple[Float[Tensor, ""], Metrics]:
    """The mean over the call's sequences, those without a token in the loss included."""
    low, high = clip_range(settings)
    x_NR, sign_NR = call.logp_NR - call.old_logp_NR, call.advantage_NR.sign()
    clipped_NR = x_NR.clamp(-low, high)
    lower_NR = sign_NR * torch.minimum(sign_NR * x_NR, sign_NR * clipped_NR)

    def mean(y_NR: Tensor) -> Tensor:
        return (y_NR * call.mask_NR).sum(1) / call.mask_NR.sum(1).clamp(min=1)

    loss_N = -mean(call.advantage_NR) * mean(lower_NR).exp()
    if call.weight_NR is not None:
        loss_N = loss_N * mean((call.weight_NR + 1e-10).log()).exp()
    beyond_NR = x_NR.detach() != clipped_NR.detach()
    metrics = {
        CLIPPED: masked_mean(beyond_NR & (sign_NR > 0), call.mask_NR),
        CLIPPED_BELOW: masked_mean(beyond_NR & (sign_NR < 0), call.mask_NR),
        KL: masked_mean(-x_NR, call.mask_NR),
    }
    return loss_N.mean(), metrics


def masked_mean(x_NR: Tensor, mask_NR: Tensor) -> Float[Tensor, ""]:
    """Mean over the mask, as verl logs it: no gradient, 0 where nothing is in the mask."""
    return (x_NR.detach() * mask_NR).double().sum() / mask_NR.sum().clamp(min=1)


def _vanilla(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    A_NR, (x_NR, ratio_NR) = call.advantage_NR, _ratio(call)
    plain_NR, clipped_NR = -A_NR * ratio_NR, -A_NR * _clipped(settings, ratio_NR)
    larger_NR, bound_NR = torch.maximum(plain_NR, clipped_NR), -A_NR * settings.clip_ratio_c
    loss_NR = torch.where(A_NR < 0, torch.minimum(bound_NR, larger_NR), larger_NR)
    below_NR = (larger_NR > bound_NR) & (A_NR < 0)
    return loss_NR, _metrics(call, x_NR, clipped_NR > plain_NR, below_NR)


def _dppo(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    """Without tokens whose probability left the trust region on the side that A pushes to."""
    (low, high), (x_NR, ratio_NR) = clip_range(settings), _ratio(call)
    logp_NR, A_NR = call.logp_NR.detach(), call.advantage_NR
    p_NR, old_NR = logp_NR.exp(), call.old_logp_NR.exp()
    if settings.loss_mode == "dppo_tv":
        inside_NR = torch.where(A_NR > 0, p_NR - old_NR <= high, p_NR - old_NR >= -low)
    else:
        other_NR = ((1 - old_NR + 1e-8) / (1 - p_NR + 1e-8)).log()
        kl_NR = old_NR * (call.old_logp_NR - logp_NR) + (1 - old_NR) * other_NR
        rising_NR = (kl_NR <= high) | (p_NR <= old_NR)
        inside_NR = torch.where(A_NR > 0, rising_NR, (kl_NR <= low) | (p_NR >= old_NR))
    weight_NR = ratio_NR.detach().clamp(max=settings.clip_ratio_c)
    loss_NR = -A_NR * weight_NR * call.logp_NR * inside_NR
    truncated_NR = (ratio_NR > settings.clip_ratio_c) & inside_NR
    return loss_NR, _metrics(call, x_NR, ~inside_NR, truncated_NR)


def _gspo(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    x_NR, A_NR = call.logp_NR - call.old_logp_NR, call.advantage_NR
    mean_N1 = (x_NR * call.mask_NR).sum(1, keepdim=True) / call.mask_NR.sum(1, keepdim=True).clamp(
        min=1
    )
    log_ratio_NR = call.logp_NR - call.logp_NR.detach() + mean_N1.detach()
    ratio_NR = log_ratio_NR.clamp(max=SEQUENCE_EXPONENT).exp()
    plain_NR, clipped_NR = -A_NR * ratio_NR, -A_NR * _clipped(settings, ratio_NR)
    metrics = _metrics(call, x_NR, clipped_NR > plain_NR, torch.zeros_like(x_NR))
    return torch.maximum(plain_NR, clipped_NR), metrics


def _sapo(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    A_NR, (x_NR, ratio_NR) = call.advantage_NR, _ratio(call)
    tau_NR = A_NR.new_full(A_NR.shape, settings.tau_neg).masked_fill(A_NR > 0, settings.tau_pos)
    gate_NR = torch.sigmoid(tau_NR * (ratio_NR - 1)) * 4 / tau_NR
    nothing_NR = torch.zeros_like(x_NR)
    return -gate_NR * A_NR, _metrics(call, x_NR, nothing_NR, nothing_NR)


def _gpg(_: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    return -call.logp_NR * call.advantage_NR, {}


def _clip_cov(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    x_NR, A_NR, mask_NR = call.logp_NR - call.old_logp_NR, call.advantage_NR, call.mask_NR
    ratio_NR = x_NR.exp()
    plain_NR, clipped_NR = -A_NR * ratio_NR, -A_NR * _clipped(settings, ratio_NR)
    logp_NR = call.logp_NR.detach()
    cov_NR = (A_NR - masked_mean(A_NR, mask_NR)) * (logp_NR - masked_mean(logp_NR, mask_NR))
    between_NR = (cov_NR > settings.clip_cov_lb) & (cov_NR < settings.clip_cov_ub)
    candidate_NR = between_NR & mask_NR & ~(clipped_NR > plain_NR)
    candidates = int(candidate_NR.sum())
    dropped = min(candidates, max(int(settings.clip_cov_ratio * int(mask_NR.sum())), 1))
    # Of the candidates verl drops this many, drawn without replacement and without a recorded state of
    # the generator; each is kept with the same probability.
    probability_NR = candidate_NR.double() * (dropped / max(candidates, 1))
    loss_NR = torch.maximum(plain_NR, clipped_NR) * (1 - probability_NR)
    return loss_NR, {CLIPPED: masked_mean(probability_NR, mask_NR), KL: masked_mean(-x_NR, mask_NR)}


def _kl_cov(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    x_NR, A_NR, mask_NR = call.logp_NR - call.old_logp_NR, call.advantage_NR, call.mask_NR
    A_T, logp_T = A_NR[mask_NR], call.logp_NR.detach()[mask_NR]
    penalised_NR = torch.zeros_like(mask_NR)
    if len(A_T):
        cov_T = (A_T - A_T.mean()) * (logp_T - logp_T.mean())
        top = torch.topk(cov_T, max(1, int(len(cov_T) * settings.kl_cov_ratio))).indices
        at = mask_NR.flatten().nonzero()[:, 0][top]
        flat = torch.zeros(mask_NR.numel(), dtype=torch.bool).index_fill(0, at, True)
        penalised_NR = flat.reshape(mask_NR.shape)
    loss_NR = -A_NR * x_NR.exp() + penalised_NR * (settings.ppo_kl_coef * x_NR.abs())
    return loss_NR, {KL: masked_mean(x_NR.abs(), mask_NR)}


def _dro(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    x_NR, beta = call.logp_NR - call.old_logp_NR, settings.dro_beta
    assert beta is not None  # require_settings
    loss_NR = -(call.logp_NR * call.advantage_NR - beta / 2 * x_NR.square())
    return loss_NR, {KL: masked_mean(-x_NR, call.mask_NR)}


def _cispo(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    x_NR, ratio_NR = _ratio(call)
    weight_NR = _clipped(settings, ratio_NR).detach()
    beyond_NR = weight_NR != ratio_NR.detach()
    loss_NR = -weight_NR * call.advantage_NR * call.logp_NR
    return loss_NR, _metrics(call, x_NR, beyond_NR, torch.zeros_like(x_NR))


def _bypass(settings: VerlLoss, call: Call) -> tuple[Tensor, Metrics]:
    if settings.loss_type == "ppo_clip":
        return _vanilla(settings, call)
    return _gpg(settings, call)[0], {KL: masked_mean(call.old_logp_NR - call.logp_NR, call.mask_NR)}


def _ratio(call: Call) -> tuple[Tensor, Tensor]:
    """Log-ratio, bounded, and ratio of theta to the old policy."""
    x_NR = (call.logp_NR - call.old_logp_NR).clamp(-EXPONENT, EXPONENT)
    return x_NR, x_NR.exp()


def _clipped(settings: VerlLoss, ratio_NR: Tensor) -> Tensor:
    low, high = clip_range(settings)
    return ratio_NR.clamp(1 - low, 1 + high)


def _metrics(call: Call, x_NR: Tensor, clipped_NR: Tensor, below_NR: Tensor) -> Metrics:
    return {
        CLIPPED: masked_mean(clipped_NR, call.mask_NR),
        KL: masked_mean(-x_NR, call.mask_NR),
        CLIPPED_BELOW: masked_mean(below_NR, call.mask_NR),
    }


TOKEN_LOSSES: Mapping[str, Callable[[VerlLoss, Call], tuple[Tensor, Metrics]]] = {
    "vanilla": _vanilla,
    "dppo_tv": _dppo,
    "dppo_kl": _dppo,
    "gspo": _gspo,
    "sapo": _sapo,
    "gpg": _gpg,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "dro": _dro,
    "cispo": _cispo,
    "bypass_mode": _bypass,
}
