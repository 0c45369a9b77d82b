"""Second order along one direction: second derivatives of every token, and where first order ends."""

import math
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp

from . import tree
from .estimators import influence_se, ratio_derivative
from .forward_mode import ForwardMode
from .head import head_second_tangents
from .layout import MAX_TOKENS, collate, in_microbatches, microbatches, scatter
from .policy import Forward
from .rows import Rows
from .tangents import aligned
from .taylor import second_jvp
from .types import Batch, Entropy, InputError, Params, ResponseMask, TokenStats
from .weights import by_group, importance_weights, integrand, prefix_sum, responsive

CHECKED_TOKENS = 8  # of the batch's first sequence, half prompt and half response where it has both


class SecondOrder(NamedTuple):
    """Second derivative along a direction, per unit of eta squared; as in `FirstOrder`."""

    derivative: float
    se: float
    influence_N: Float[Tensor, " N"]
    per_sequence_N: Float[Tensor, " N"]


def second_tangents(
    params: Params, batch: Batch, direction: Params, forward: Forward, max_tokens: int = MAX_TOKENS
) -> tuple[TokenStats, TokenStats, TokenStats]:
    """(l, h), d/d eta and d2/d eta2 of l and h at theta + eta * direction, eta = 0, [N, R] each.

    In Taylor mode, in nats, nats per eta and nats per eta^2; no graph is kept. On a few tokens of the
    batch, in every call, the model's first derivatives are compared with forward mode's and its second
    ones with a symmetric difference of these. Raises InputError where they differ, where the model has
    no such derivatives, for half precision, which cannot resolve that comparison, and inside a
    transform that differentiates; ValueError where `direction` has other names or shapes than
    `params`.
    """
    direction = aligned(direction, params)
    if torch.finfo(forward.coarsest).eps > 1e-4:
        raise InputError(
            f"second derivatives of a model in {forward.coarsest} would be rounding: "
            'use policy.dtype = "float64" or "float32"'
        )
    params, direction = ({n: t.detach() for n, t in given.items()} for given in (params, direction))
    _require_second_derivatives(params, batch, direction, forward)

    def one(rows: Rows) -> tuple[Tensor, ...]:
        hidden = partial(forward.hidden, rows=rows)
        jet = second_jvp(hidden, (params,), (direction,))
        return head_second_tangents(params, jet, rows.target_T, direction, forward)

    done = in_microbatches(one, batch, max_tokens, forward.layout, forward.halved)
    parts, outs = zip(*done, strict=True)
    tensors = [scatter(values, parts, batch) for values in zip(*outs, strict=True)]
    return TokenStats(*tensors[:2]), TokenStats(*tensors[2:4]), TokenStats(*tensors[4:])


def second_order(
    stats: TokenStats,
    tangent: TokenStats,
    second: TokenStats,
    mask_NR: ResponseMask,
    unit_N: Int[Tensor, " N"],
    entropy: Entropy,
    log_ratio_NR: Float[Tensor, "N R"] | None = None,
) -> SecondOrder:
    """d2/d eta2 H(theta + eta v) = sum_g R'', R'' = (N'' - R D'' - 2 R' D') / D, at eta = 0.

    With a, a' the prefix sums of l', l'': N'' = sum W (z'' + 2 a z' + (a^2 + a') z), D'' = sum W (a^2
    + a'), and R' = (N' - R D') / D as in `first_order`, which see for `unit_N`, errors and the clip.
    """
    weight_NR = importance_weights(log_ratio_NR, mask_NR, entropy)
    z_NR, dz_NR, ddz_NR = (integrand(s, mask_NR, entropy) for s in (stats, tangent, second))
    a_NR, da_NR = (prefix_sum(s.logp_NR * mask_NR, entropy) for s in (tangent, second))
    dweight_NR = responsive(weight_NR, entropy) * a_NR
    ddweight_NR = responsive(weight_NR, entropy) * (a_NR.square() + da_NR)
    cells = (
        weight_NR * z_NR,
        weight_NR * dz_NR + dweight_NR * z_NR,
        weight_NR * ddz_NR + 2 * dweight_NR * dz_NR + ddweight_NR * z_NR,
        *(weight_NR, dweight_NR, ddweight_NR),
    )
    n_Ng, dn_Ng, ddn_Ng, d_Ng, dd_Ng, ddd_Ng = (by_group(c, entropy) for c in cells)
    N, dN, ddN, D, dD, ddD = (by_group(c, entropy).sum(0) for c in cells)
    R, dR = N / D, ratio_derivative(N, D, dN, dD)
    ddR = (ddN - R * ddD - 2 * dR * dD) / D
    r_Ng = (n_Ng - R * d_Ng) / D
    dr_Ng = (dn_Ng - R * dd_Ng - r_Ng * dD - dR * d_Ng) / D
    ddr_Ng = (ddn_Ng - R * ddd_Ng - 2 * dR * dd_Ng - r_Ng * ddD - 2 * dr_Ng * dD - ddR * d_Ng) / D
    influence_N = ddr_Ng.sum(1)
    return SecondOrder(
        derivative=float(ddR.sum()),
        se=influence_se(influence_N, unit_N),
        influence_N=influence_N,
        per_sequence_N=((ddn_Ng - R * ddd_Ng - 2 * dR * dd_Ng) / D).sum(1),
    )


def eta_star(first: float, second: float) -> float:
    """2 |first| / |second|: the eta whose quadratic term is as large as its linear one.

    Where first order ends: at a tenth of it the quadratic term is 10 %. Infinite where nothing bends.
    """
    return math.inf if second == 0 else 2 * abs(first / second)


