"""Observables beside the entropy, against the enumerated policy and its derivatives in reverse mode."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import funcprobe
from funcprobe import Entropy, Evaluation, InputError, TokenStats, tree
from funcprobe.passes.kl import kl_along
from funcprobe.policy.layout import select
from funcprobe.statistics import evaluation
from funcprobe.statistics.observables import (
    of_response,
    of_sampled_tokens,
    of_tokens,
    response_change,
    response_derivative,
)
from support.enumerated import EOS, ETA, PROMPTS, VOCABULARY, population
from support.estimators import rows
from support.policies import random_like, tiny_policy

PER = ("token", "sequence")


class Exact(NamedTuple):
    """The value of an observable, its derivative along v, and its change at ETA."""

    value: float
    slope: float
    change: float


class Observed(NamedTuple):
    """An observable on any responses of the enumeration."""

    exact: Exact
    at: Callable[..., Evaluation]  # (index, sampler, baseline)
    tangent: TokenStats
    moved: TokenStats


@pytest.fixture(scope="module")
def observables(world) -> dict[str, Observed]:
    """Derivatives by autograd of sums over every response: no pass of tangents, no chain rule of KL."""
    model = tiny_policy(VOCABULARY)
    probe = funcprobe.bind(model, max_tokens=4096)
    v = tree.scale(0.1, random_like(probe.params))
    base = funcprobe.base_params(model, probe.params)
    ref = probe.token_stats(base, world.batch)
    leaves = {n: t.clone().requires_grad_() for n, t in probe.params.items()}
    logp_N, T_N = probe.seq_logprobs(leaves, world.batch), world.batch.response_length_N.double()
    moved_N, ref_N = world.moved.logp_NR.sum(1), ref.logp_NR.sum(1)

    def exact(total: Callable[[torch.Tensor], torch.Tensor]) -> Exact:
        value = total(logp_N)
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        slope = tree.dot(dict(zip(leaves, grads, strict=True)), v)
        return Exact(float(value.detach()), slope, float((total(moved_N) - value).detach()))

    def mean(logp: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return (logp.exp() / len(PROMPTS) * f).sum()

    last_N = world.batch.tokens_NL.gather(
        1, (world.batch.prompt_length_N + world.batch.response_length_N - 1)[:, None]
    )[:, 0]
    reward_N = torch.sin(7.0 * torch.arange(len(T_N)).double()) + (last_N == 2)
    of = {"reward": reward_N, "length": T_N, "stop": (last_N == EOS).double()}
    found = {}
    for name, f_N in of.items():

        def at(index, sampler=None, baseline="none", f_N=f_N):
            batch, stats = drawn(world, index), rows(world.stats, index)
            return of_response(batch, stats, f_N[index], sampler, baseline=baseline)

        still = torch.zeros_like(world.tangent.logp_NR)
        z_NR = torch.zeros_like(still)
        z_NR[:, 0] = f_N
        found[name] = Observed(
            exact(lambda logp, f_N=f_N: mean(logp, f_N)),
            at,
            TokenStats(world.tangent.logp_NR, still),
            TokenStats(world.moved.logp_NR, z_NR),
        )
    kl = kl_along(probe.params, base, world.batch, v, probe.forward, (ETA,), 4096)
    by_token = (world.stats.logp_NR - ref.logp_NR, world.tangent.logp_NR)
    for per in PER:

        def divergence(logp, per=per):
            total = mean(logp, logp - ref_N)
            return total / mean(logp, T_N) if per == "token" else total

        for kind, z_NR, dz_NR, there_NR, make in (
            ("kl", kl.kl_NR, kl.tangent_NR, kl.moved[0], of_tokens),
            ("sampled kl", *by_token, world.moved.logp_NR - ref.logp_NR, of_sampled_tokens),
        ):
            for weights in WEIGHTS:

                def at(
                    index, sampler=None, baseline="none", z=z_NR, make=make, per=per, weights=weights
                ):
                    batch, stats = drawn(world, index), rows(world.stats, index)
                    entropy = Entropy(per, weights=weights, baseline=baseline)
                    return make(batch, stats, z[index], entropy, sampler)

                found[f"{kind} {per} {weights}"] = Observed(
                    exact(divergence),
                    at,
                    TokenStats(world.tangent.logp_NR, dz_NR),
                    TokenStats(world.moved.logp_NR, there_NR),
                )
    return found


def uniform(batch: funcprobe.Batch) -> torch.Tensor:
    """Log-probabilities of the uniform sampler of tokens."""
    return -math.log(VOCABULARY) * funcprobe.response_mask(batch).double()


def drawn(world, index: torch.Tensor) -> funcprobe.Batch:
    """The responses as draws, each a sampling unit of its own."""
    return select(world.batch, index)._replace(prompt_N=torch.arange(len(index)))


RESPONSE = ["reward", "length", "stop"]
WEIGHTS = ("per_decision", "sequence")
TOKENS = [f"{kind} {per} {w}" for kind in ("kl", "sampled kl") for per in PER for w in WEIGHTS]


@pytest.mark.parametrize("name", [*RESPONSE, *TOKENS])
def test_every_response_gives_the_exact_numbers(world, observables, name):
    """Each as often as a uniform sampler draws it: value, slope and change to rounding of 1e4 terms."""
    one, index = observables[name], population(world)
    batch = select(world.batch, index)
    at = one.at(index, uniform(batch))
    assert evaluation.value(at) == pytest.approx(one.exact.value, rel=1e-9, abs=1e-9)
    draws = torch.arange(len(index))
    slope = evaluation.derivative(at, rows(one.tangent, index), draws).derivative
    assert slope == pytest.approx(one.exact.slope, rel=1e-7, abs=1e-9)
    change = evaluation.change(at, rows(one.moved, index)).delta
    assert change == pytest.approx(one.exact.change, rel=1e-7, abs=1e-9)
    assert abs(one.exact.change - ETA * one.exact.slope) > 1e-4 * abs(one.exact.change)  # not linear
    assert evaluation.change(at, at.stats).delta == 0  # exactly, at eta = 0


@pytest.mark.parametrize("name", RESPONSE)
def test_of_a_response_the_two_functions_suffice(world, observables, name):
    one, index = observables[name], population(world)
    at = one.at(index, uniform(select(world.batch, index)))
    draws = torch.arange(len(index))
    found = response_derivative(at, rows(world.tangent, index), draws)
    assert found.derivative == pytest.approx(one.exact.slope, rel=1e-7)
    there = response_change(at, rows(world.moved, index))
    assert there.delta == pytest.approx(one.exact.change, rel=1e-7)


@pytest.mark.parametrize("name", [*RESPONSE, "kl token per_decision", "sampled kl sequence sequence"])
def test_a_baseline_changes_no_gradient_in_expectation_and_agrees_with_the_change(
    world, observables, name
):
    """With it, the prediction is still the derivative of what is measured: differences of second order
    in e = 1e-4 are off by e^2 times a third derivative, about 1e-8 of the slope's size."""
    one = observables[name]
    index = torch.multinomial(world.probability, 60, True, generator=torch.Generator().manual_seed(2))
    index = index[index.argsort()]
    batch = drawn(world, index)
    stats, tangent = rows(world.stats, index), rows(one.tangent, index)
    bare = one.at(index)
    b_NR = torch.sin(3.0 * stats.entropy_NR) * bare.mask_NR
    at = bare._replace(baseline_NR=b_NR)
    found = evaluation.derivative(at, tangent, batch.prompt_N)

    def measured(e: float) -> float:
        moved = TokenStats(*(s + e * t for s, t in zip(at.stats, tangent, strict=True)))
        return evaluation.change(at, moved).delta

    slope = (measured(1e-4) - measured(-1e-4)) / 2e-4
    assert found.derivative == pytest.approx(slope, rel=1e-6, abs=1e-8)
    p_NR, q_NR = evaluation.gradient_coefficients(at)
    by_gradient = (p_NR * tangent.logp_NR + q_NR * tangent.entropy_NR).sum()
    assert float(by_gradient) == pytest.approx(found.derivative, rel=1e-9)
    without = evaluation.derivative(bare, tangent, batch.prompt_N).derivative
    assert abs(found.derivative - without) > 1e-4  # it does something
    # In expectation nothing: over every response the control variate of b sums to 0.
    all_b_NR = torch.sin(3.0 * world.stats.entropy_NR)
    control = world.probability @ (world.tangent.logp_NR * all_b_NR).sum(1)
    assert abs(float(control)) < 1e-12


