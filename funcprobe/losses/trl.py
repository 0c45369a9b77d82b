"""TRL's losses: those of its GRPOTrainer, over all micro-batches and processes of an optimizer step."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tree import f64
from ..types import InputError
from .loss import Loss, LossInputs, LossValue
from .trl_metrics import logged_means
from .trl_terms import (
    Correction,
    Level,
    clipped,
    divergence,
    gamma_weight,
    gated,
    high_entropy,
    importance_ratio,
    on_policy,
    sampler_correction,
    tokens_of_rows,
    truncated,
)

LossType: TypeAlias = Literal[
    "grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"
]  # fmt: skip
WHOLE_STEP = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole step


class TrlLoss(NamedTuple):
    """The settings of TRL's GRPOConfig that its loss depends on, with the defaults of TRL 1.16.

    `entropy_coef` is the coefficient in effect at the step: with `use_adaptive_entropy` it varies. Tool
    output and truncated completions that are not in the loss are out of the mask.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon
    delta: float | None = None  # None: no upper bound of the ratio where A < 0
    beta: float = 0.0  # of the KL to the reference policy, per nat
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0  # per nat
    use_adaptive_entropy: bool = False
    top_entropy_quantile: float = 1.0  # share of the tokens in the loss, those of highest entropy
    off_policy_mask_threshold: float | None = None  # nats per token
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True  # with use_vllm alone
    vllm_importance_sampling_mode: Correction = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    max_completion_length: int | None = 512  # tokens; the divisor of dr_grpo
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None  # micro-batches; None: gradient_accumulation_steps

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is weighted by pi_old / pi_sampler."""
        return self.use_vllm and self.vllm_importance_sampling_correction


def trl_loss(settings: TrlLoss) -> Loss:
    """The loss that TRL 1.16 minimises in an optimizer step: sum_ik m_ik L_ik / z_i - entropy_coef H.

        L_ik = e_ik w_ik (policy term) + beta KL_ik,    H = sum over b of (mean of h in b) / (P K)

    with P processes, K micro-batches, b the P K calls of the trainer's loss, m the mask, e that of
    `top_entropy_quantile` and `off_policy_mask_threshold`, w the correction for the sampler; KL_ik is
    times r_ik with `use_bias_correction_kl`. The terms are in `trl_terms`. Of sequence i in call b,
    with n_b sequences and T_b tokens in the loss,

        z_i = P K n_b T_i             grpo, sapo
        z_i = P K n_b                 luspo
        z_i = P K n_b L               dr_grpo, L = max_completion_length
        z_i = P K T_b                 bnpo
        z_i = K T / S                 dapo, cispo, vespo: T tokens in a generation of S micro-batches

    T is that of the sequence, `inputs.generated_tokens_N`, as a step may be of several generations;
    without it, the tokens of the step, which requires S = K. Sequences without a token in the loss
    count in n_b. K is the number of micro-batches in `inputs`, fewer than
    `gradient_accumulation_steps` in an epoch's last step. Metrics are those that TRL logs of the step
    with logging_steps=1: means over processes, then over micro-batches. TRL's `sampling/...` are of the
    generation, and `entropy_coef` is a setting: neither is among them.
    Raises InputError for settings that TRL rejects or that do not fit together; the loss does for a
    missing array and for micro-batches that do not fit.
    """
    _require_settings(settings)

    def function(l_NR: Tensor, h_NR: Tensor, inputs: LossInputs) -> LossValue:
        return _value(settings, l_NR, h_NR, inputs)

    tokens = settings.loss_type in (*WHOLE_STEP, "bnpo")
    return Loss(function, "tokens" if tokens else "sequences")


def _value(s: TrlLoss, l_NR: Tensor, h_NR: Tensor, inputs: LossInputs) -> LossValue:
    _require_arrays(s, inputs)
    calls = _calls(s, inputs)
    mask_NR, m_NR, A_N1 = inputs.mask_NR, f64(inputs.mask_NR), f64(inputs.advantage_N)[:, None]
    old_NR = l_NR.detach() if inputs.old_logp_NR is None else f64(inputs.old_logp_NR)
    sampler_NR = old_NR
    if inputs.sampler_logp_NR is not None:
        sampler_NR = f64(inputs.sampler_logp_NR)
    acting_NR = mask_NR
    if s.top_entropy_quantile < 1:
        acting_NR = high_entropy(h_NR, mask_NR, inputs.microbatch_N, s.top_entropy_quantile)

    # 0 outside the mask, where a value that overflowed would make the product with the mask NaN.
    log_ratio_NR = torch.where(mask_NR, l_NR - old_NR, 0.0)
    r = importance_ratio(log_ratio_NR, m_NR, s.importance_sampling_level)
    w = _correction(s, old_NR, sampler_NR, m_NR)
    terms, logged = _policy_terms(s, l_NR, log_ratio_NR, r, w, A_N1, m_NR)
    if s.off_policy_mask_threshold is not None:
        terms = terms * on_policy(l_NR, sampler_NR, A_N1, m_NR, s.off_policy_mask_threshold)
    terms = terms * acting_NR
    if w is not None and s.loss_type != "vespo":  # whose weight it is already part of
        terms = terms * w
    if s.beta != 0:
        assert inputs.ref_logp_NR is not None
        kl_NR = divergence(torch.where(mask_NR, f64(inputs.ref_logp_NR) - l_NR, 0.0))
        kl_NR = kl_NR * r if s.use_bias_correction_kl else kl_NR
        terms = terms + s.beta * kl_NR
        logged = logged | {"kl": kl_NR}
    policy = (terms * m_NR / _divisor_N1(s, inputs, calls, m_NR)).sum()

    metrics = logged_means({"entropy": h_NR, **logged}, m_NR, inputs.microbatch_N)
    loss = policy
    if s.entropy_coef != 0 or s.use_adaptive_entropy:
        tokens_N = _over_call(acting_NR.sum(1), calls).clamp(min=1)
        bonus = (h_NR * acting_NR / (calls.number * tokens_N)[:, None]).sum()
        loss = policy - s.entropy_coef * bonus
        # TRL has divided it by the micro-batches where the divisor is that of the whole step.
        metrics["policy_loss"] = policy / calls.microbatches if s.loss_type in WHOLE_STEP else policy
    metrics["loss"] = loss
    return LossValue(loss, {name: x.detach() for name, x in metrics.items()})


def _correction(s: TrlLoss, old_NR: Tensor, sampler_NR: Tensor, m_NR: Tensor) -> Tensor | None:
    if not s.corrects_sampler:
        return None
    low, high = s.vllm_importance_sampling_clip_min, s.vllm_importance_sampling_clip_max
    return sampler_correction(old_NR, sampler_NR, m_NR, s.vllm_importance_sampling_mode, low, high)


def _policy_terms(
    s: TrlLoss,
    l_NR: Tensor,
    log_ratio_NR: Tensor,
    r: Tensor,
    w: Tensor | None,
    A_N1: Tensor,
    m_NR: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy term of every token (or sequence), and what is averaged for the log."""
    high = s.epsilon if s.epsilon_high is None else s.epsilon_high
    if s.loss_type == "cispo":
        return truncated(r, l_NR, A_N1, high), {"cispo_clip_ratio": (r > high) & (A_N1 > 0)}
    if s.loss_type == "sapo":
        return gated(r, A_N1, s.sapo_temperature_pos, s.sapo_temperature_neg), {}
    if s.loss_type == "vespo":
        positive, negative = (s.vespo_k_pos, s.vespo_lambda_pos), (s.vespo_k_neg, s.vespo_lambda_neg)
        phi_N1 = gamma_weight(log_ratio_NR, w, A_N1, m_NR, positive, negative)
        return -phi_N1 * A_N1 * l_NR, {"vespo/phi_seq_mean": phi_N1}
    bounded = r if s.delta is None else r.clamp(max=s.delta)
    # TRL counts with the ratio that delta has bounded.
    is_low, is_high = (bounded < 1 - s.epsilon) & (A_N1 < 0), (bounded > 1 + high) & (A_N1 > 0)
    logged = {
        "clip_ratio/low_mean": is_low,
        "clip_ratio/high_mean": is_high,
        "clip_ratio/region_mean": is_low | is_high,
    }
    return clipped(r, bounded, A_N1, 1 - s.epsilon, 1 + high), logged


