"""The next step of the enumerable policy: exact entropy changes as functions of U's weights."""

from typing import NamedTuple

import pytest
import torch
from torch.func import functional_call

import funcprobe
from funcprobe import AdamState, Entropy, Params, Passes, Step, TokenStats, UpdateBatch, tree
from funcprobe.statistics import evaluation
from funcprobe.statistics.estimators import FirstOrder
from support.attribution import adam_state, difference, update_on
from support.enumerated import PROMPTS, VOCABULARY, every_response, exact_entropy
from support.estimators import rows
from support.policies import tiny_policy

# Rows of U in the enumeration, unequal groups: three of the first prompt, two of the second.
ROWS_U = (0, 17, 230, 341 + 5, 341 + 120)


class EnumeratedStep(NamedTuple):
    """A policy with all its responses, U, and the step from it; Y_a of U's parts by autograd."""

    probe: funcprobe.Probe
    everything: funcprobe.Batch
    stats: TokenStats  # of every response
    tangent: TokenStats  # of every response along v
    probability: torch.Tensor
    update: UpdateBatch
    state: AdamState
    step: Step
    direction: funcprobe.step.adam.UpdateDirection
    Y: Params
    gradient: dict[str, Params]  # per -> grad of the exact entropy
    part: dict[str, tuple[torch.Tensor, Params]]  # name -> mask of U's tokens, and their gradient
    along: dict[str, tuple[TokenStats, TokenStats]]  # tangents along P Y_a and dv/dw of every part

    def v(self, weight: float, name: str) -> Params:
        """v with the weight of one part of U changed."""
        Y = tree.axpy(weight - 1, self.part[name][1], self.Y)
        return funcprobe.update_direction(self.probe.params, Y, self.state, **self.step._asdict()).total

    def exact_share(self, per: str, name: str) -> float:
        P_Y = tree.multiply(self.direction.scale, self.part[name][1])
        return tree.dot(self.gradient[per], P_Y)

    def exact_marginal(self, per: str, name: str) -> float:
        """d/dw of the exact first-order change <grad H, v(w)> at w = 1, by differences."""
        return difference(lambda e: tree.dot(self.gradient[per], self.v(1 + e, name)), 1e-6)

    def exact(self, kind: str, per: str, name: str) -> float:
        return (self.exact_share if kind == "share" else self.exact_marginal)(per, name)


def enumerated_step(step: Step, steps: int) -> EnumeratedStep:
    model = tiny_policy(VOCABULARY)
    probe = funcprobe.bind(model, max_tokens=4096)
    responses = list(every_response())
    everything = funcprobe.collate(
        [x for x in PROMPTS for _ in responses],
        [y for _ in PROMPTS for y in responses],
        [i for i in range(len(PROMPTS)) for _ in responses],
    )
    update = update_on(funcprobe.select(everything, torch.tensor(ROWS_U)), seed=3)
    state = adam_state(probe.params, steps)

    # By the model itself and autograd, with nothing of the project in between.
    leaves = {n: t.clone().requires_grad_() for n, t in probe.params.items()}
    logp_NR, _ = plain_statistics(model, leaves, everything)
    length_N = everything.response_length_N.double()
    gradient = {}
    for per in ("token", "sequence"):
        value = exact_entropy(logp_NR.sum(1), length_N, per)
        gradient[per] = _gradient(value, leaves)
    l_NR, h_NR = plain_statistics(model, leaves, update.batch)
    J_NR = update.coef_NR * l_NR + update.entropy_coef_NR * h_NR
    mask_NR = funcprobe.response_mask(update.batch)
    chosen = {}
    for i, k in ((0, 0), (1, 1), (2, 3), (3, 0), (4, 1), (4, 3)):
        if bool(mask_NR[i, k]):
            one = torch.zeros_like(mask_NR)
            one[i, k] = True
            chosen[f"token {i}, {k}"] = one
    chosen |= {f"prompt {m}": (update.batch.prompt_N == m)[:, None] & mask_NR for m in (0, 1)}
    part = {n: (own, _gradient((J_NR * own).sum(), leaves)) for n, own in chosen.items()}
    Y = probe.grad_Y(probe.params, update)
    direction = funcprobe.update_direction(probe.params, Y, state, **step._asdict())
    stats = probe.token_stats(probe.params, everything)
    probability = stats.logp_NR.sum(1).exp() / len(PROMPTS)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-12)

    def tangents(v: Params) -> TokenStats:
        return probe.tangents(probe.params, everything, v)[1]

    given = (probe, everything, stats, tangents(direction.total), probability)
    made = EnumeratedStep(*given, update, state, step, direction, Y, gradient, part, {})
    # At a first step v turns within |Y| + eps = 1e-3, so that e |Y_a| must be far smaller.
    e, along = 1e-6, {}
    for name, (_, Y_a) in part.items():
        dv = tree.scale(1 / (2 * e), tree.axpy(-1.0, made.v(1 - e, name), made.v(1 + e, name)))
        along[name] = (tangents(tree.multiply(direction.scale, Y_a)), tangents(dv))
    return made._replace(along=along)