def difference_eta(tangent: TokenStats, mask_NR: ResponseMask, dtype: torch.dtype) -> float:
    """The e for `second_difference`: (12 eps)^(1/4) / rms_i S'_i, eps the precision of `dtype`.

    Let x = e S' be what e adds to a typical log-weight, so that derivatives of the estimator are of
    order H S'^n. In units of H S'^2, truncation e^2 H'''' / 12 is x^2 / 12 and rounding H eps / e^2
    is eps / x^2. Their sum is least at x^4 = 12 eps: x = 2.3e-4 in float64 and 0.03 in float32, with
    errors of 1e-8 and 2e-4; relative to an H'' far below H S'^2 they are so much larger. `dtype` is
    the coarsest that the values pass through (`Forward.coarsest`). Raises InputError where no
    response's log-probability moves.
    """
    rate = float((tangent.logp_NR * mask_NR).sum(1).square().mean().sqrt())
    if not 0 < rate < math.inf:
        raise InputError(
            f"the log-probabilities move by {rate} per unit of eta, a finite number above 0 is "
            "expected: is the direction zero or not finite?"
        )
    return float((12 * torch.finfo(dtype).eps) ** 0.25 / rate)


def second_difference(plus: float, minus: float, eta: float) -> float:
    """(delta(eta) + delta(-eta)) / eta^2 of two measured changes: the second derivative, cheaply.

    Odd orders cancel; what is left is eta^2 H'''' / 12, and rounding of sqrt(2) sigma / eta^2 with
    sigma from `rounding_noise`.
    """
    return (plus + minus) / eta**2


def rounding_noise(plus: tuple[float, float], minus: tuple[float, float]) -> float:
    """Standard deviation of rounding in one measured change, from four at +-eta/2 and +-eta.

    The even part (plus + minus) / 2 grows as eta^2 and the odd part (plus - minus) / 2 as eta, so
    that even(eta/2) - even(eta)/4 and odd(eta) - 2 odd(eta/2) are rounding where eta is so small that
    higher orders vanish. Their variances are 17/32 and 5/2 of that of one measurement.
    """
    even = [(p + m) / 2 for p, m in zip(plus, minus, strict=True)]
    odd = [(p - m) / 2 for p, m in zip(plus, minus, strict=True)]
    return math.sqrt(
        ((even[0] - even[1] / 4) ** 2 / (17 / 32) + (odd[1] - 2 * odd[0]) ** 2 / (5 / 2)) / 2
    )


def _require_second_derivatives(
    params: Params, batch: Batch, direction: Params, forward: Forward
) -> None:
    """InputError unless Taylor mode has forward mode's slope and the bend of its symmetric difference.

    Compared are the hidden states, from which `readout.py` goes on in closed form, or else the logits:
    l and h follow from them by operations that are right, and would hide the rest where the policy is
    certain of the next token.
    """
    (rows,) = microbatches(_first_tokens(batch), CHECKED_TOKENS)

    def outputs(at: Params) -> Tensor:
        hidden_TD: Tensor = forward.hidden(at, rows)
        return hidden_TD if forward.readout is not None else forward.logits(at, hidden_TD)

    def tangent(given: Params) -> Tensor:
        with torch.no_grad(), ForwardMode():
            slope: Tensor = jvp(outputs, (given,), (direction,))[1]
        return slope

    try:
        value, first, second = second_jvp(outputs, (params,), (direction,))
        expected = tangent(params)
    except RuntimeError as error:  # NotImplementedError is one
        said = " ".join(str(error).split())[:200]
        raise InputError(f"this model has no derivatives in Taylor mode: {said}") from error
    scale, slope, bend = (float(x.double().norm()) for x in (value, first, second))
    # One over the length along the direction on which they bend, also where some of these are 0.
    rates = [bend / slope if slope else 0.0, math.sqrt(bend / scale) if scale else 0.0]
    rate = max(*rates, slope / scale if scale else 0.0) or tree.norm(direction)
    if rate == 0:
        return
    eps = max(torch.finfo(dtype).eps for dtype in (first.dtype, forward.coarsest))
    where = "logits" if forward.readout is None else "hidden states"
    advice = "in Taylor mode; use second_difference() of two measured changes instead"
    # A first derivative is good to some 30 eps (4e-6 measured in float32).
    if not float((first - expected).double().norm()) <= 100 * eps * max(slope, scale * rate):
        raise InputError(f"first derivatives of the {where} are not those of forward mode {advice}")
    # Truncation is (e rate)^2 and rounding eps / (e rate): least at eps^(1/3).
    e = eps ** (1 / 3) / rate
    plus, minus = (tangent(tree.axpy(sign * e, direction, params)) for sign in (1, -1))
    difference = (plus.double() - minus.double()) / (2 * e)
    gap, size = float((second.double() - difference).norm()), max(bend, float(difference.norm()))
    # Truncation; tiny policies of every architecture are below 4e-10 and 2e-4.
    bound = 1e-6 if eps < 1e-12 else 5e-3
    if not gap <= bound * size + 100 * eps * slope / e:
        raise InputError(
            f"second derivatives of the {where} are off a symmetric difference of their first ones, by "
            f"{gap / size:.2g} of it: an operation of this model is wrong {advice}"
        )


def _first_tokens(batch: Batch) -> Batch:
    """The end of the first prompt and the start of its response, CHECKED_TOKENS in all at most."""
    prompt, count = int(batch.prompt_length_N[0]), int(batch.response_length_N[0])
    half = CHECKED_TOKENS // 2
    tokens = batch.tokens_NL[0].tolist()
    start = max(prompt - half, 0)
    return collate([tokens[start:prompt]], [tokens[prompt : prompt + min(count, half)]], [0])
