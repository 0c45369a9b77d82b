"""Before a run starts: tokens through the model, and how long they take, by a trial on this machine."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

import funcprobe
from funcprobe.policy.forward import Forward
from funcprobe.policy.layout import microbatches, select
from funcprobe.policy.rows import Rows
from funcprobe.policy.trials import attempt
from funcprobe.ranks import ALONE
from funcprobe.statistics.blocks import BLOCKS
from funcprobe.types import Batch

from .. import rollouts
from ..console import Narrator, duration
from ..machine import memory
from ..machine.precision import products
from ..rollouts import Rollouts
from ..sampling.batch_size import batch_size
from ..sampling.batched import seconds_of_a_step
from ..sampling.drawing import eval_index, update_index
from . import checks, max_tokens, sweep
from .peaks import Curve, curve
from .plan import Plan, vocabulary

# Costs in forwards over the same rows, the middle of docs/precision.md's ranges.
GRADIENT, TANGENTS, DOTS, SECOND = 2.15, 2.35, 2.25, 5.1
LONG_ENOUGH = 0.3  # seconds of a trial
AT_LEAST = 256  # tokens of it


class Part(NamedTuple):
    """Passes over one batch."""

    tokens: int  # of a pass through the linear layers
    passes: float
    forwards: float  # what they cost


class Forecast(NamedTuple):
    """What a run will take, with responses as long as they may be."""

    E: Part
    U: Part
    drawn: int  # tokens through the model while E and U are sampled
    seconds: float | None  # None: a trial failed, as the run will

    @property
    def tokens(self) -> int:
        return round(self.E.tokens * self.E.passes + self.U.tokens * self.U.passes)


def forecast(plan: Plan, narrator: Narrator, *, kl: bool = False, steps: int = 0) -> Forecast:
    """Of a run of this plan, from one forward over a microbatch and a few tokens of generation.

    `kl`: whether KL to the base is observed; `steps`: recorded steps that are split by prompt.
    Responses are taken to be as long as sampling.max_new_tokens, so that the tokens are an upper bound.
    """
    # What takes time is tried by this process alone, and shared then.
    size, forward = plan.world.size, plan.forward._replace(ranks=ALONE)
    plan = plan._replace(forward=forward)
    config, etas = plan.config, len(plan.etas)
    E = _batch(plan, "E", plan.supplied_eval)
    U = _batch(plan, "U", plan.supplied_update)
    tangents = 1 + config.attribution.influence
    count = len(E.prompt_N)
    forwards = etas + {"difference": 2, "exact": 0, "none": 0}[config.measure.second_order]
    forwards += etas + 3 if kl else 0
    second = 1 if config.measure.second_order == "exact" else 0
    of_rounding, of_checks = 4 * min(sweep.FEW, count), 3 * min(checks.FEW, count)
    again = min(checks.FEWEST, count)  # twice; and gradients and contractions of four sequences
    forwards_of_few, gradients_of_few = (
        (of_rounding + of_checks + 2 * again) / count,
        4 * (1 + 3) / count,
    )
    of_E = Part(
        _tokens(E, plan),
        tangents + 1 + forwards + second + forwards_of_few + gradients_of_few,
        tangents * TANGENTS
        + DOTS
        + forwards
        + second * SECOND
        + forwards_of_few
        + gradients_of_few * GRADIENT,
    )
    masks, attributed = len(plan.masks) or 1, config.attribution.level != "off"
    gradients, forwards_U = masks + steps, 0 if plan.loss is None else 1
    along = 1 + attributed + steps
    of_U = Part(
        _tokens(U, plan),
        gradients + along + forwards_U,
        gradients * GRADIENT + along * TANGENTS + forwards_U,
    )
    sampled = [
        *([E] if plan.supplied_eval is None else []),
        *([U] if plan.supplied_update is None else []),
    ]
    with narrator.phase("time of a pass"):
        a_token = attempt(lambda: _seconds_a_token(plan, E))
        drawing = attempt(lambda: _drawing(plan, sampled, 0.0 if isinstance(a_token, str) else a_token))
    seconds = None
    if not isinstance(a_token, str) and not isinstance(drawing, str):
        passes = a_token * sum(part.tokens * part.forwards for part in (of_E, of_U))
        seconds = (drawing + passes) / size
    drawn = sum(int((b.prompt_length_N + b.response_length_N - 1).sum()) for b in sampled)
    return Forecast(of_E, of_U, drawn, seconds)


def forecast_line(found: Forecast, *, stored: bool = False) -> str:
    """As "about 1.2 M tokens through the model in 12 passes over E and 3 over U: some 6 min"."""
    line = (
        f"about {short(found.tokens)} tokens through the model in {found.E.passes:.3g} passes over E "
    )
    line += f"and {found.U.passes:.3g} over U"
    if found.drawn:
        line += f", after up to {short(found.drawn)} of sampling"
    if found.seconds is not None:
        line += f": some {duration(found.seconds)} on this machine"
    if found.drawn:
        line += ", with the longest responses"
    return line + (", less what an earlier run left in .stages" if stored else "")


def peak_memory(plan: Plan) -> float | None:
    """Bytes, the model's included, of the largest gradient or tangents over a microbatch of E or U.

    With attribution E's gradient goes block by block. On a GPU of the device, else of the process.
    None: cannot be measured, or does not fit.
    """
    passes = plan.passes()
    if not memory.can_measure(*passes.devices):
        return None
    held = memory.now(*passes.devices)
    gradient, tangents = plan.size.curve, None
    with products(plan.config.policy.precision):
        gradient = gradient or _curve(plan, passes, max_tokens.gradient)
        tangents = _curve(plan, passes, max_tokens.along)
    if gradient is None or tangents is None:
        return None
    E = _batch(plan, "E", plan.supplied_eval)
    U = _batch(plan, "U", plan.supplied_update)
    count = len(E.prompt_N)
    block = math.ceil(count / BLOCKS) if plan.config.attribution.level != "off" else count
    blocks = [select(E, part) for part in torch.arange(count).split(block)]
    in_reverse = max(_largest(part, plan) for part in (*blocks, U))
    forwards = max(_largest(E, plan), _largest(U, plan))
    return held + max(gradient.peak(in_reverse), tangents.peak(forwards))


def _curve(plan: Plan, passes: max_tokens.Passes, compute: max_tokens.Compute) -> Curve | None:
    trials = max_tokens.explore(passes, memory.free(*passes.devices), plan.max_tokens, compute)
    return curve(trials, passes.longest) if trials else None


def _largest(batch: Batch, plan: Plan) -> int:
    """Tokens of the largest microbatch."""
    return max(rows.tokens for rows in _rows(batch, plan))


def short(count: int) -> str:
    """1234567 -> 1.2 M."""
    for size, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return (
                f"{count / size:.2g}{letter}" if count < 100 * size else f"{count / size:.0f}{letter}"
            )
    return str(count)


def _batch(plan: Plan, name: str, supplied: Rollouts | None) -> Batch:
    """E or U as it is supplied, or with the prompts that will be drawn and the longest responses."""
    if supplied is not None:
        return rollouts.to_batch(supplied)
    sampling, count = plan.config.sampling, len(plan.prompts)
    if name == "E":
        index = eval_index(plan.config, count)
    else:
        index = [i for i in update_index(plan.config, count) for _ in range(sampling.G)]
    generator = torch.Generator().manual_seed(0)
    shape = (len(index), sampling.max_new_tokens)
    responses = torch.randint(vocabulary(plan.policy), shape, generator=generator).tolist()
    return funcprobe.collate([plan.prompt_ids[i] for i in index], responses, index)


def _tokens(batch: Batch, plan: Plan) -> int:
    """Of one pass, padding included, as the model's layout has them."""
    return sum(rows.tokens for rows in _rows(batch, plan))


