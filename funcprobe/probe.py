"""The composed probe: predict the entropy change of the next step, measure it, bind a model."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import tree
from .along import (
    EvalPasses,
    Passes,
    error_over_u,
    eval_passes,
    require_normaliser,
    require_step,
    summarise_along,
    update_gradients,
    update_parts,
)
from .passes import gradients, logprobs
from .passes.grad_dots import grad_dots
from .passes.second_tangents import second_tangents
from .passes.tangents import alpha_vjp, require_derivatives, tangents
from .policy.forward import Forward, frozen_forward, trainable_params
from .policy.layout import MAX_TOKENS
from .prediction import Prediction
from .statistics import evaluation
from .statistics.estimators import Measured
from .step import masked
from .types import AdamState, Batch, Entropy, Params, Step, TokenStats, UpdateBatch


def first_order_passes(
    params: Params,
    eval_batch: Batch,
    update: UpdateBatch,
    adam_state: AdamState,
    forward: Forward,
    *,
    entropy: Entropy = Entropy(),
    step: Step = Step(),
    max_tokens: int = MAX_TOKENS,
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    update_forward: Forward | None = None,
    Y: Sequence[Params] | None = None,
    masks: Sequence[Forward] = (),
    block_N: Int[Tensor, " N"] | None = None,
) -> Passes:
    """Four passes: Y on U, statistics with tangents along v on E, X on E, tangents along P X on U; and
    where Y is clipped a fifth, tangents along Y on U.

    `update_forward` (default `forward`) is used for the passes over U, so that a caller can count them;
    with `Y`, from `update_gradients`, the first pass is omitted. If Y is of several dropout masks, v is
    the mean of their steps; the tangents along P X are without masks. If every coefficient is 0, so is
    Y, without a pass over U. With `block_N`, the index of a block of every sequence of E, X is summed
    over blocks, for errors of its products with the parts of v (`statistics.blocks.random_blocks`).
    Raises InputError as `update_gradients`, and if no step is left then.
    """
    over_U = forward if update_forward is None else update_forward
    if Y is None:
        Y = update_gradients(params, update, over_U, max_tokens, masks)
    direction = masked.mean_direction(params, Y, adam_state, step)
    if not update.moves:
        require_step(direction, step)
    parts = () if block_N is None else masked.parts(params, Y, adam_state, step)
    stats, tangent, X, baseline_NR, blocks = eval_passes(
        params,
        eval_batch,
        direction.total,
        forward,
        entropy=entropy,
        max_tokens=max_tokens,
        sampler_logp_NR=sampler_logp_NR,
        parts=parts,
        block_N=block_N,
    )
    update_stats, along_PX, along_Y = (
        TokenStats(*(torch.zeros_like(update.coef_NR) for _ in TokenStats._fields)) for _ in range(3)
    )
    if update.moves:
        PX = tree.multiply(direction.scale, X)
        update_stats, along_PX = tangents(params, update.batch, PX, over_U, max_tokens)
    if update.moves and direction.clip_coefficient < 1:
        _, along_Y = tangents(params, update.batch, tree.mean(Y), over_U, max_tokens)
    return Passes(tuple(Y), stats, tangent, X, baseline_NR, update_stats, along_PX, along_Y, blocks)


def summarise(
    params: Params,
    passes: Passes,
    eval_batch: Batch,
    update: UpdateBatch,
    adam_state: AdamState,
    *,
    entropy: Entropy = Entropy(),
    step: Step = Step(),
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    unit_N: Int[Tensor, " N"] | None = None,
) -> Prediction:
    """The prediction from the results of the passes, by arithmetic alone; no model needed.

    `unit_N` is the index of the sampling unit of every sequence of E, by default its prompt. If E's
    prompts were drawn with replacement, one response each, the draws are independent: pass
    torch.arange(N). Raises InputError for fewer than two sampling units in E, or prompts in U, and for
    an update without normaliser.
    """
    require_normaliser(update)
    Y_masks, stats, tangent, X, baseline_NR, update_stats, along_PX, along_Y, _ = passes
    Y = tree.mean(Y_masks)
    direction = masked.mean_direction(params, Y_masks, adam_state, step)
    along = summarise_along(
        EvalPasses(stats, tangent, X, baseline_NR),
        Y,
        direction,
        eval_batch,
        entropy=entropy,
        sampler_logp_NR=sampler_logp_NR,
        unit_N=unit_N,
    )
    masks = None
    if len(Y_masks) > 1:
        masks = masked.over_masks(X, params, Y_masks, adam_state, step)
        along = along._replace(from_update=fmean(masks.from_update))
    each = masks.from_update if masks else (along.from_update,)
    over_u = error_over_u(update, along_PX, along_Y, masked.clip_response(each, Y_masks, step))
    return Prediction(
        **along._asdict(),
        bars_dot_identity=tree.dot(X, Y),
        over_u=over_u,
        se_total=math.hypot(along.first_order.se, over_u.se, masks.se if masks else 0.0),
        t_N=torch.stack([part.t_N for part in update_parts(update, along_PX)]).sum(0),
        Y=Y,
        direction=direction,
        update_stats=update_stats,
        masks=masks,
    )


def predict(
    params: Params,
    eval_batch: Batch,
    update: UpdateBatch,
    adam_state: AdamState,
    forward: Forward,
    *,
    entropy: Entropy = Entropy(),
    step: Step = Step(),
    max_tokens: int = MAX_TOKENS,
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    unit_N: Int[Tensor, " N"] | None = None,
    masks: Sequence[Forward] = (),
) -> Prediction:
    """d/d eta of the entropy estimator at theta + eta v, eta = 0: the predicted change per unit of eta.

    The derivative of the same estimator that `measure` evaluates, in nats per token or per sequence and
    per unit of eta, with standard errors and its parts. Raises InputError and ValueError where
    `first_order_passes`, `update_direction` and `summarise` do.
    """
    require_normaliser(update)  # before the passes, which take long
    choices: dict[str, Any] = {"entropy": entropy, "step": step, "sampler_logp_NR": sampler_logp_NR}
    passes = first_order_passes(
        params, eval_batch, update, adam_state, forward, max_tokens=max_tokens, masks=masks, **choices
    )
    return summarise(params, passes, eval_batch, update, adam_state, unit_N=unit_N, **choices)


def measure(
    params: Params,
    eval_batch: Batch,
    direction: Params,
    eta: float,
    stats: TokenStats,
    forward: Forward,
    *,
    entropy: Entropy = Entropy(),
    max_tokens: int = MAX_TOKENS,
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
) -> Measured:
    """H(theta + eta v) - H(theta) by self-normalised importance sampling: one forward at theta + eta v.

    In nats per token or per sequence. `stats` are E's at theta, from the same `forward`. The model is
    not changed: theta + eta v is a second dict of adapter size. Raises ValueError if `direction` has
    other names or shapes than `params`.
    """
    moved = logprobs.token_stats(tree.axpy(eta, direction, params), eval_batch, forward, max_tokens)
    return evaluation.change(evaluation.evaluate(eval_batch, stats, entropy, sampler_logp_NR), moved)


class Probe(NamedTuple):
    """The core's functions bound to a model; see the functions of the same names."""

    params: Params
    forward: Forward
    token_stats: Callable[[Params, Batch], TokenStats]
    seq_logprobs: Callable[[Params, Batch], Float[Tensor, " N"]]
    weighted_grad: Callable[[Params, Batch, Tensor, Tensor], Params]
    grad_X: Callable[[Params, Batch], Params]
    grad_Y: Callable[[Params, UpdateBatch], Params]
    tangents: Callable[[Params, Batch, Params], tuple[TokenStats, TokenStats]]
    second_tangents: Callable[[Params, Batch, Params], tuple[TokenStats, TokenStats, TokenStats]]
    alpha_vjp: Callable[..., Float[Tensor, " N"]]
    grad_dots: Callable[..., tuple[Float[Tensor, " N"], Params]]
    predict: Callable[..., Prediction]
    measure: Callable[..., Measured]


