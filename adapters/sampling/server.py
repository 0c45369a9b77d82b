"""Engine "server": a program that serves the policy samples, and gives its log-probabilities.

They are stored as the sampler's, so that E is weighted by the policy's probabilities over the server's.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

import funcprobe
from funcprobe.policy.layout import collate, response_mask
from funcprobe.progress import NOTHING_KEPT, Progress
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig, ServerConfig
from .client import Call, answers, require_model
from .completions import Answer, Asked, body, most_bytes, read
from .drawn import are_packed, packed, unpacked
from .responses import Responses

TRIED = 8  # responses whose log-probabilities are compared before the others are asked for
OTHER_POLICY = 0.5  # nats, root mean square over tokens: after ten tokens log-weights have an sd of 1.6
FAR = 0.1  # nats; more than a server's rounding


class Gap(NamedTuple):
    """Between the server's log-probabilities and the policy's: root mean square, nats."""

    nats: float
    untempered: float  # to the policy's at temperature 1
    tokens: int


def sample(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    server: ServerConfig,
    seed: int,
    indices: Sequence[int],
    advance: Callable[[int], None],
    progress: Progress = NOTHING_KEPT,
) -> Responses:
    """A request for every prompt, with a seed of its own; answers are kept in `progress` as they come.

    InputError as `client` raises it, and where the log-probabilities of the first responses are those
    of another policy, or from before the temperature.
    """
    require_model(server)
    assert server.model is not None
    vocabulary = len(policy.model.get_input_embeddings().weight)
    calls = []
    for ids, index in zip(prompt_ids, indices, strict=True):
        asked = Asked(ids, config.max_new_tokens, policy.eos_ids, vocabulary)
        request = body(asked, server.model, config, request_seed(seed, index))
        reading = partial(read, asked=asked, model=server.model)
        calls.append(Call(request, most_bytes(asked), reading))
    plan = (len(calls), config.max_new_tokens)
    kept = progress.begin(plan, lambda x: are_packed(x.tensors, *plan, vocabulary, logp=True))
    here: dict[int, Answer] = {}
    if kept.so_far is not None:
        drawn, logp = unpacked(kept.so_far.tensors)
        here = {i: Answer(drawn[i], logp[i]) for i in drawn}

    left = [i for i in range(len(calls)) if i not in here]
    tried, others = left[:TRIED], left[TRIED:]

    def ask(rows: list[int]) -> int:
        def arrived(number: int, answer: Answer) -> None:
            here[rows[number]] = answer
            advance(1)
            if rows is others:  # else not yet known to be of this policy
                kept.keep((len(here),), partial(_packed, dict(here)))

        return answers(server, [calls[i] for i in rows], arrived)

    repeated, lines = ask(tried), list[str]()
    if tried:
        new = [here[i] for i in tried]
        lines = _compared(policy, [prompt_ids[i] for i in tried], new, config, server)
    repeated += ask(others)
    found = [here[i] for i in range(len(calls))]
    if repeated:
        lines.append(f"server: {repeated} requests were sent again")
    return Responses(
        ids=[x.ids for x in found],
        finished=[x.ids[-1] in policy.eos_ids for x in found],
        tokens=0,  # through the model here
        padding=0,
        logp=[x.logp for x in found],
        lines=tuple(lines),
    )


def _packed(found: Mapping[int, Answer]) -> list[torch.Tensor]:
    return packed({i: x.ids for i, x in found.items()}, {i: x.logp for i, x in found.items()})


def request_seed(seed: int, index: int) -> int:
    """Of 31 bits, which every server takes; another one for every index of a batch."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/request".encode()).digest()[:4])
    return (start + index) % 2**31


def gap(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    found: Sequence[Answer],
    temperature: float,
) -> Gap:
    """By a forward here over the responses."""
    batch = collate(prompt_ids, [x.ids for x in found], range(len(found)))
    mask_NR = response_mask(batch)
    server_T = torch.tensor([x for answer in found for x in answer.logp], dtype=torch.float64)
    longest = max(len(x) + len(y.ids) for x, y in zip(prompt_ids, found, strict=True))

    def nats(at: float) -> float:
        forward = funcprobe.frozen_forward(policy.model, policy.params, at, "packed")
        stats = funcprobe.token_stats(policy.params, batch, forward, longest)
        return float((stats.logp_NR[mask_NR].double() - server_T).square().mean().sqrt())

    here = nats(temperature)
    return Gap(here, here if temperature == 1 else nats(1.0), len(server_T))


def _compared(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    found: Sequence[Answer],
    config: SamplingConfig,
    server: ServerConfig,
) -> list[str]:
    seen = gap(policy, prompt_ids, found, config.temperature)
    over = f"root mean square over {seen.tokens} tokens of {len(found)} responses"
    if config.top_p < 1 or config.top_k:  # then the server's are of the tokens that are left
        return [
            f"server: log-probabilities {seen.nats:.2g} nats from the policy's before top_p, {over}"
        ]
    if seen.nats > FAR and seen.untempered < seen.nats / 10:
        raise InputError(
            f"{server.url} gives log-probabilities from before the temperature ({seen.untempered:.2g} "
            f"nats from the policy's at 1, {seen.nats:.2g} at {config.temperature:g}, {over}): start "
            "it so that it gives those it samples from (vLLM: --logprobs-mode processed_logprobs)"
        )
    if seen.nats > OTHER_POLICY or math.isnan(seen.nats):
        raise InputError(
            f'server.model = "{server.model}" is another policy: its log-probabilities are '
            f"{seen.nats:.2g} nats from those of {policy.source} ({over}): load this adapter, on this "
            "base, with this temperature"
        )
    warn = "warning: " if seen.nats > FAR else ""
    more = ", more than rounding explains: is it this checkpoint?" if warn else ""
    return [f"{warn}server: log-probabilities {seen.nats:.2g} nats from the policy's{more} ({over})"]