class _Calls(NamedTuple):
    """The calls of the trainer's loss that make up a step: one per micro-batch and process."""

    call_N: Int[Tensor, " N"]
    microbatches: int
    number: int


def _calls(s: TrlLoss, inputs: LossInputs) -> _Calls:
    microbatches, processes = (int(x_N.max()) + 1 for x_N in (inputs.microbatch_N, inputs.process_N))
    call_N = inputs.microbatch_N * processes + inputs.process_N
    number = microbatches * processes
    if not torch.equal(call_N.unique(), torch.arange(number)):
        raise InputError(
            f"sequences are of {len(call_N.unique())} pairs of micro-batch and process, expected all "
            f"of micro-batches 0 to {microbatches - 1} and processes 0 to {processes - 1}: give all "
            "sequences of the step"
        )
    if microbatches > s.gradient_accumulation_steps:
        raise InputError(
            f"sequences are of {microbatches} micro-batches, and gradient_accumulation_steps is "
            f"{s.gradient_accumulation_steps}: set it to that of the training"
        )
    return _Calls(call_N, microbatches, number)


def _over_call(x_N: Tensor, calls: _Calls) -> Float[Tensor, " N"]:
    """Of every sequence, the sum of x over the sequences of its call."""
    return torch.zeros(calls.number).double().index_add(0, calls.call_N, f64(x_N))[calls.call_N]


