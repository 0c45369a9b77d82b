"""A loss of per-token quantities, and the coefficients c and d of the objective it makes of U.

A loss is a pure function of the log-probabilities l and next-token entropies h of U's tokens at theta.
Its gradient in theta is then that of -J, J = sum_ik c_ik l_ik + d_ik h_ik, with

    c_ik = -d loss / d l_ik,    d_ik = -d loss / d h_ik    at theta, held fixed.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad

from ..policy.layout import response_mask
from ..tree import f64
from ..types import Batch, InputError, ResponseMask, TokenStats, UpdateBatch
from .divisors import Coefficients, leave_one_out

LARGEST = 1e100


class LossInputs(NamedTuple):
    """What a loss may depend on besides l and h: the sequences of one optimizer step, [N] or [N, R].

    Log-probabilities are in nats, of the sampled tokens at the temperature of sampling, and 0 past the
    end of a response. A step is accumulated over micro-batches on one or several processes; `rows` of
    the same micro-batch and process were one call of the trainer's loss.
    """

    advantage_N: Float[Tensor, " N"]
    mask_NR: Bool[Tensor, "N R"]  # tokens in the loss; without those that the policy did not generate
    prompt_N: Int[Tensor, " N"]  # index of the prompt; equal indices form one group
    microbatch_N: Int[Tensor, " N"]  # which of the step's accumulated micro-batches, from 0
    process_N: Int[Tensor, " N"]  # which of the processes, from 0
    old_logp_NR: Float[Tensor, "N R"] | None = None  # at the policy of the ratio; None: theta itself
    ref_logp_NR: Float[Tensor, "N R"] | None = None  # at the reference policy; None: not known
    sampler_logp_NR: Float[Tensor, "N R"] | None = None  # of the program that sampled; None: theta's
    generated_tokens_N: Float[Tensor, " N"] | None = None  # in the loss, of the row's generation batch


class LossValue(NamedTuple):
    """A loss, to be minimised, and what its trainer logs beside it."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]] = {}


LossFunction: TypeAlias = Callable[[Float[Tensor, "N R"], Float[Tensor, "N R"], LossInputs], LossValue]
"""(l, h, inputs) -> value, by differentiable torch operations on l and h, float64."""

LossCheck: TypeAlias = Callable[
    [Float[Tensor, "N R"], Float[Tensor, "N R"], LossInputs, ResponseMask], None
]
"""(l, h, inputs, tokens of the responses): raises InputError where the function is no loss on them."""

Divisor: TypeAlias = Literal["tokens", "sequences"]


class Loss(NamedTuple):
    """A loss function, and what the sums over tokens in it are divided by.

    The gradient does not need the latter, the error over U does: "tokens" in the loss, or "sequences",
    with or without such tokens, for the part that depends on l and the one that depends on h. None: not
    known, and found by `divisors.leave_one_out`, one evaluation for each prompt.
    """

    function: LossFunction
    divisor: Divisor | None
    entropy_divisor: Divisor | None = "tokens"
    check: LossCheck | None = None  # on U, before the coefficients are taken


class LossReport(NamedTuple):
    """The value of the loss at theta, and what is logged beside it, as numbers."""

    loss: float
    metrics: dict[str, float]
    divisor_residual: float = 0.0  # `Divisors.residual`; 0 where the divisors are known


def loss_update(
    batch: Batch, stats: TokenStats, inputs: LossInputs, loss: Loss
) -> tuple[UpdateBatch, LossReport]:
    """U with the coefficients of J = -loss at theta, and the loss there. `stats` are those at theta.

    c_ik = -d loss / d l_ik and d_ik = -d loss / d h_ik, [N, R], by autograd in float64: where the loss
    is not differentiable, the subgradient is the one that torch takes, and so a trainer in torch.
    Raises InputError where `require_inputs` and the loss's own check do, and for a loss that is not
    finite, on U or, where its divisors are not known, on U without one of the prompts.
    """
    require_inputs(batch, inputs)
    logp_NR, entropy_NR = f64(stats.logp_NR), f64(stats.entropy_NR)
    if loss.check is not None:
        loss.check(logp_NR, entropy_NR, inputs, response_mask(batch))
    found, *gradients = loss_gradient(loss.function, logp_NR, entropy_NR, inputs)
    report = LossReport(float(found.loss), {name: float(x) for name, x in found.metrics.items()})
    if not _finite(found.loss, *gradients):
        raise InputError(
            f"the loss of U at theta is {report.loss:g}, or its gradient is not finite: check the "
            "log-probabilities and advantages that it is given"
        )
    if (largest := max(float(gradient_NR.abs().max()) for gradient_NR in gradients)) > LARGEST:
        raise InputError(
            f"the loss of U has a gradient of {largest:.3g}, at most {LARGEST:g} is expected, so that "
            "its square does not overflow: lower its coefficients"
        )
    coef_NR, entropy_coef_NR = (-gradient_NR for gradient_NR in gradients)
    counts = {"tokens": inputs.mask_NR.sum(1), "sequences": torch.ones(len(inputs.prompt_N))}
    if not bool(inputs.mask_NR.any()):  # every coefficient is 0
        counts["tokens"] = counts["sequences"]
    divisors = {None: None} | {name: f64(count_N) for name, count_N in counts.items()}
    normaliser_N, entropy_normaliser_N = divisors[loss.divisor], divisors[loss.entropy_divisor]
    if normaliser_N is None or entropy_normaliser_N is None:

        def without(kept_N: Tensor) -> Coefficients:
            return _without(loss.function, logp_NR, entropy_NR, inputs, kept_N)

        derived = leave_one_out((coef_NR, entropy_coef_NR), inputs.prompt_N, without)
        report = report._replace(divisor_residual=derived.residual)
        if normaliser_N is None:
            normaliser_N = derived.normaliser_N
        if entropy_normaliser_N is None:
            entropy_normaliser_N = derived.entropy_normaliser_N
    if not bool(entropy_coef_NR.any()):
        return UpdateBatch(batch, coef_NR, normaliser_N), report
    return UpdateBatch(batch, coef_NR, normaliser_N, entropy_coef_NR, entropy_normaliser_N), report


