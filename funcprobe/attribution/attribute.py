"""The composed attribution: exact shares of a prediction, and its derivatives in the weights of U."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..along import Passes
from ..passes.tangents import tangents
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS
from ..statistics import evaluation
from ..step import masked
from ..types import AdamState, Batch, Entropy, Params, Step, TokenStats, UpdateBatch
from .evaluation_shares import EvaluationShares, evaluation_shares
from .module_errors import ModuleErrors, module_errors
from .module_shares import ModuleShares, Parts, module_shares
from .token_shares import TokenShares, update_shares


class Attribution(NamedTuple):
    """The derivative split four ways, each exact, per unit of eta and in the entropy estimator's unit.

    derivative = parts.momentum + parts.decay + parts.update
               = parts.momentum + parts.decay + update.total + dropout
               = sum over the tensors (modules, layers, projections, factors) of `modules`
               = evaluation.tokens.total

    Shares hold P fixed and say what made the step as it is. Marginals are no shares, and do not sum to
    the derivative: they say how it changes if something counts a little more.
    """

    derivative: float  # from the tangents of E along v, as `Prediction.derivative`
    update: TokenShares  # <P X, Y_mk> of U
    dropout: float  # <X, P Y> less `update.total`, which is without masks; rounding if Y is, too
    marginal: TokenShares  # <D^T X, Y_mk> of U
    modules: ModuleShares
    evaluation: EvaluationShares
    errors: ModuleErrors | None = None  # of `modules`, over E; None: passes without blocks

    @property
    def parts(self) -> Parts:
        """<X, v> by momentum, weight decay and this batch's gradient."""
        return self.modules.total


def marginal_tangents(
    params: Params,
    passes: Passes,
    update: UpdateBatch,
    adam_state: AdamState,
    forward: Forward,
    *,
    step: Step = Step(),
    max_tokens: int = MAX_TOKENS,
) -> TokenStats:
    """Tangents of U along D^T X, D = dv/dY of the whole step (see `response`): one pass over U.

    With masks, D is the mean of theirs, and the tangents are without. 0 without a pass if every
    coefficient of J is 0. Raises as `update_direction` and `tangents`.
    """
    if not update.moves:
        return TokenStats(*(torch.zeros_like(update.coef_NR) for _ in TokenStats._fields))
    DX = masked.mean_response(passes.X, params, passes.Y, adam_state, step)
    return tangents(params, update.batch, DX, forward, max_tokens)[1]


def attribute(
    params: Params,
    passes: Passes,
    along_DX: TokenStats,
    eval_batch: Batch,
    update: UpdateBatch,
    adam_state: AdamState,
    *,
    entropy: Entropy = Entropy(),
    step: Step = Step(),
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    unit_N: Int[Tensor, " N"] | None = None,
) -> Attribution:
    """Shares and marginals from the passes of a prediction and `marginal_tangents`; no model needed.

    With l', h' the tangents of U along P X, and of E along v where E is meant,

        share of U's token      c_mk l'_mk + d_mk h'_mk = <P X, Y_mk>
        marginal of U's token   the same along D^T X: d/dw <X, v(Y + (w - 1) Y_mk)> at w = 1
        share of E's token      q_ij h'_ij + (p_ij - q_ij rho_ij b_ij) l'_ij
        share of a tensor       <X, v> restricted to it

    w is the weight of a token in J, its coefficients and their divisors fixed; of a sequence or a
    prompt it is that of all its tokens, whose marginals add up. For the rule "sgd" marginals are
    shares, as v is linear in Y.

    Errors given U: over E's units, for the terms and prompts of `evaluation`; over blocks of them, for
    `modules` and the parts of v, if the passes were made with `block_N`. Those of U's prompts
    would each need E's tangents along one part of P Y, a further pass for each of them
    (`along.eval_passes` and `along.summarise_along` give it for any direction); they are not
    approximated. The arguments are those of `summarise`. Raises InputError for fewer than two units in
    E, and as `update_direction`.
    """
    at = evaluation.evaluate(
        eval_batch, passes.stats, entropy, sampler_logp_NR, baseline_NR=passes.baseline_NR
    )
    unit_N = eval_batch.prompt_N if unit_N is None else unit_N
    update_by_token = update_shares(update, passes.along_PX)
    modules = module_shares(passes.X, params, passes.Y, adam_state, step)
    return Attribution(
        derivative=evaluation.derivative(at, passes.tangent, unit_N).derivative,
        update=update_by_token,
        dropout=modules.total.update - update_by_token.total,
        marginal=update_shares(update, along_DX),
        modules=modules,
        evaluation=evaluation_shares(at, passes.tangent, eval_batch, unit_N),
        errors=None if passes.blocks is None else module_errors(at, passes.blocks, passes.X),
    )
