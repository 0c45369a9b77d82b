"""Responses sampled from the current policy; generation takes place here only."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from funcprobe.policy.layout import out_of_memory
from funcprobe.policy.precision import arithmetic_of
from funcprobe.policy.suitability import causal_lm
from funcprobe.policy.trials import attempt
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig
from ..console import excerpt
from ..machine.devices import random_state_kept

STEPS = 4  # of generation that are timed


class Responses(NamedTuple):
    """Token ids of each response, its first end-of-sequence token included; whether it has one."""

    ids: list[list[int]]
    finished: list[bool]
    tokens: int  # that went through the model, of prompts and step by step
    padding: int  # of these: before prompts, and after responses while others continued


def ended_by(policy: Policy, eos_ids: Sequence[int] | None) -> tuple[Policy, str]:
    """The policy whose responses end with one of `eos_ids`, by default its own, and a line with them.

    Its own are those of TRL 1.16's GRPOTrainer: the tokenizer's and the model's generation config's.
    InputError for an id without a row in the embedding.
    """
    rows = len(policy.model.get_input_embeddings().weight)
    if eos_ids and max(eos_ids) >= rows:
        raise InputError(
            f"sampling.eos_ids has {max(eos_ids)}, but the model has {rows} rows: remove it"
        )
    chosen = tuple(sorted(set(eos_ids))) if eos_ids else policy.eos_ids
    names = ", ".join(f"{i} {excerpt(policy.tokenizer.decode([i]))}" for i in chosen)
    origin = "sampling.eos_ids" if eos_ids else "tokenizer and generation config, as in TRL"
    return policy._replace(eos_ids=chosen), f"responses end with {names} ({origin})"


def sample_responses(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Responses:
    """One response per prompt from softmax(logits / temperature), after top_k and top_p if set.

    The same seed, prompts and `generation_batch` give the same responses; the global random state is
    restored. `advance` is called with the number of sequences done after each batch. Raises InputError
    if probabilities are not finite, and if memory runs out.
    """
    generation = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=1.0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
        use_cache=True,
    )
    ids: dict[int, list[int]] = {}
    tokens = 0
    with random_state_kept(), torch.no_grad():
        try:
            padded = pads(policy, prompt_ids)
        except RuntimeError as error:
            if out_of_memory(error):
                raise _too_many(len(prompt_ids)) from error
            raise
        torch.manual_seed(seed)
        for part in _parts(prompt_ids, config.generation_batch, padded=padded):
            found = _generate(policy, [prompt_ids[i] for i in part], generation)
            ids.update(zip(part, found, strict=True))
            # The last token of the longest is sampled, never an input.
            tokens += len(part) * (max(len(prompt_ids[i]) for i in part) + len(found[0]) - 1)
            advance(len(part))
    cut = [_through_first_eos(ids[i], policy.eos_ids) for i in range(len(prompt_ids))]
    real = sum(len(x) + len(y) - 1 for x, y in zip(prompt_ids, cut, strict=True))
    finished = [response[-1] in policy.eos_ids for response in cut]
    return Responses(cut, finished, tokens, tokens - real)


def seconds_of_a_step(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], config: SamplingConfig
) -> float:
    """Of generating one more token for each of these prompts; the random state is restored."""

    def took(tokens: int) -> float:
        generation = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=list(policy.eos_ids),
            pad_token_id=policy.pad_id,
            use_cache=True,
        )
        start = time.perf_counter()
        _generated(policy, prompt_ids, generation)
        return time.perf_counter() - start

    with random_state_kept(), torch.no_grad():
        took(2)  # the first one is slower
        few, more = (min(took(tokens) for _ in range(2)) for tokens in (2, 2 + STEPS))
    return max(0.0, more - few) / STEPS


def pads(policy: Policy, prompt_ids: Sequence[Sequence[int]]) -> bool:
    """Whether prompts of several lengths can be generated together, by a trial on two of the prompts.

    Compared are the logits of generate() and of a forward over what it generated. Padding before a
    prompt changes them where state-space layers or positions read it. InputError if they differ without
    padding: responses would be samples of another policy.
    """
    by_length = {len(ids): ids for ids in prompt_ids}
    two = [by_length[length] for length in sorted(by_length)[:2]]
    if len(two) == 2:
        together = attempt(lambda: _off(policy, two))
        if not isinstance(together, str) and together <= 1:
            return True
    name = type(causal_lm(policy.model)).__name__
    alone = attempt(lambda: [_off(policy, [ids]) for ids in two])
    if isinstance(alone, str):
        raise InputError(f"{name}: its generate() fails: {alone}")
    if any(map(math.isnan, alone)):
        return False  # probabilities that are not finite: sampling raises, and says so
    if max(alone) > 1:
        raise InputError(
            f"{name}: generate() gives other logits than the model's "
            "own forward, so that its responses are no samples of this policy: supply E and U from "
            "files (rollouts.eval, rollouts.update), or take another version of transformers"
        )
    return len(two) == 1


def _off(policy: Policy, prompt_ids: Sequence[Sequence[int]]) -> float:
    """Largest difference between logits of generate() and of a forward, in units of what is allowed.

    NaN if the forward's own are not finite.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=3,  # the second and third come from a cache
        pad_token_id=policy.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    out = _generated(policy, prompt_ids, config)
    scores_NRV = torch.stack(out.logits, 1)
    # Rounding through all layers, and a cache of the values' own precision; padding that is read, and
    # positions that are others, change logits by their size.
    allowed = 0.1 if torch.finfo(scores_NRV.dtype).eps > 1e-4 else 1e-3
    worst = 0.0
    for ids, row_L, scores_RV in zip(prompt_ids, out.sequences, scores_NRV, strict=True):
        count = len(scores_RV)  # fewer if all of them ended
        own_1L = row_L[-len(ids) - count :][None]
        with arithmetic_of(dict(policy.model.named_parameters())):
            logits_LV = policy.model(input_ids=own_1L, use_cache=False).logits[0]
        plain_RV = logits_LV[-count - 1 : -1].to(scores_RV)
        if not bool(plain_RV.isfinite().all()):
            return math.nan
        error = float((scores_RV - plain_RV).abs().max() / plain_RV.abs().max())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst / allowed


