"""run.max_tokens = "auto": from what a trial of the heaviest pass takes; memory alone, no clock."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import funcprobe
from funcprobe.policy.forward import Forward
from funcprobe.policy.layout import out_of_memory
from funcprobe.types import Batch, InputError, Params

from ..machine import memory
from ..machine.allocator import hand_back_freed_memory

MOST = {"cpu": 4096, "cuda": 32768}  # larger microbatches buy no time
TRIAL_TOKENS = 256  # of the smaller trial at least, so that activations outweigh what else changes
MIB = 2**20


class Trial(NamedTuple):
    """A pass over one microbatch: its tokens, and by how many bytes it raised the peak."""

    tokens: int
    peak: float


class Choice(NamedTuple):
    """The size of a microbatch, and the line that says how it was found."""

    max_tokens: int
    said: str


def choose(
    params: Params,
    forward: Forward,
    prompt_tokens: int,
    response_tokens: int,
    vocabulary: int,
    device: torch.device,
) -> Choice:
    """The size for a run whose longest sequence has that prompt and response, as `fitted` has it.

    Tried is the gradient, whose activations are kept, on two microbatches of such sequences, the
    second twice as large. Raises InputError where not even one sequence fits, and on a CPU whose
    peaks cannot be measured.
    """
    longest = prompt_tokens + response_tokens
    most = MOST[device.type]
    room = memory.free(device)
    halves: list[int] = []  # where the core halved a trial, its peak is of less than the whole
    count = math.ceil(TRIAL_TOKENS / longest)
    peak = _peak_above(device)
    trials = []
    for number in (count, 2 * count):
        batch = _batch(number, prompt_tokens, response_tokens, vocabulary)
        try:
            _gradient(params, batch, forward._replace(halved=halves.append), number * longest)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise _too_little(longest, None, room) from error
        trials.append(Trial(number * (longest - 1), peak()))
    if halves:
        chosen = max(longest, halves[-1] // 2)
        return Choice(chosen, f"run.max_tokens = {chosen} (auto): {2 * halves[-1]} do not fit")
    chosen = fitted(*trials, longest=longest, room=room, most=most)
    slope = (trials[1].peak - trials[0].peak) / (trials[1].tokens - trials[0].tokens)
    return Choice(
        chosen,
        f"run.max_tokens = {chosen} (auto): {max(slope, 0) / 1024:.0f} KiB a token, "
        f"{room / 2**30:.1f} GiB free",
    )


def fitted(small: Trial, large: Trial, *, longest: int, room: float, most: int) -> int:
    """The largest power of two up to `most` whose peak, on the line through both, is room / 2 or less.

    One longest sequence is the least, as long as it fits at all; else InputError. `room` in bytes.
    """
    slope = max(0.0, (large.peak - small.peak) / (large.tokens - small.tokens))

    def needed(tokens: int) -> float:
        return max(0.0, small.peak + slope * (tokens - small.tokens))

    powers = [n for i in range(most.bit_length()) if (n := 1 << i) <= most and needed(n) <= room / 2]
    if powers and powers[-1] >= longest:
        return powers[-1]
    if needed(longest) > room:
        raise _too_little(longest, needed(longest), room)
    return longest


def _too_little(longest: int, needed: float | None, room: float) -> InputError:
    takes = "more" if needed is None else f"{needed / MIB:.0f} MiB"
    return InputError(
        f'run.max_tokens = "auto": the longest sequence may have {longest} tokens, whose gradient '
        f"takes {takes}, and {room / MIB:.0f} MiB are free: lower sampling.max_new_tokens, drop long "
        "prompts, or free memory"
    )


def _peak_above(device: torch.device) -> Callable[[], float]:
    """Peaks from now on: each call gives that since the last one, above what is held now.

    The process's floor is what it holds before the first pass, as all that this frees goes back.
    """
    if device.type == "cuda":
        floor = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

        def on_device() -> float:
            found = torch.cuda.max_memory_allocated(device) - floor
            torch.cuda.reset_peak_memory_stats(device)
            return found

        return on_device
    hand_back_freed_memory()  # a pass that filled a hole would seem to take nothing
    if not memory.reset_peaks():
        raise InputError(
            'run.max_tokens = "auto" needs a GPU, or a Linux whose /proc/self/clear_refs can be '
            "written, to measure what a microbatch takes: give a number"
        )
    floor = memory.process_now()

    def of_process() -> float:
        found = memory.process_peak() - floor
        hand_back_freed_memory()
        memory.reset_peaks()
        return found

    return of_process


def _batch(count: int, prompt_tokens: int, response_tokens: int, vocabulary: int) -> Batch:
    """Sequences of random tokens; no two share their prompt, which would be computed once."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, prompt_tokens + response_tokens)
    tokens = torch.randint(vocabulary, shape, generator=generator).tolist()
    return funcprobe.collate(
        [row[:prompt_tokens] for row in tokens], [row[prompt_tokens:] for row in tokens], range(count)
    )


def _gradient(params: Params, batch: Batch, forward: Forward, max_tokens: int) -> None:
    p_NR = funcprobe.response_mask(batch).double()
    funcprobe.weighted_grad(params, batch, p_NR, p_NR, forward, max_tokens)
