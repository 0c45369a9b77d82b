"""First-order change along a given direction, from E alone; gradients and errors of U for `probe`."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from . import tree
from .passes import gradients
from .passes.block_gradients import Blocks, block_gradients
from .passes.tangents import tangents
from .policy.forward import Forward, lora_params
from .policy.layout import MAX_TOKENS
from .statistics import evaluation
from .statistics.estimators import FirstOrder
from .statistics.evaluation import Evaluation
from .statistics.intervals import Error, UpdatePart, delta_error, update_error
from .step.adam import UpdateDirection
from .tree import f64
from .types import Batch, Entropy, InputError, Params, Step, TokenStats, UpdateBatch


class Along(NamedTuple):
    """First-order entropy change along a given direction, per unit of learning rate.

    The batch that determined the direction is unknown, so that the only error is `first_order.se`, over
    E's sampling units. `derivative` is from tangents, `bars_dot` = <X, v> from the gradient;
    `from_momentum`, `from_decay` and `from_update` are the parts of the latter.
    """

    derivative: float
    bars_dot: float
    from_momentum: float
    from_decay: float
    from_update: float
    entropy: float  # H(theta) on E
    first_order: FirstOrder
    given_u: Error  # of the derivative over E's sampling units
    X: Params
    at: Evaluation  # E at theta, its baseline fitted
    tangent: TokenStats  # of E along v

    @property
    def stats(self) -> TokenStats:
        """Token statistics of E at theta."""
        return self.at.stats


class EvalPasses(NamedTuple):
    """Results of the passes over E for one direction, tensors only."""

    stats: TokenStats  # at theta
    tangent: TokenStats  # along the direction
    X: Params  # grad of the entropy estimator
    baseline_NR: Float[Tensor, "N R"] | None  # of E at theta; None: no baseline
    blocks: Blocks | None = None  # of X; None: not asked for


class Passes(NamedTuple):
    """Results of all passes through the model, tensors only; the rest follows by arithmetic."""

    Y: tuple[Params, ...]  # grad of J on U: one, or with masks that of each
    stats: TokenStats  # of E at theta
    tangent: TokenStats  # of E along v
    X: Params  # grad of the entropy estimator on E
    baseline_NR: Float[Tensor, "N R"] | None  # of E at theta; None: no baseline
    update_stats: TokenStats  # of U at theta
    along_PX: TokenStats  # tangents of U along P X
    along_Y: TokenStats  # of U along Y, where the step clips it; else 0
    blocks: Blocks | None = None  # of X, along the parts of v (`masked.StepParts`); None: not asked for


def eval_passes(
    params: Params,
    eval_batch: Batch,
    direction: Params,
    forward: Forward,
    *,
    entropy: Entropy = Entropy(),
    max_tokens: int = MAX_TOKENS,
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    parts: Sequence[Params] = (),
    block_N: Int[Tensor, " N"] | None = None,
) -> EvalPasses:
    """Two passes over E: statistics with tangents, X. InputError if X is zero or not finite.

    With `block_N`, X is the sum of the gradients of these blocks of E's sequences, whose products with
    `parts` by tensor are kept, at no further pass.
    """
    # The values that come with tangents are bit-identical to token_stats': ratios at eta = 0 are 1.
    stats, tangent = tangents(params, eval_batch, direction, forward, max_tokens)
    at = evaluation.evaluate(eval_batch, stats, entropy, sampler_logp_NR)
    p_NR, q_NR = evaluation.gradient_coefficients(at)
    coefficients, blocks = (p_NR, q_NR), None
    if block_N is None:
        X = gradients.weighted_grad(params, eval_batch, *coefficients, forward, max_tokens)
    else:
        given = (eval_batch, *coefficients, block_N, parts)
        X, blocks = block_gradients(params, *given, forward, max_tokens)
    require_gradients("X (of the entropy on E)", X)
    return EvalPasses(stats, tangent, X, at.baseline_NR, blocks)


def summarise_along(
    passes: EvalPasses,
    Y: Params,
    direction: UpdateDirection,
    eval_batch: Batch,
    *,
    entropy: Entropy = Entropy(),
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    unit_N: Int[Tensor, " N"] | None = None,
) -> Along:
    """The derivative along a direction computed from Y, and its parts; no model needed.

    `unit_N` as in `summarise`.
    """
    stats, tangent, X, baseline_NR, _ = passes
    at = evaluation.evaluate(eval_batch, stats, entropy, sampler_logp_NR, baseline_NR)
    unit_N = eval_batch.prompt_N if unit_N is None else unit_N
    first = evaluation.derivative(at, tangent, unit_N)
    return Along(
        derivative=first.derivative,
        bars_dot=tree.dot(X, direction.total),
        from_momentum=tree.dot(X, direction.momentum),
        from_decay=tree.dot(X, direction.decay),
        from_update=tree.dot(tree.multiply(direction.scale, X), Y),
        entropy=evaluation.value(at),
        first_order=first,
        given_u=delta_error(first.influence_N, unit_N),
        X=X,
        at=at,
        tangent=tangent,
    )


def update_gradients(
    params: Params,
    update: UpdateBatch,
    forward: Forward,
    max_tokens: int = MAX_TOKENS,
    masks: Sequence[Forward] = (),
) -> tuple[Params, ...]:
    """Y = grad J on U, or one for each of `masks` (from `masked_forwards`).

    If every coefficient of J is 0, one Y = 0 without a pass. InputError if a gradient is not finite, or
    zero everywhere with coefficients that are not.
    """
    each = masks if update.moves and masks else (forward,)
    Y = tuple(gradients.grad_Y(params, update, one, max_tokens) for one in each)
    if update.moves:
        for gradient in Y:
            require_gradients("Y (of the objective on U)", gradient)
    return Y


def update_parts(update: UpdateBatch, slope: TokenStats) -> list[UpdatePart]:
    """<mu, Y_n> of every sequence, with `slope` the tangents of U along mu: sum c l', and sum d h'.

    InputError where `require_normaliser` raises it.
    """
    require_normaliser(update)
    assert update.normaliser_N is not None
    parts = [UpdatePart((update.coef_NR * slope.logp_NR).sum(1), f64(update.normaliser_N))]
    if update.entropy_coef_NR is not None:
        assert update.entropy_normaliser_N is not None
        t_N = (update.entropy_coef_NR * slope.entropy_NR).sum(1)
        parts.append(UpdatePart(t_N, f64(update.entropy_normaliser_N)))
    return parts


def error_over_u(update: UpdateBatch, along_PX: TokenStats, along_Y: TokenStats, clip: float) -> Error:
    """Error over U's prompts of sum_n <P X, Y_n> less what clipping takes, `clip` <Y, Y_n>."""
    along = zip(update_parts(update, along_PX), update_parts(update, along_Y), strict=True)
    parts = [part._replace(t_N=part.t_N - clip * norm.t_N) for part, norm in along]
    return update_error(parts, update.batch.prompt_N)