def _parts(prompt_ids: Sequence[Sequence[int]], most: int, *, padded: bool) -> list[list[int]]:
    """Prompts generated together: consecutive ones, or (not `padded`) those of equal length."""
    if padded:
        groups = [list(range(len(prompt_ids)))]
    else:
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(prompt_ids):
            by_length.setdefault(len(ids), []).append(i)
        groups = list(by_length.values())
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def _generate(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], generation: GenerationConfig
) -> list[list[int]]:
    longest = max(len(ids) for ids in prompt_ids)
    try:
        out_NL = _generated(policy, prompt_ids, generation)
    except RuntimeError as error:
        if out_of_memory(error):
            raise _too_many(len(prompt_ids)) from error
        if "probability tensor contains" not in str(error):  # torch.multinomial's, on any device
            raise
        raise InputError(
            "the policy's probabilities are not finite: its weights are damaged, or too large for "
            'policy.dtype; try "float32"'
        ) from error
    return [row[longest:] for row in out_NL.tolist()]


def _too_many(count: int) -> InputError:
    return InputError(
        f"memory ran out while {count} responses were sampled at once: lower sampling.generation_batch"
    )


def _generated(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], generation: GenerationConfig
) -> Any:
    """generate() of prompts padded on the left to the longest."""
    device = next(policy.model.parameters()).device
    longest = max(len(ids) for ids in prompt_ids)
    padding = [longest - len(ids) for ids in prompt_ids]
    tokens_NL = torch.tensor(
        [[policy.pad_id] * pad + list(ids) for pad, ids in zip(padding, prompt_ids, strict=True)]
    )
    mask_NL = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    # Else XGLM's mask fails in float64, and padded rows of eager attention are NaN (transformers 5.23).
    with arithmetic_of(dict(policy.model.named_parameters())):
        return policy.model.generate(
            input_ids=tokens_NL.to(device),
            attention_mask=mask_NL.to(device),
            generation_config=generation,
        )


def _through_first_eos(response: list[int], eos_ids: Sequence[int]) -> list[int]:
    for k, token in enumerate(response):
        if token in eos_ids:
            return response[: k + 1]
    return response
