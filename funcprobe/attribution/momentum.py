"""Whose momentum: Adam's first moment as a sum over the steps that it averages, and their prompts."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .. import tree
from ..passes.gradients import grad_Y
from ..passes.tangents import tangents
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS
from ..step import adam, masked
from ..types import AdamState, InputError, Params, Step, TokenStats, UpdateBatch
from .token_shares import TokenShares, update_shares


class MomentumSteps(NamedTuple):
    """<X, v_momentum> by the step that a gradient was of, per unit of eta, in the prediction's unit.

    Their sum with `before` is <X, v_momentum> exactly, as `before` is the rest.
    """

    by_step: tuple[float, ...]  # newest first: of g_t, g_{t-1}, ...
    before: float  # of beta1^K m_{t-K}; where the K steps are all of the run, rounding of exp_avg
    rest: float  # |beta1^K m_{t-K}| / |m_t|, the share of exp_avg that the gradients do not explain

    @property
    def total(self) -> float:
        return sum(self.by_step) + self.before


class MomentumSince(NamedTuple):
    """<X, v_momentum> by what was in the first moment at an earlier checkpoint, and what came since."""

    before: float  # of beta1^(b - a) m_a
    since: float  # of the gradients of steps a + 1 to b

    @property
    def total(self) -> float:
        return self.before + self.since


class RecomputedStep(NamedTuple):
    """<X, v_momentum> of one step's gradient, by the tokens, sequences and prompts of that step."""

    recorded: float  # by the gradient as recorded
    shares: TokenShares  # by the gradient as recomputed; of every token, 0 past a response's end
    gradient_residual: float  # |recorded - recomputed| / |recorded|
    clip_coefficient: float  # of that step, by the recomputed gradient

    @property
    def residual(self) -> float:
        """What of `recorded` no token explains."""
        return self.recorded - self.shares.total


def moment_scale(
    params: Params, Y_masks: Sequence[Params], adam_state: AdamState, step: Step
) -> Params:
    """M, the diagonal with v_momentum = M exp_avg: -beta1 / ((1 - beta1^(t+1)) (sqrt(nu_hat) + eps)).

    Times the ratio of the group's learning rate to the first group's; with several masks the mean over
    theirs, 0 where the rule has no momentum. Float64. Raises as `update_direction`.
    """
    ones = {n: torch.ones(p.shape, dtype=torch.float64) for n, p in params.items()}
    unit = adam_state._replace(exp_avg=ones)  # v_momentum is linear in exp_avg
    return masked.mean_direction(params, Y_masks, unit, step).momentum


def momentum_by_step(
    X: Params,
    params: Params,
    Y_masks: Sequence[Params],
    adam_state: AdamState,
    gradients: Iterable[Params],
    *,
    step: Step = Step(),
) -> MomentumSteps:
    """<X, v_momentum> split by the steps whose gradients g_t, g_{t-1}, ... are given, newest first.

    With t steps taken and K gradients, of the loss, as the optimizer was given them (clipped),

        m_t = beta1^K m_{t-K} + sum_{k<K} (1 - beta1) beta1^k g_{t-k}
        <X, v_momentum> = <M X, beta1^K m_{t-K}> + sum_k (1 - beta1) beta1^k <M X, g_{t-k}>

    M of `moment_scale`: Adam's recursion (Kingma and Ba, arXiv:1412.6980) unrolled, each group with its
    own beta1. In float64. Raises InputError for more gradients than steps taken and for a gradient that
    is not finite, ValueError for other names or shapes, and as `update_direction`.
    """
    MX = tree.multiply(moment_scale(params, Y_masks, adam_state, step), X)
    whole = tree.dot(MX, adam_state.exp_avg)
    by_step = []
    rest = {n: tree.f64(m) for n, m in adam_state.exp_avg.items()}
    for ago, gradient in enumerate(gradients):
        part = moment_part(gradient, ago, adam_state)
        by_step.append(tree.dot(MX, part))
        rest = {n: m - part[n] for n, m in rest.items()}
    norm = tree.norm(adam_state.exp_avg)
    left = tree.norm(rest) / norm if norm else 0.0
    return MomentumSteps(tuple(by_step), whole - sum(by_step), left)