def bind(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    entropy: Entropy = Entropy(),
    max_tokens: int = MAX_TOKENS,
    share_prompts: bool = True,
) -> Probe:
    """Extract the registry of a model (in eval mode, adapter active) and bind the core's functions.

    `max_tokens` bounds the tokens of a microbatch. With `share_prompts`, a prompt of several sequences
    is computed once, if that saves work and the model can process such rows. The model is never
    changed; the registry shares its storage. Raises InputError where the model's outputs would silently
    differ from the policy's (see `frozen_forward`), or torch.func cannot differentiate it.
    """
    params = trainable_params(model)
    forward = frozen_forward(model, params, temperature, "shared" if share_prompts else "packed")
    require_derivatives(params, forward)
    fixed: dict[str, Any] = {"forward": forward, "max_tokens": max_tokens}
    return Probe(
        params=params,
        forward=forward,
        token_stats=partial(logprobs.token_stats, **fixed),
        seq_logprobs=partial(logprobs.seq_logprobs, **fixed),
        weighted_grad=partial(gradients.weighted_grad, **fixed),
        grad_X=partial(gradients.grad_X, entropy=entropy, **fixed),
        grad_Y=partial(gradients.grad_Y, **fixed),
        tangents=partial(tangents, **fixed),
        second_tangents=partial(second_tangents, **fixed),
        alpha_vjp=partial(alpha_vjp, **fixed),
        grad_dots=partial(grad_dots, **fixed),
        predict=partial(predict, entropy=entropy, **fixed),
        measure=partial(measure, entropy=entropy, **fixed),
    )
