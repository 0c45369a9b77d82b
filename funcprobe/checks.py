"""Sanity checks: each function returns what it found, the bound, and what a failure means."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import tree
from .passes.gradients import weighted_grad
from .passes.logprobs import token_stats
from .passes.tangents import alpha_vjp
from .policy.forward import Forward
from .policy.islands import float32_islands
from .policy.layout import response_mask, select
from .policy.reference import LAST_FACTOR
from .prediction import Prediction
from .probe import measure
from .statistics.estimators import Measured
from .step.evidence import Evidence
from .step.gradient_scale import GradientScale
from .types import Batch, Entropy, InputError, Params, TokenStats

FEW_TOKENS = 16


class Check(NamedTuple):
    """One check: `saw` compared with `bound`. If advisory, a failure is suspect but not an error."""

    name: str
    passed: bool
    saw: str
    bound: str
    failure_means: str
    advisory: bool = False


def adapter_changes_logits(
    params: Params, batch: Batch, stats: TokenStats, forward: Forward, max_tokens: int
) -> Check:
    """max |l(theta) - l(theta with every lora_B = 0)| over response tokens; 0 means no adapter."""
    off = {n: torch.zeros_like(t) if LAST_FACTOR.search(n) else t for n, t in params.items()}
    without = token_stats(off, batch, forward, max_tokens)
    largest = float((stats.logp_NR - without.logp_NR).abs().max())
    return Check(
        "adapter on/off changes the logits",
        largest > 0,
        f"largest change of a log-probability {largest:.3g} nats",
        "> 0",
        "the adapter is not active, or was never trained (lora_B = 0)",
    )


def gradients_reach(name: str, grads: Params) -> Check:
    """Number of tensors of a gradient that are not all zero."""
    nonzero = sum(bool(g.any()) for g in grads.values())
    return Check(
        f"gradient {name} is nonzero",
        nonzero > 0 and math.isfinite(tree.norm(grads)),
        f"{nonzero} of {len(grads)} tensors, norm {tree.norm(grads):.3g}",
        "at least one tensor, finite",
        "the loss does not depend on the adapter, every advantage is 0, or the forward overflows",
    )


def alpha_cases(
    params: Params, batch: Batch, mu: Params, forward: Forward, max_tokens: int, most: int = 4
) -> Check:
    """alpha_vjp at alpha = ones, random and a basis vector against per-sequence gradients.

    On the first `most` sequences, f_i = S_i; the largest difference relative to the largest |s_i|, or
    to the largest |g_i| |mu| / 100 if mu is nearly orthogonal to the gradients, where rounding is of
    that size.
    """
    part = select(batch, torch.arange(min(most, len(batch.prompt_N))))
    count = len(part.prompt_N)
    dots, norms = [], []
    for i in range(count):
        grad = _one_gradient(params, select(part, torch.tensor([i])), forward, max_tokens)
        dots.append(tree.dot(grad, mu))
        norms.append(tree.norm(grad))
    loop_N = torch.tensor(dots, dtype=torch.float64)
    size = max(float(loop_N.abs().max()), max(norms) * tree.norm(mu) / 100)
    generator = torch.Generator().manual_seed(0)
    alphas = (
        torch.ones(count).double(),
        torch.randn(count, generator=generator).double(),
        torch.eye(count)[0].double(),
    )
    found = [alpha_vjp(params, part, mu, forward, max_tokens, alpha_N=alpha_N) for alpha_N in alphas]
    worst = _relative(float((torch.stack(found) - loop_N).abs().max()), size)
    bound = {torch.float64: 1e-9, torch.float32: 1e-4}.get(forward.coarsest, 0.05)
    return Check(
        "alpha trick = per-sequence gradients",
        worst < bound,
        f"largest relative difference {worst:.2g}",
        f"< {bound:g}",
        "an operation without a correct second derivative (attention kernel, custom function)",
    )


def routes_agree(prediction: Prediction, forward: Forward) -> Check:
    """Gradients against tangents: <X, v> on E, and on U <X, P Y> = sum_n t_n, t_n along P X.

    Differences relative to |<X, v>| and to sum_n |t_n|. U is left out without gradient, and with
    dropout masks, which Y has and t_n has not.
    """
    bound = {torch.float64: 1e-9, torch.float32: 1e-3}.get(forward.coarsest, 0.05)
    found = {"E": _relative(prediction.bars_dot - prediction.derivative, prediction.bars_dot)}
    if prediction.masks is None and bool(prediction.t_N.any()):
        total, size = float(prediction.t_N.sum()), float(prediction.t_N.abs().sum())
        found["U"] = _relative(prediction.from_update - total, size)
    return Check(
        "reverse route = forward route",
        all(difference < bound for difference in found.values()),
        "relative difference " + ", ".join(f"{d:.2g} on {name}" for name, d in found.items()),
        f"< {bound:g}",
        "a wrong derivative in one mode, or a direction that does not match the parameters",
    )


def state_fits(evidence: Evidence) -> Check:
    """Whether another order of the optimizer's state fits the gradient on U far better."""
    random, other = evidence.over_random, min(evidence.over.values(), default=math.inf)
    nearest = f", {_odds(other)} over the nearest of {len(evidence.over)}" if evidence.over else ""
    return Check(
        "the optimizer state fits the gradients",
        evidence.verdict != "contradicted",
        f"{evidence.verdict}: {evidence.home} of {evidence.alike} parameters of equal shape fit their "
        f"own second moments best; odds {_odds(random)} over a random order{nearest}",
        "no other order has odds over 1000",
        "moments under the wrong parameters: names of another run, or a state of another adapter",
        advisory=True,
    )