def moment_part(gradient: Params, ago: int, adam_state: AdamState) -> Params:
    """(1 - beta1) beta1^ago g: what the gradient of `ago` steps before the last is in exp_avg; float64.

    Raises as `momentum_by_step`.
    """
    tree.require_same(adam_state.exp_avg, gradient, "the recorded gradient")
    if (taken := min(adam_state.step.values())) <= ago:
        raise InputError(
            f"{ago + 1} gradients of steps are given, but Adam has taken {taken}: they are not of this "
            "state"
        )
    if bad := [n for n, g in gradient.items() if not bool(g.isfinite().all())]:
        raise InputError(f"the recorded gradient of {bad[0]}, {ago} steps before, is not finite")
    group_of = adam.groups_by_name(adam_state)
    weight = {n: (1 - group_of[n].beta1) * group_of[n].beta1 ** ago for n in gradient}
    return {n: weight[n] * tree.f64(g) for n, g in gradient.items()}


def momentum_since(
    X: Params,
    params: Params,
    Y_masks: Sequence[Params],
    adam_state: AdamState,
    earlier: AdamState,
    *,
    step: Step = Step(),
) -> MomentumSince:
    """<X, v_momentum> split at an earlier state of the same run: m_b = beta1^(b - a) m_a + since.

    Raises InputError unless every tensor has taken more steps than in `earlier`; ValueError for other
    names or shapes, and as `update_direction`.
    """
    tree.require_same(adam_state.exp_avg, earlier.exp_avg, "the earlier exp_avg")
    steps = {n: b - earlier.step[n] for n, b in adam_state.step.items()}
    if (fewest := min(steps.values())) < 1:
        raise InputError(
            f"the earlier state has taken {max(earlier.step.values())} steps, this one "
            f"{max(adam_state.step.values())}, {fewest} later: a state of fewer steps is expected"
        )
    MX = tree.multiply(moment_scale(params, Y_masks, adam_state, step), X)
    group_of = adam.groups_by_name(adam_state)
    kept = {n: group_of[n].beta1 ** steps[n] * tree.f64(m) for n, m in earlier.exp_avg.items()}
    before = tree.dot(MX, kept)
    return MomentumSince(before, tree.dot(MX, adam_state.exp_avg) - before)


def recomputed_step(
    X: Params,
    scale: Params,
    adam_state: AdamState,
    gradient: Params,
    ago: int,
    theta: Params,
    update: UpdateBatch,
    forward: Forward,
    *,
    max_grad_norm: float | None = None,
    max_tokens: int = MAX_TOKENS,
) -> RecomputedStep:
    """The part of one recorded step in <X, v_momentum>, by that step's tokens.

    With Y = grad J of `update` at `theta`, the parameters before that step, c its clip coefficient and
    w = (1 - beta1) beta1^ago, the recorded gradient is g = -c Y, and

        <M X, w g> = sum over tokens of <-w c M X, Y_mk>

    by one gradient of `update` and one pass of tangents along -w c M X, at `theta`; `scale` is M of
    `moment_scale`. At other parameters, or with another loss, Y is another gradient: the residuals say
    by how much. Raises as `momentum_by_step` and `tangents`.
    """
    MX = tree.multiply(scale, X)
    recorded = tree.dot(MX, moment_part(gradient, ago, adam_state))
    Y = tree.zeros(theta)
    along = TokenStats(*(torch.zeros_like(update.coef_NR) for _ in TokenStats._fields))
    clip = 1.0
    if update.moves:
        Y = grad_Y(theta, update, forward, max_tokens)
        clip = adam.clip_coefficient(Y, max_grad_norm)
        mu = tree.scale(-clip, moment_part(MX, ago, adam_state))
        _, along = tangents(theta, update.batch, mu, forward, max_tokens)
    norm = tree.norm(gradient)
    apart = tree.norm(tree.axpy(clip, Y, {n: tree.f64(g) for n, g in gradient.items()}))
    relative = apart / norm if norm else float(apart > 0)
    return RecomputedStep(recorded, update_shares(update, along), relative, clip)
