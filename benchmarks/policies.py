"""The two policies of coverage.py: one enumerated, one a pool of draws from the built-in toy."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from platformdirs import user_cache_path
from torch import Tensor
from torch.func import jvp

import funcprobe
from funcprobe import Batch, Forward, Params, TokenStats, UpdateBatch, response_mask, tree
from funcprobe.adapters import run
from funcprobe.adapters.checkpoint.toy import Recipe, ensure_toy
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.adapters.stages.batches import sample
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.store import Stages
from funcprobe.step.adam import UpdateDirection


class World(NamedTuple):
    """Responses with their probabilities, at theta, along v, and at theta + eta v."""

    batch: Batch
    stats: TokenStats
    tangent: TokenStats
    moved: TokenStats
    probability_N: Tensor
    eta: float


class Tables(NamedTuple):
    """Next-token logits by position and token before: one table for all prompts, one for each."""

    batch: Batch  # every response to every prompt
    theta: Tensor
    stats: Callable[[Tensor], tuple[Tensor, Tensor]]  # their l, h at any theta
    probability_N: Tensor


class Toy(NamedTuple):
    world: World  # every prompt's draws follow one another
    each: int  # draws of a prompt
    params: Params
    forward: Forward
    direction: UpdateDirection
    update: UpdateBatch  # eight responses to every prompt


def tables(prompt_weights: tuple[float, ...] = (0.5, 0.3, 0.2), V: int = 4, R: int = 4) -> Tables:
    responses, prompts = list(_every_response(V, R)), len(prompt_weights)
    batch = funcprobe.collate(
        [[2, 1]] * (prompts * len(responses)),
        responses * prompts,
        [x for x in range(prompts) for _ in responses],
    )
    mask_NR, prompt_N, k = response_mask(batch), batch.prompt_N, torch.arange(R)
    token_NR, before_NR = batch.tokens_NL[:, 2:], batch.tokens_NL[:, 1:-1]

    def stats(theta: Tensor) -> tuple[Tensor, Tensor]:
        shared, own = theta[: R * V * V].view(R, V, V), theta[R * V * V :].view(prompts, R, V, V)
        logp_NRV = (shared[k, before_NR] + own[prompt_N[:, None], k, before_NR]).log_softmax(-1)
        logp_NR = logp_NRV.gather(-1, token_NR[..., None]).squeeze(-1)
        return logp_NR * mask_NR, -(logp_NRV.exp() * logp_NRV).sum(-1) * mask_NR

    theta = torch.randn((1 + prompts) * R * V * V, generator=torch.Generator().manual_seed(3)).double()
    theta[R * V * V :] *= 0.7
    weight_N = torch.tensor(prompt_weights, dtype=torch.float64)[prompt_N]
    return Tables(batch, theta, stats, weight_N * stats(theta)[0].sum(1).exp())


def table_world(policy: Tables) -> World:
    """Along a random direction."""
    v = torch.randn(len(policy.theta), generator=torch.Generator().manual_seed(5)).double()
    stats, tangent = jvp(policy.stats, (policy.theta,), (v,))
    eta = _eta_of_ess(tangent[0].sum(1), policy.probability_N)
    at = (TokenStats(*s) for s in (stats, tangent, policy.stats(policy.theta + eta * v)))
    return World(policy.batch, *at, policy.probability_N, eta)


def studied() -> list[str]:
    """Settings of the toy that RESULTS.md is of: larger than the quickstart's, and made in 40 s."""
    recipe = Recipe(seed=0, hidden=128, layers=4, largest=69)
    toy = ensure_toy(user_cache_path("funcprobe") / "toy-studied", recipe=recipe)
    return [f"policy.checkpoint={toy.checkpoint}", f"prompts.source={toy.prompts}"]


def toy(each: int) -> Toy:
    """`each` responses to each of the toy's 512 prompts, float64, along the next step."""
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.toml"
    settings = ["sampling.B_E=32", "sampling.B_U=512", "sampling.generation_batch=512", *studied()]
    narrator = Narrator()
    plan = load(read_config(quickstart, settings), narrator)
    batches = sample(plan, Stages(None), narrator)
    direction = run._predict(plan, batches, Stages(None), narrator).direction
    index = [i for i in range(len(plan.prompt_ids)) for _ in range(each)]
    ids = [plan.prompt_ids[i] for i in index]
    drawn = sample_responses(plan.policy, ids, plan.config.sampling, seed=7).ids
    batch = funcprobe.collate(ids, drawn, index)
    params, forward, v = plan.policy.params, plan.forward, direction.total
    stats = funcprobe.token_stats(params, batch, forward)
    _, tangent = funcprobe.tangents(params, batch, v, forward)
    probability_N = torch.full((len(index),), 1 / len(index), dtype=torch.float64)
    eta = _eta_of_ess(tangent.logp_NR.sum(1), probability_N)
    moved = funcprobe.token_stats(tree.axpy(eta, v, params), batch, forward)
    world = World(batch, stats, tangent, moved, probability_N, eta)
    return Toy(world, each, params, forward, direction, batches.update)


def effective_share(world: World) -> float:
    """Effective over actual sample size of whole-response weights at theta + eta v."""
    weight_N = (world.moved.logp_NR - world.stats.logp_NR).sum(1).exp()
    p_N = world.probability_N
    return float((p_N * weight_N).sum() ** 2 / (p_N * weight_N.square()).sum())


def _eta_of_ess(slope_N: Tensor, probability_N: Tensor, share: float = 0.8) -> float:
    """Where the effective sample size is this share, were log-weights linear in eta; by bisection."""
    low, high = 0.0, 100 / float(slope_N.abs().max())
    for _ in range(60):
        eta = (low + high) / 2
        weight_N = (eta * slope_N).exp()
        mean, square = ((probability_N * w).sum() for w in (weight_N, weight_N.square()))
        low, high = (eta, high) if mean**2 / square > share else (low, eta)
    return low


def _every_response(vocabulary: int, longest: int) -> Iterator[list[int]]:
    """Token 0 ends a response."""
    for length in range(1, longest + 1):
        for body in itertools.product(range(1, vocabulary), repeat=length - 1):
            for end in range(vocabulary) if length == longest else [0]:
                yield [*body, end]
