"""The size of the gradient on U relative to the gradients that Adam's second moment averages."""

import math
import statistics
from typing import NamedTuple

from .. import tree
from ..types import AdamState, Params


class GradientScale(NamedTuple):
    """|Y| in units of sqrt(nu_hat), the root mean square of the gradients of recent steps.

    Where U is as large as a batch of the training run, `ratio` is about 1 for every parameter; a U of
    1/k of its responses has gradients up to sqrt(k) times as large, as far as they are noise.
    """

    ratio: dict[str, float]  # name -> sqrt(mean Y^2 / mean nu_hat), for parameters with nu > 0
    median: float | None  # of the ratios; None: no parameter has a second moment
    beyond_ten: float  # share of entries with |Y| > 10 sqrt(nu_hat)
    below_eps: float  # share of entries with sqrt(nu_hat) < eps, whose step is a gradient step by 1/eps


def gradient_scale(Y: Params, adam_state: AdamState, clip: float = 1.0) -> GradientScale:
    """Y, multiplied by the clip coefficient as the gradients in nu were, against sqrt(nu_hat).

    nu_hat = exp_avg_sq / (1 - beta2^step), without correction where the step is unknown or 0. No unit:
    the ratios do not depend on the scale of the loss. Parameters whose second moment is missing, zero
    everywhere, negative or not finite are omitted.
    """
    ratio: dict[str, float] = {}
    entries = beyond = below = 0
    for group in adam_state.groups:
        for name in group.names:
            nu = adam_state.exp_avg_sq.get(name)
            if nu is None or name not in Y or not bool((nu.isfinite() & (nu >= 0)).all()):
                continue
            step = adam_state.step.get(name)
            nu_hat = tree.f64(nu) / (1 - group.beta2**step if step else 1.0)
            g = clip * tree.f64(Y[name])
            if not bool(nu_hat.any()):
                continue
            ratio[name] = math.sqrt(float(g.square().mean() / nu_hat.mean()))
            entries += nu.numel()
            beyond += int((g.abs() > 10 * nu_hat.sqrt()).sum())
            below += int((nu_hat.sqrt() < group.eps).sum())
    return GradientScale(
        ratio=dict(sorted(ratio.items())),
        median=statistics.median(ratio.values()) if ratio else None,
        beyond_ten=beyond / entries if entries else 0.0,
        below_eps=below / entries if entries else 0.0,
    )