@pytest.mark.parametrize("name", ["reward", "sampled kl sequence sequence"])
def test_a_baseline_is_a_function_of_the_prefix(world, observables, name):
    """In a fold, responses with equal prefixes have equal baselines, whatever the observables are."""
    index = torch.multinomial(world.probability, 60, True, generator=torch.Generator().manual_seed(0))
    batch, at = drawn(world, index), observables[name].at(index, baseline="ridge")
    assert at.entropy.baseline == "ridge"
    z_N = at.stats.entropy_NR.sum(1)
    same = 0
    for i in range(0, 60, 5):  # draws of one fold
        for j in range(0, i, 5):
            for k in range(int(min(batch.response_length_N[[i, j]]))):
                if not torch.equal(batch.prompt_length_N[i], batch.prompt_length_N[j]):
                    continue
                end = int(batch.prompt_length_N[i]) + k
                if torch.equal(batch.tokens_NL[i, :end], batch.tokens_NL[j, :end]):
                    same += float(z_N[i]) != float(z_N[j])
                    assert float(at.baseline_NR[i, k]) == pytest.approx(
                        float(at.baseline_NR[j, k]), abs=1e-12
                    )
    assert same > 20
    assert float(at.baseline_NR.std()) > 0.01


def estimates(world, one: Observed, seed: int, count: int, baseline: str) -> tuple[float, float]:
    """(derivative, its error) on `count` responses drawn from the policy."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(world.probability, count, True, generator=generator)
    at = one.at(index, baseline=baseline)
    found = evaluation.derivative(at, rows(one.tangent, index), torch.arange(count))
    return found.derivative, found.se


def z_scores(world, one: Observed, seeds: range, count: int, baseline: str) -> torch.Tensor:
    pairs = [estimates(world, one, seed, count, baseline) for seed in seeds]
    return torch.tensor([(d - one.exact.slope) / se for d, se in pairs], dtype=torch.float64)


SCORED = [*RESPONSE, "kl token per_decision", "kl sequence sequence", "sampled kl token sequence"]


@pytest.mark.parametrize("name", SCORED)
def test_the_derivatives_on_drawn_responses_are_within_their_errors(world, observables, name):
    """40 batches of 100: mean z has standard deviation 0.16, its variance 0.23."""
    z = z_scores(world, observables[name], range(40), 100, "none")
    assert abs(float(z.mean())) < 0.6
    assert 0.4 < float(z.var()) < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["none", "ridge"])
@pytest.mark.parametrize("name", [*RESPONSE, *TOKENS])
def test_the_z_scores_of_200_batches(world, observables, name, baseline):
    """Mean z: standard deviation 0.07, so 0.25 is 3.5 of them, with room for the bias of a ratio, of
    1 / sqrt(N) of an error. Variance of z: 0.1; 0.65 to 1.5, as errors of 300 draws with heavy tails
    are small by some per cent."""
    z = z_scores(world, observables[name], range(200), 300, baseline)
    print(f"{name}, {baseline}: mean z {float(z.mean()):+.3f}, variance {float(z.var()):.3f}")
    assert abs(float(z.mean())) < 0.25
    assert 0.65 < float(z.var()) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("length", 0.75),
        ("stop", 0.85),
        # Of these the prefixes of four tokens reveal nothing; the fit costs no more than its noise.
        ("reward", 1.15),
        ("kl token per_decision", 1.15),
        ("sampled kl token sequence", 1.15),
    ],
)
def test_a_baseline_narrows_the_interval(world, observables, name, most):
    """By the spread of the estimates over 200 batches, on the same draws: their ratio is known to
    some 5 %, as the two are correlated."""
    spread = {
        baseline: torch.tensor(
            [estimates(world, observables[name], seed, 300, baseline)[0] for seed in range(200)]
        ).var()
        for baseline in ("none", "ridge")
    }
    ratio = float(spread["ridge"] / spread["none"])
    print(f"{name}: variance with ridge {ratio:.2f} of that without")
    assert ratio < most


def test_one_that_is_not_finite_is_refused(world):
    f_N = torch.zeros(len(world.probability), dtype=torch.float64)
    f_N[3] = math.nan
    with pytest.raises(InputError, match="observable of response 3 of E is nan"):
        of_response(world.batch, world.stats, f_N)