def require_normaliser(update: UpdateBatch) -> None:
    """InputError unless what every sequence of U adds to the divisors of J is known and fits."""
    _require_divisor("normaliser_N", update.normaliser_N, update)
    if update.entropy_coef_NR is not None:
        _require_divisor("entropy_normaliser_N", update.entropy_normaliser_N, update)


def _require_divisor(name: str, found: Tensor | None, update: UpdateBatch) -> None:
    if found is None:
        raise InputError(
            f"the update's {name} is not set, so that the error over U is unknown: make it with "
            f'funcprobe.update_batch(batch, advantage, "token_mean"), or set {name} to what every '
            "sequence adds to the divisor of J: its tokens, or 1 where that is the number of responses"
        )
    wrong_N = ~(found.isfinite() & (found >= 0))
    fits = found.shape == update.batch.prompt_N.shape and not bool(wrong_N.any())
    if not fits or not float(found.sum()) > 0:
        raise InputError(
            f"the update's {name} has shape {tuple(found.shape)}, {int(wrong_N.sum())} entries that "
            f"are negative or not finite, and sum {float(found.sum()):.3g}: one number for each of the "
            f"{len(update.batch.prompt_N)} sequences of U is expected, not all of them 0"
        )


def require_step(direction: UpdateDirection, step: Step) -> None:
    """InputError if a gradient Y = 0 leaves nothing of the step: no momentum, no weight decay."""
    if any(bool(v.any()) for v in direction.total.values()):
        return
    why = (
        "Adam's first moments and weight decay are 0 too"
        if step.rule == "adamw"
        else (f'rule "{step.rule}" has no momentum and no weight decay')
    )
    raise InputError(
        f"every coefficient of J is 0, so that Y = 0, and {why}: v = 0, there is no step to predict; "
        "use other prompts or rewards"
    )


def require_gradients(name: str, grads: Params) -> None:
    """InputError if a gradient is zero everywhere, or on every LoRA tensor, or not finite."""
    for which, part in (("every tensor", grads), ("every LoRA tensor", lora_params(grads))):
        if part and not any(bool(g.any()) for g in part.values()):
            raise InputError(
                f"the gradient {name} is zero on {which} ({len(part)}): check that the adapter is "
                "active and used by the forward, and that some advantages are not 0"
            )
    if bad := [n for n, g in grads.items() if not bool(g.isfinite().all())]:
        raise InputError(
            f"the gradient {name} is not finite in {len(bad)} of {len(grads)} tensors, first {bad[0]}: "
            'use policy.dtype = "float32", or check the weights for damage'
        )
