"""The composed probe: predict the entropy change of the next step, measure it, bind a model."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from . import tree
from .along import EvalPasses, eval_passes, require_gradients, summarise_along
from .passes import gradients, logprobs
from .passes.grad_dots import grad_dots
from .passes.second_tangents import second_tangents
from .passes.tangents import alpha_vjp, require_derivatives, tangents
from .policy.forward import Forward, frozen_forward, trainable_params
from .policy.layout import MAX_TOKENS
from .statistics import estimators, evaluation
from .statistics.estimators import FirstOrder, Measured
from .statistics.evaluation import Evaluation
from .step import adam
from .step.adam import UpdateDirection
from .types import AdamState, Batch, Entropy, Params, Step, TokenStats, UpdateBatch


class Prediction(NamedTuple):
    """First-order entropy change per unit of learning rate, with everything it was made of.

    Errors: `first_order.se` given U, over E's sampling units; `se_over_u` over U's prompts at fixed P;
    `se_total` the root of the sum of their squares. Units: the entropy estimator's, per unit of eta.
    """

    derivative: float  # d/d eta of the entropy along v, by tangents
    bars_dot: float  # the same number as <X, v>, by the gradient
    bars_dot_identity: float  # <X, Y>: what the step would do without Adam
    from_momentum: float  # <X, v_momentum>
    from_decay: float  # <X, v_decay>
    from_update: float  # <X, P Y>
    entropy: float  # H(theta) on E
    se_over_u: float
    se_total: float
    first_order: FirstOrder  # with the error given U
    t_N: Float[Tensor, " N"]  # <P X, Y_n> for every sequence of U
    X: Params
    Y: Params
    direction: UpdateDirection
    at: Evaluation  # E at theta, its baseline fitted
    tangent: TokenStats  # of E along v

    @property
    def stats(self) -> TokenStats:
        """Of E at theta."""
        return self.at.stats


class Passes(NamedTuple):
    """What the model is needed for, as tensors alone: everything else follows by arithmetic."""

    Y: Params  # grad of J on U
    stats: TokenStats  # of E at theta
    tangent: TokenStats  # of E along v
    X: Params  # grad of the entropy estimator on E
    baseline_NR: Float[Tensor, "N R"] | None  # of E at theta; None: no baseline
    along_PX: TokenStats  # tangents of U along P X


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
) -> Passes:
    """Four passes: Y on U, statistics with tangents along v on E, X on E, tangents along P X on U.

    `update_forward`, by default `forward`, makes the passes over U, so that a caller can count them.
    Raises InputError where a gradient is zero everywhere or not finite.
    """
    over_U = forward if update_forward is None else update_forward
    Y = gradients.grad_Y(params, update, over_U, max_tokens)
    require_gradients("Y (of the objective on U)", Y)
    direction = adam.update_direction(params, Y, adam_state, **step._asdict())
    stats, tangent, X, baseline_NR = eval_passes(
        params,
        eval_batch,
        direction.total,
        forward,
        entropy=entropy,
        max_tokens=max_tokens,
        sampler_logp_NR=sampler_logp_NR,
    )
    PX = tree.multiply(direction.scale, X)
    _, along_PX = tangents(params, update.batch, PX, over_U, max_tokens)
    return Passes(Y, stats, tangent, X, baseline_NR, along_PX)


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
    """The prediction from the passes, by arithmetic alone; no model needed.

    `unit_N` numbers the sampling units of E, by default its prompts. Where E was drawn with
    replacement, one response a draw, the draws are independent: give torch.arange(N).
    """
    Y, stats, tangent, X, baseline_NR, along_PX = passes
    direction = adam.update_direction(params, Y, adam_state, **step._asdict())
    along = summarise_along(
        EvalPasses(stats, tangent, X, baseline_NR),
        Y,
        direction,
        eval_batch,
        entropy=entropy,
        sampler_logp_NR=sampler_logp_NR,
        unit_N=unit_N,
    )
    t_N = (update.coef_NR * along_PX.logp_NR).sum(1)
    se_over_u = estimators.sum_se(t_N, update.batch.prompt_N)
    return Prediction(
        **along._asdict(),
        bars_dot_identity=tree.dot(X, Y),
        se_over_u=se_over_u,
        se_total=math.hypot(along.first_order.se, se_over_u),
        t_N=t_N,
        Y=Y,
        direction=direction,
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
) -> Prediction:
    """delta_H1 / eta: the derivative along v of the estimator that measures.

    Pure: E, U and Adam's state in; delta_H1, bars_dot, X, Y and their errors out. Raises what
    `first_order_passes` and `update_direction` raise.
    """
    choices: dict[str, Any] = {"entropy": entropy, "step": step, "sampler_logp_NR": sampler_logp_NR}
    passes = first_order_passes(
        params, eval_batch, update, adam_state, forward, max_tokens=max_tokens, **choices
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
    """H(theta + eta v) - H(theta) by importance sampling: one forward at moved parameters.

    `stats` are E's at theta, from the same `forward`. The model is not touched: the moved parameters
    are a second dict of adapter size.
    """
    moved = logprobs.token_stats(tree.axpy(eta, direction, params), eval_batch, forward, max_tokens)
    return evaluation.change(evaluation.evaluate(eval_batch, stats, entropy, sampler_logp_NR), moved)


class Probe(NamedTuple):
    """The core's functions with the model applied; see the functions of the same names."""

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
    """Pull the registry out of a model (in eval mode, adapter active) and apply it to the core.

    `max_tokens` bounds the tokens of a microbatch. With `share_prompts` a prompt that several
    sequences have is computed once, where that saves work and the model can read such rows. The model
    is read, never changed; the registry shares its storage. Raises InputError where the model's numbers
    would silently not be the policy's (see `policy.frozen_forward`).
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