def _rows(batch: Batch, plan: Plan) -> list[Rows]:
    return microbatches(batch, plan.max_tokens, plan.forward.layout)


def _seconds_a_token(plan: Plan, E: Batch) -> float:
    """Of a forward: over ever more of E, up to a microbatch, until one takes long enough.

    The faster of two at each size, as the first of its kind may load libraries on the way.
    """
    count, every = 1, len(E.prompt_N)
    while True:
        part = select(E, torch.arange(min(count, every)))
        tokens = _tokens(part, plan)
        if tokens < min(AT_LEAST, plan.max_tokens) and count < every:
            count *= 2
            continue
        seconds = min(_timed(plan, plan.forward, part) for _ in range(2))
        if seconds >= LONG_ENOUGH or 2 * tokens > plan.max_tokens or count >= every:
            return seconds / tokens
        count *= 2


def _timed(plan: Plan, forward: Forward, batch: Batch) -> float:
    start = time.perf_counter()
    funcprobe.token_stats(plan.policy.params, batch, forward, plan.max_tokens)
    return time.perf_counter() - start


def _drawing(plan: Plan, sampled: Sequence[Batch], a_token: float) -> float:
    """Seconds of sampling: prompts as a forward, then a step a token, which grows with the batch."""
    if not sampled or plan.config.sampling.engine == "server":  # whose time is not known here
        return 0.0
    sampling, pair = plan.config.sampling, plan.prompt_ids[:2]
    step = seconds_of_a_step(plan.policy, pair, sampling)
    seconds = 0.0
    for batch in sampled:
        length_N = batch.prompt_length_N.sort(descending=True).values
        at_once = batch_size(plan.policy, sampling, int(length_N[0]))
        for prompts in length_N.split(at_once):
            seconds += a_token * int(prompts.max()) * len(prompts)
            a_step = step + a_token * max(0, len(prompts) - len(pair))
            seconds += a_step * (sampling.max_new_tokens - 1)
    return seconds
