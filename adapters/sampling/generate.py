"""Responses sampled from the current policy; generation takes place here only."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig

from funcprobe.policy.layout import out_of_memory
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig
from ..console import excerpt
from ..machine.devices import random_state_kept


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
        torch.manual_seed(seed)
        for part in _parts(prompt_ids, config.generation_batch, padded=policy.attention != "eager"):
            found = _generate(policy, [prompt_ids[i] for i in part], generation)
            ids.update(zip(part, found, strict=True))
            # The last token of the longest is sampled, never an input.
            tokens += len(part) * (max(len(prompt_ids[i]) for i in part) + len(found[0]) - 1)
            advance(len(part))
    cut = [_through_first_eos(ids[i], policy.eos_ids) for i in range(len(prompt_ids))]
    real = sum(len(x) + len(y) - 1 for x, y in zip(prompt_ids, cut, strict=True))
    finished = [response[-1] in policy.eos_ids for response in cut]
    return Responses(cut, finished, tokens, tokens - real)


def _parts(prompt_ids: Sequence[Sequence[int]], most: int, *, padded: bool) -> list[list[int]]:
    """Prompts that are generated together: consecutive ones, or (not `padded`) those of equal length.

    With eager attention in float64 a row of padding alone gives NaN (transformers 5.23), so that
    nothing is padded there.
    """
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
    device = next(policy.model.parameters()).device
    longest = max(len(ids) for ids in prompt_ids)
    padding = [longest - len(ids) for ids in prompt_ids]
    tokens_NL = torch.tensor(
        [[policy.pad_id] * pad + list(ids) for pad, ids in zip(padding, prompt_ids, strict=True)]
    )
    mask_NL = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    try:
        out_NL = policy.model.generate(
            input_ids=tokens_NL.to(device),
            attention_mask=mask_NL.to(device),
            generation_config=generation,
        )
    except RuntimeError as error:
        if out_of_memory(error):
            raise InputError(
                f"memory ran out while {len(prompt_ids)} responses were sampled at once: lower "
                "sampling.generation_batch"
            ) from error
        if "probability tensor contains" not in str(error):  # torch.multinomial's, on any device
            raise
        raise InputError(
            "the policy's probabilities are not finite: its weights are damaged, or too large for "
            'policy.dtype; try "float32"'
        ) from error
    return [row[longest:] for row in out_NL.tolist()]


def _through_first_eos(response: list[int], eos_ids: Sequence[int]) -> list[int]:
    for k, token in enumerate(response):
        if token in eos_ids:
            return response[: k + 1]
    return response
