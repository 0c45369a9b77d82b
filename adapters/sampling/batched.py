"""Engine "batched": transformers' generate(), prompts of similar length together."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from funcprobe.policy.layout import out_of_memory
from funcprobe.policy.precision import arithmetic_of
from funcprobe.policy.suitability import causal_lm
from funcprobe.policy.trials import attempt
from funcprobe.progress import NOTHING_KEPT, Kept, Progress, SoFar
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig
from ..machine.devices import random_state_kept
from .batch_size import batch_size
from .drawn import are_packed, packed, unpacked
from .draws import Draws, uniforms
from .own_logits import TRIED, gap, refused
from .responses import Responses, through_first_eos, tokens_of

STEPS = 4  # of generation that are timed
NOT_FINITE = (
    "the policy's probabilities are not finite: its weights are damaged, or too large for "
    'policy.dtype; try "float32"'
)


def sample(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    seed: int,
    indices: Sequence[int],
    advance: Callable[[int], None],
    progress: Progress = NOTHING_KEPT,
) -> Responses:
    """Longest prompts first, so that memory is at its peak at the start and rows are hardly padded.

    Where memory runs out, batches are halved for the rest, down to a single sequence. Batches are kept
    in `progress`; those of an interrupted sampling determine the others, as rounding depends on them.
    """
    with random_state_kept(), torch.no_grad():
        try:
            padded = pads(policy, prompt_ids)
        except RuntimeError as error:
            if out_of_memory(error):
                raise too_long(policy, prompt_ids, config) from error
            raise
        most = batch_size(policy, config, max(map(len, prompt_ids)))
        asked = 0 if config.generation_batch == "auto" else config.generation_batch
        plan = (len(prompt_ids), config.max_new_tokens)

        def fits(so_far: SoFar) -> bool:
            vocabulary = len(policy.model.get_input_embeddings().weight)
            if not are_packed(so_far.tensors, *plan, vocabulary):
                return False
            rows = _replayed(so_far.counts, partial(_parts, prompt_ids, padded=padded))
            return so_far.tensors[0].tolist() == rows

        kept = progress.begin((*plan, asked, int(padded)), fits)
        if kept.so_far is not None:
            most = kept.so_far.counts[0]
        waiting = _parts(prompt_ids, most, padded=padded)

        def generate(part: list[int]) -> list[list[int]]:
            u_NR = uniforms(seed, [indices[i] for i in part], config.max_new_tokens)
            found = _generate(policy, [prompt_ids[i] for i in part], config, u_NR)
            advance(len(part))
            return found

        try:
            ids, tokens, smallest = _in_batches(policy, prompt_ids, waiting, generate, kept, most)
        except RuntimeError as error:
            if out_of_memory(error):
                raise too_long(policy, prompt_ids, config) from error
            raise
    cut = [ids[i] for i in range(len(prompt_ids))]
    finished = [response[-1] in policy.eos_ids for response in cut]
    lines = (f"out of memory: {smallest} responses at once, then",) if smallest < most else ()
    return Responses(cut, finished, tokens, tokens - tokens_of(prompt_ids, cut), lines=lines)


def _in_batches(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    waiting: list[list[int]],
    generate: Callable[[list[int]], list[list[int]]],
    kept: Kept,
    most: int,
) -> tuple[dict[int, list[int]], int, int]:
    """Responses by prompt, tokens through the model, and the size to which batches were halved.

    The error of memory that ran out on a single sequence.
    """
    ids: dict[int, list[int]] = {}
    done = known = tokens = 0
    again: list[int] = []  # the batches before which memory ran out, as often as it did
    if kept.so_far is not None:
        _, known, tokens, *again = kept.so_far.counts
        ids, _ = unpacked(kept.so_far.tensors)
    smallest, ran_out = most, tuple(again)
    while waiting:
        part = waiting.pop(0)
        if len(part) > smallest:
            waiting = [part[:smallest], part[smallest:], *waiting]
            continue
        found = None
        if again[:1] == [done]:
            del again[0]
        elif done < known:
            done += 1
            continue
        else:
            try:
                found = generate(part)
            except RuntimeError as error:
                if not out_of_memory(error) or len(part) == 1:
                    raise
                ran_out = (*ran_out, done)
        if found is None:
            smallest = len(part) // 2
            waiting = [part, *waiting]
            continue
        ids |= {i: through_first_eos(y, policy.eos_ids) for i, y in zip(part, found, strict=True)}
        # The last token of the longest is sampled, never an input.
        tokens += len(part) * (max(len(prompt_ids[i]) for i in part) + len(found[0]) - 1)
        done += 1
        kept.keep((most, done, tokens, *ran_out), partial(packed, dict(ids)))
    return ids, tokens, smallest


def _replayed(counts: Sequence[int], parts: Callable[[int], list[list[int]]]) -> list[int] | None:
    """The prompts that have a response when `kept` has these counts; None if it never has."""
    if len(counts) < 3 or counts[0] < 1:
        return None
    smallest, known, _, *again = counts
    waiting, done, rows = parts(smallest), 0, list[int]()
    while done < known and waiting:
        part, *waiting = waiting
        if len(part) > smallest:
            waiting = [part[:smallest], part[smallest:], *waiting]
        elif again[:1] != [done]:
            done, rows = done + 1, rows + part
        elif len(part) == 1:
            return None
        else:
            del again[0]
            smallest, waiting = len(part) // 2, [part, *waiting]
    return sorted(rows) if done == known and not again else None


def seconds_of_a_step(
    policy: Policy, prompt_ids: Sequence[Sequence[int]], config: SamplingConfig
) -> float:
    """Of generating one more token for each of these prompts; the random state is restored."""
    longest = max(map(len, prompt_ids))

    def took(tokens: int) -> float:
        u_NR = uniforms(0, range(len(prompt_ids)), tokens)
        draws = LogitsProcessorList([Draws(config, u_NR, longest)])
        generation = _settings(policy, tokens, least=tokens)
        start = time.perf_counter()
        _generated(policy, prompt_ids, generation, draws)
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
        raise refused(
            policy,
            "generate()",
            "supply E and U from files (rollouts.eval, rollouts.update), or take another version of "
            "transformers",
        )
    return len(two) == 1


def _off(policy: Policy, prompt_ids: Sequence[Sequence[int]]) -> float:
    """The largest `gap` of generate() over these prompts; NaN if the forward's own are not finite."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=TRIED,
        pad_token_id=policy.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    out = _generated(policy, prompt_ids, config)
    scores_NRV = torch.stack(out.logits, 1)
    count = scores_NRV.shape[1]  # fewer if all of them ended
    rows = [row[-count:] for row in out.sequences.tolist()]
    gaps = [gap(policy, *row) for row in zip(prompt_ids, rows, scores_NRV, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def _parts(prompt_ids: Sequence[Sequence[int]], most: int, *, padded: bool) -> list[list[int]]:
    """Prompts generated together, by length, the longest first; not `padded`: those of equal length."""
    ordered = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    if padded:
        groups = [ordered]
    else:
        by_length: dict[int, list[int]] = {}
        for i in ordered:
            by_length.setdefault(len(prompt_ids[i]), []).append(i)
        groups = list(by_length.values())
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def _generate(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    u_NR: torch.Tensor,
) -> list[list[int]]:
    longest = max(map(len, prompt_ids))
    draws = Draws(config, u_NR.to(policy.model.device), longest)
    generation = _settings(policy, config.max_new_tokens)
    out_NL = _generated(policy, prompt_ids, generation, LogitsProcessorList([draws]))
    if not bool(draws.finite):
        raise InputError(NOT_FINITE)
    return [row[longest:] for row in out_NL.tolist()]


def _settings(policy: Policy, most: int, *, least: int | None = None) -> GenerationConfig:
    """Of generate() whose greedy choice is a draw."""
    return GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        min_new_tokens=least,
        max_new_tokens=most,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
        use_cache=True,
    )


def too_long(policy: Policy, prompt_ids: Sequence[Sequence[int]], config: SamplingConfig) -> InputError:
    """Not even one response fits into memory."""
    longest = max(map(len, prompt_ids)) + config.max_new_tokens
    return InputError(
        f"memory ran out while one response was sampled; with its prompt it may have {longest} tokens: "
        f"lower sampling.max_new_tokens, drop long prompts, or free memory of {policy.model.device}"
    )


def _generated(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    generation: GenerationConfig,
    processors: LogitsProcessorList | None = None,
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
            logits_processor=processors,
        )