def loss_gradient(
    function: LossFunction, logp_NR: Tensor, entropy_NR: Tensor, inputs: LossInputs
) -> tuple[LossValue, Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """The value of the loss and its gradients in l and h, [N, R]."""

    def value(l_NR: Tensor, h_NR: Tensor) -> tuple[Tensor, LossValue]:
        found = function(l_NR, h_NR, inputs)
        return found.loss, found

    gradients, found = grad(value, argnums=(0, 1), has_aux=True)(logp_NR, entropy_NR)
    return found, *gradients


def require_inputs(batch: Batch, inputs: LossInputs) -> None:
    """InputError for arrays of other shapes than the batch's, or with values that are not finite.

    Sampler log-probabilities may be NaN, where a sampler does not know them.
    """
    real_NR = response_mask(batch)
    per_token = {"mask_NR", "old_logp_NR", "ref_logp_NR", "sampler_logp_NR"}
    for name, found in inputs._asdict().items():
        if not isinstance(found, Tensor):
            continue
        expected = real_NR.shape if name in per_token else real_NR.shape[:1]
        if found.shape != expected:
            raise InputError(
                f"{name} has shape {tuple(found.shape)}, expected {tuple(expected)}: one entry for "
                f"every {'response token' if name in per_token else 'sequence'} of U"
            )
        if name.startswith("sampler") or not found.is_floating_point():
            continue
        bad = ~found.isfinite() & real_NR if name in per_token else ~found.isfinite()
        if bool(bad.any()):
            where = [int(i) for i in bad.nonzero()[0]]
            raise InputError(f"{name} is {float(found[tuple(where)])} at {where}, expected finite")
    if bool((inputs.mask_NR & ~real_NR).any()):
        raise InputError("mask_NR has tokens past the end of a response: they are in no loss")


def _without(
    function: LossFunction, logp_NR: Tensor, entropy_NR: Tensor, inputs: LossInputs, kept_N: Tensor
) -> Coefficients:
    """c and d of the loss of the sequences in `kept_N`, as if the others had not been drawn.

    Micro-batches and processes that are left with none are not counted, and the tokens of a generation
    are fewer in proportion to its tokens in the loss. Rows of equal numbers count as one generation.
    """
    rows = {name: x[kept_N] for name, x in inputs._asdict().items() if isinstance(x, Tensor)}
    for name in ("microbatch_N", "process_N"):
        rows[name] = rows[name].unique(return_inverse=True)[1]
    if inputs.generated_tokens_N is not None:
        generated_G, generation_N = inputs.generated_tokens_N.unique(return_inverse=True)
        tokens_N, none_G = f64(inputs.mask_NR.sum(1)), 0 * f64(generated_G)
        all_G = none_G.index_add(0, generation_N, tokens_N)
        left_G = none_G.index_add(0, generation_N, tokens_N * kept_N)
        # At least 1, where there is nothing to divide.
        fewer_G = (generated_G * left_G / all_G.clamp(min=1)).clamp(min=1)
        rows["generated_tokens_N"] = fewer_G[generation_N[kept_N]]
    kept = inputs._replace(**rows)
    missing = f"on U without the responses to prompt {int(inputs.prompt_N[~kept_N][0])}"
    try:
        found, *gradients = loss_gradient(function, logp_NR[kept_N], entropy_NR[kept_N], kept)
    except InputError as error:
        raise InputError(f"{error} ({missing}, for the error over U)") from error
    if not _finite(found.loss, *gradients):
        raise InputError(
            f"the loss is {float(found.loss):g}, or its gradient is not finite, {missing}, which the "
            "error over U needs: let it be finite for any number of sequences"
        )
    c_NR, d_NR = (-gradient_NR for gradient_NR in gradients)
    return c_NR, d_NR


def _finite(*values: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in values)