def plain_statistics(
    model: torch.nn.Module, params: Params, batch: funcprobe.Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """l and h of every response token by the model's own forward, padded on the right."""
    logits_NLV = functional_call(model, params, (batch.tokens_NL,)).logits.double()
    log_NLV = logits_NLV.log_softmax(-1)
    mask_NR = funcprobe.response_mask(batch)
    place_NR = (batch.prompt_length_N[:, None] + torch.arange(mask_NR.shape[1])) * mask_NR
    log_NRV = log_NLV.take_along_dim((place_NR - 1).clamp(min=0)[..., None], 1)
    l_NR = log_NRV.take_along_dim(batch.tokens_NL.take_along_dim(place_NR, 1)[..., None], 2)[..., 0]
    return l_NR * mask_NR, -(log_NRV.exp() * log_NRV).sum(2) * mask_NR


def _gradient(value: torch.Tensor, leaves: Params) -> Params:
    found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def estimate(
    world: EnumeratedStep, entropy: Entropy, size: int, seed: int
) -> dict[tuple[str, str], tuple[float, FirstOrder]]:
    """(kind, part) -> what `attribute` says from `size` responses drawn from the policy, and its error.

    Errors are those of the estimator along P Y_a and dv/dw.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(world.probability, size, replacement=True, generator=generator)
    draws = torch.arange(size)
    # A prompt for every draw: the baseline of one is of the others, and units are the draws.
    E = funcprobe.select(world.everything, index)._replace(prompt_N=draws)
    at = funcprobe.evaluate(E, rows(world.stats, index), entropy)
    params, update, forward = world.probe.params, world.update, world.probe.forward
    X = world.probe.weighted_grad(params, E, *evaluation.gradient_coefficients(at))
    zero = TokenStats(*(torch.zeros_like(update.coef_NR),) * 2)
    PX = tree.multiply(world.direction.scale, X)
    along_PX = funcprobe.tangents(params, update.batch, PX, forward)[1]
    tangent = rows(world.tangent, index)
    passes = Passes((world.Y,), at.stats, tangent, X, at.baseline_NR, zero, along_PX, zero)
    step = world.step
    along_DX = funcprobe.marginal_tangents(params, passes, update, world.state, forward, step=step)
    found = funcprobe.attribute(
        params, passes, along_DX, E, update, world.state, entropy=entropy, step=step
    )
    estimates = {}
    for name, (own, _) in world.part.items():
        for kind, tokens, t in zip(
            ("share", "marginal"), (found.update, found.marginal), world.along[name], strict=True
        ):
            error = evaluation.derivative(at, rows(t, index), draws)
            estimates[kind, name] = (float(tokens.token_NR[own].sum()), error)
    return estimates