def gradient_in_proportion(scale: GradientScale) -> Check:
    """Whether |Y| is within a factor of 30 of sqrt(nu_hat), and few entries beyond 10 of it.

    A U of 1/900 of the training run's batch would exceed the factor by its noise alone.
    """
    median = math.nan if scale.median is None else scale.median
    most, least = (
        max(scale.ratio.values(), default=math.nan),
        min(scale.ratio.values(), default=math.nan),
    )
    return Check(
        "gradient on U against Adam's second moments",
        1 / 30 < median < 30 and scale.beyond_ten < 0.1,
        f"|Y| / sqrt(nu_hat): median {median:.3g} over parameters, {least:.3g} to {most:.3g}; beyond "
        f"10 in {scale.beyond_ten:.2g} of the entries",
        "median 1/30 to 30; beyond 10 in under 0.1",
        "a U much smaller than the training run's batch; rewards, advantages or a normalisation that "
        "differ from the run's; a state of another run, or of its first steps",
        advisory=True,
    )


def eta_zero(
    params: Params,
    batch: Batch,
    direction: Params,
    stats: TokenStats,
    forward: Forward,
    *,
    entropy: Entropy,
    max_tokens: int,
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
) -> Check:
    """The measured change at eta = 0 is exactly 0; ESS = N if the policy itself sampled E."""
    seen: Measured = measure(
        params,
        batch,
        direction,
        0.0,
        stats,
        forward,
        entropy=entropy,
        max_tokens=max_tokens,
        sampler_logp_NR=sampler_logp_NR,
    )
    count = len(batch.prompt_N)
    own = sampler_logp_NR is None
    return Check(
        "eta = 0 changes nothing",
        seen.delta == 0 and (not own or seen.ess == count),
        f"change {seen.delta:g}, ESS {seen.ess:g} of {count} sequences",
        "change 0" + (f", ESS {count}" if own else ""),
        "a forward that is not deterministic, or parameters other than those that sampled",
    )


def repeat_is_identical(
    params: Params, batch: Batch, stats: TokenStats, forward: Forward, max_tokens: int
) -> Check:
    """A second forward is bit-identical."""
    again = token_stats(params, batch, forward, max_tokens)
    largest = float((torch.stack(again) - torch.stack(stats)).abs().max())
    return Check(
        "a repeated forward is identical",
        largest == 0,
        f"largest difference {largest:g} nats",
        "0",
        "dropout is on, or a kernel whose order of summation varies",
    )


def float64_throughout(model: nn.Module, batch: Batch) -> Check:
    """`islands.float32_islands` on the first tokens of the first sequence."""
    bound = "no module of lower precision"
    length = int(batch.prompt_length_N[0] + batch.response_length_N[0])
    try:
        found = float32_islands(model, batch.tokens_NL[:1, : min(length, FEW_TOKENS)])
    except InputError as error:
        why = "the model cannot be evaluated at a change of 1e-10; its precision is unknown"
        return Check("float64 throughout", False, str(error), bound, why, advisory=True)
    named = [f"{one.module} ({one.kind}) loses {one.error:.2g} of its response" for one in found]
    return Check(
        "float64 throughout",
        not found,
        f"{len(found)} modules: {named[0]}" if named else "every module responds to a change of 1e-10",
        bound,
        "the model's code casts to float32 there in a way that is not intercepted: measured changes "
        "below 1e-7 of the entropy are rounding errors",
    )


def _one_gradient(params: Params, one: Batch, forward: Forward, max_tokens: int) -> Params:
    p_NR = response_mask(one).double()
    return weighted_grad(params, one, p_NR, torch.zeros_like(p_NR), forward, max_tokens)


def _odds(log_odds: float) -> str:
    """Odds in powers of ten."""
    return f"1e{log_odds / math.log(10):+.0f}"


def _relative(difference: float, size: float) -> float:
    """|difference / size|; NaN, which passes no bound, if `size` is 0."""
    return abs(difference / size) if size else math.nan
