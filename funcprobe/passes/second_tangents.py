"""Second derivatives of the log-probability and entropy of every token along one direction."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.func import jvp

from .. import tree
from ..autodiff.forward_mode import ForwardMode
from ..autodiff.taylor import second_jvp
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, collate, microbatches
from ..policy.rows import Rows
from ..types import Batch, InputError, Params, TokenStats
from .head import head_second_tangents
from .microbatches import per_token
from .tangents import aligned

CHECKED_TOKENS = 8  # of the batch's first sequence: half prompt, half response, if it has as many


def second_tangents(
    params: Params, batch: Batch, direction: Params, forward: Forward, max_tokens: int = MAX_TOKENS
) -> tuple[TokenStats, TokenStats, TokenStats]:
    """(l, h), d/d eta and d2/d eta2 of l and h at theta + eta * direction, eta = 0, [N, R] each.

    In Taylor mode, in nats, nats per eta and nats per eta^2; no graph is kept. Every call compares, on
    a few tokens of the batch, the model's first derivatives with forward mode's and its second ones
    with a symmetric difference of these. Raises InputError if they differ, if the model has no such
    derivatives, in half precision, which cannot resolve the comparison, and inside a transform that
    differentiates; ValueError if `direction` has other names or shapes than `params`.
    """
    params, direction = aligned(params, direction)
    if torch.finfo(forward.coarsest).eps > 1e-4:
        raise InputError(
            f"second derivatives of a model in {forward.coarsest} would be dominated by rounding: "
            'use policy.dtype = "float64" or "float32"'
        )
    params, direction = ({n: t.detach() for n, t in given.items()} for given in (params, direction))
    _require_second_derivatives(params, batch, direction, forward)

    def one(rows: Rows) -> tuple[Tensor, ...]:
        hidden = partial(forward.hidden, rows=rows)
        jet = second_jvp(hidden, (params,), (direction,))
        return head_second_tangents(params, jet, rows.target_T, direction, forward)

    tensors = per_token(one, 6, batch, max_tokens, forward)
    return TokenStats(*tensors[:2]), TokenStats(*tensors[2:4]), TokenStats(*tensors[4:])


def _require_second_derivatives(
    params: Params, batch: Batch, direction: Params, forward: Forward
) -> None:
    """InputError unless Taylor mode agrees with forward mode and with a symmetric difference of it.

    Compared are the hidden states, if `readout.py` continues from them in closed form, else the logits:
    l and h follow from them by operations known to be correct, and would hide errors where the policy
    is certain of the next token.
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
        message = " ".join(str(error).split())[:200]
        raise InputError(f"this model has no derivatives in Taylor mode: {message}") from error
    scale, slope, curvature = (float(x.double().norm()) for x in (value, first, second))
    # Inverse of the step over which the outputs become nonlinear; defined also if norms are 0.
    rates = [curvature / slope if slope else 0.0, math.sqrt(curvature / scale) if scale else 0.0]
    rate = max(*rates, slope / scale if scale else 0.0) or tree.norm(direction)
    if rate == 0:
        return
    eps = max(torch.finfo(dtype).eps for dtype in (first.dtype, forward.coarsest))
    where = "logits" if forward.readout is None else "hidden states"
    advice = "use second_difference() of two measured changes instead"
    # First derivatives are accurate to some 30 eps (4e-6 measured in float32).
    if not float((first - expected).double().norm()) <= 100 * eps * max(slope, scale * rate):
        raise InputError(
            f"first derivatives of the {where} in Taylor mode are not those of forward mode: {advice}"
        )
    # Truncation is (e rate)^2 and rounding eps / (e rate): smallest at e rate = eps^(1/3).
    e = eps ** (1 / 3) / rate
    plus, minus = (tangent(tree.axpy(sign * e, direction, params)) for sign in (1, -1))
    difference = (plus.double() - minus.double()) / (2 * e)
    gap, size = float((second.double() - difference).norm()), max(curvature, float(difference.norm()))
    # For truncation; tiny policies of every architecture are below 4e-10 and 2e-4.
    bound = 1e-6 if eps < 1e-12 else 5e-3
    if not gap <= bound * size + 100 * eps * slope / e:
        raise InputError(
            f"second derivatives of the {where} in Taylor mode differ from a symmetric difference of "
            f"first ones by {gap / size:.2g} of it: an operation of this model has a wrong derivative; "
            f"{advice}"
        )


def _first_tokens(batch: Batch) -> Batch:
    """The end of the first prompt and the start of its response, CHECKED_TOKENS in all at most."""
    prompt, count = int(batch.prompt_length_N[0]), int(batch.response_length_N[0])
    half = CHECKED_TOKENS // 2
    tokens = batch.tokens_NL[0].tolist()
    start = max(prompt - half, 0)
    return collate([tokens[start:prompt]], [tokens[prompt : prompt + min(count, half)]], [0])