def _divisor_N1(s: TrlLoss, inputs: LossInputs, calls: _Calls, m_NR: Tensor) -> Float[Tensor, "N 1"]:
    rows_N = _over_call(torch.ones(len(m_NR)), calls)
    if s.loss_type in {"grpo", "sapo"}:
        return (calls.number * rows_N)[:, None] * tokens_of_rows(m_NR)
    if s.loss_type == "luspo":
        return (calls.number * rows_N)[:, None]
    if s.loss_type == "dr_grpo":
        assert s.max_completion_length is not None
        return (calls.number * rows_N * s.max_completion_length)[:, None]
    if s.loss_type == "bnpo":
        return (calls.number * _over_call(m_NR.sum(1), calls).clamp(min=1))[:, None]
    steps = s.steps_per_generation or s.gradient_accumulation_steps
    tokens_N = inputs.generated_tokens_N
    if tokens_N is None:
        if steps != calls.microbatches:
            raise InputError(
                f"{s.loss_type} divides by the tokens of a generation, of {steps} micro-batches, and "
                f"the step has {calls.microbatches}: give generated_tokens, TRL's num_items_in_batch"
            )
        tokens_N = m_NR.sum().expand(len(m_NR))
    return (f64(tokens_N).clamp(min=1) * calls.microbatches / steps)[:, None]


def _require_settings(s: TrlLoss) -> None:
    for name, found, known in (
        ("loss_type", s.loss_type, LossType),
        ("importance_sampling_level", s.importance_sampling_level, Level),
        ("vllm_importance_sampling_mode", s.vllm_importance_sampling_mode, Correction),
    ):
        if found not in get_args(known):
            raise InputError(f"{name} is {found!r}, expected one of {', '.join(get_args(known))}")
    for name, number in (
        ("sapo_temperature_pos", s.sapo_temperature_pos),
        ("sapo_temperature_neg", s.sapo_temperature_neg),
        ("gradient_accumulation_steps", s.gradient_accumulation_steps),
        ("steps_per_generation", s.steps_per_generation),
        ("max_completion_length", s.max_completion_length),
    ):
        if number is not None and not number > 0:
            raise InputError(f"{name} is {number}, expected a positive number")
    if not (s.epsilon >= 0 and (s.epsilon_high is None or s.epsilon_high >= 0)):
        raise InputError(f"epsilon is {s.epsilon}, epsilon_high {s.epsilon_high}: expected at least 0")
    if s.loss_type == "dr_grpo" and s.max_completion_length is None:
        raise InputError("max_completion_length is None, and dr_grpo divides by it: set it, in tokens")
    if not 0 <= s.top_entropy_quantile <= 1:
        raise InputError(f"top_entropy_quantile is {s.top_entropy_quantile}, expected 0 to 1")
    _require_correction(s)


def _require_correction(s: TrlLoss) -> None:
    low, high = s.vllm_importance_sampling_clip_min, s.vllm_importance_sampling_clip_max
    mode, both = s.vllm_importance_sampling_mode, "vllm_importance_sampling_clip_min and _max"
    if low is not None and high is not None and low >= high:
        raise InputError(f"{both} are {low} and {high}, expected the first to be less than the second")
    if not s.vllm_importance_sampling_correction:
        return
    if mode.endswith("truncate") and low is None is high:
        raise InputError(f"{both} are None, and {mode} clips to them: set at least one")
    if s.loss_type != "vespo" or not s.use_vllm:
        return
    if mode.startswith("sequence"):
        raise InputError(f"vespo with {mode}, expected token_truncate or token_mask: a ratio per token")
    if (low is not None and low > 1) or (high is not None and high < 1):
        raise InputError(
            f"{both} are {low} and {high}, and vespo needs 1 between them: the padding, of ratio 1, "
            "would enter TRL's weights otherwise"
        )


def _require_arrays(s: TrlLoss, inputs: LossInputs) -> None:
    if s.beta != 0 and inputs.ref_logp_NR is None:
        raise InputError(f"beta is {s.beta:g}, and there is no ref_logp: record it, or set beta = 0")
    masks = s.use_vllm and s.off_policy_mask_threshold is not None
    if inputs.sampler_logp_NR is None and (s.corrects_sampler or masks):
        needs = (
            "vllm_importance_sampling_correction" if s.corrects_sampler else "off_policy_mask_threshold"
        )
        raise InputError(
            f"{needs} needs the sampler's log-probabilities, and there is no sampler_logp: record it, "
            "or set use_vllm = false if vLLM did not generate"
        )
