"""run.max_tokens = "auto": from the peak memory of a trial of the heaviest pass, not from its time."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import funcprobe
from funcprobe.policy.forward import Forward
from funcprobe.policy.layout import out_of_memory
from funcprobe.types import Batch, InputError, Params

from ..machine import memory
from ..machine.allocator import release_freed_memory

MOST = {"cpu": 4096, "cuda": 32768}  # larger microbatches are not faster
TRIAL_TOKENS = 256  # least size of the smaller trial, so that activations dominate its memory
MIB = 2**20


class Trial(NamedTuple):
    """A pass over one microbatch: its tokens, and its increase of the peak memory in bytes."""

    tokens: int
    peak: float


class Choice(NamedTuple):
    """The size of a microbatch, and a line on how it was found."""

    max_tokens: int
    message: str


def choose(
    params: Params,
    forward: Forward,
    prompt_tokens: int,
    response_tokens: int,
    vocabulary: int,
    device: torch.device,
) -> Choice:
    """The size, by `fitted`, for a run whose longest sequence has such a prompt and response.

    The trials are gradients, whose activations are kept, on two microbatches of such sequences, the
    second twice as large. Raises InputError if a single sequence does not fit, and on a CPU whose peaks
    cannot be measured.
    """
    longest = prompt_tokens + response_tokens
    most = MOST[device.type]
    room = memory.free(device)
    halves: list[int] = []  # if the core halved a trial, its peak is that of a part
    peak = _peak_above(device)
    lengths = prompt_tokens, response_tokens
    try:
        trials = _trials(params, forward._replace(halved=halves.append), *lengths, vocabulary, peak)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_little(longest, None, room) from error
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


def peak_of(
    params: Params,
    forward: Forward,
    prompt_tokens: int,
    response_tokens: int,
    vocabulary: int,
    device: torch.device,
    tokens: int,
) -> float | None:
    """Bytes that a gradient over so many tokens takes, with all that is held beside it; by trials.

    None where peaks cannot be measured, or where a trial takes more memory than there is.
    """
    if device.type != "cuda" and not memory.reset_peaks():
        return None
    halves: list[int] = []
    peak = _peak_above(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.process_now()
    lengths = prompt_tokens, response_tokens
    try:
        trials = _trials(params, forward._replace(halved=halves.append), *lengths, vocabulary, peak)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return None if halves else held + _needed(*trials, max(tokens, prompt_tokens + response_tokens))


def fitted(small: Trial, large: Trial, *, longest: int, room: float, most: int) -> int:
    """The largest power of two up to `most` whose peak, extrapolated linearly, is at most room / 2.

    At least one longest sequence, provided that it fits; else InputError. `room` in bytes.
    """

    def needed(tokens: int) -> float:
        return _needed(small, large, tokens)

    powers = [n for i in range(most.bit_length()) if (n := 1 << i) <= most and needed(n) <= room / 2]
    if powers and powers[-1] >= longest:
        return powers[-1]
    if needed(longest) > room:
        raise _too_little(longest, needed(longest), room)
    return longest


def _needed(small: Trial, large: Trial, tokens: float) -> float:
    """The peak of a microbatch of so many tokens, extrapolated linearly."""
    slope = max(0.0, (large.peak - small.peak) / (large.tokens - small.tokens))
    return max(0.0, small.peak + slope * (tokens - small.tokens))


def _trials(
    params: Params,
    forward: Forward,
    prompt_tokens: int,
    response_tokens: int,
    vocabulary: int,
    peak: Callable[[], float],
) -> tuple[Trial, Trial]:
    """Gradients of two microbatches of the longest sequences, the second twice as large."""
    length = prompt_tokens + response_tokens
    count = math.ceil(TRIAL_TOKENS / length)

    def trial(number: int) -> Trial:
        batch = _batch(number, prompt_tokens, response_tokens, vocabulary)
        _gradient(params, batch, forward, number * length)
        return Trial(number * (length - 1), peak())

    return trial(count), trial(2 * count)


def _too_little(longest: int, needed: float | None, room: float) -> InputError:
    takes = "more" if needed is None else f"{needed / MIB:.0f} MiB"
    return InputError(
        f'run.max_tokens = "auto": the longest sequence may have {longest} tokens, whose gradient '
        f"takes {takes}; {room / MIB:.0f} MiB are free: lower sampling.max_new_tokens, drop long "
        "prompts, or free memory"
    )


def _peak_above(device: torch.device) -> Callable[[], float]:
    """A function whose calls return the peak since the previous call, above the memory in use now.

    For the process, the latter is that before the first pass, as all memory that it frees is released.
    """
    if device.type == "cuda":
        floor = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

        def on_device() -> float:
            found = torch.cuda.max_memory_allocated(device) - floor
            torch.cuda.reset_peak_memory_stats(device)
            return found

        return on_device
    release_freed_memory()  # else a pass that reuses freed memory would seem to take none
    if not memory.reset_peaks():
        raise InputError(
            'run.max_tokens = "auto" needs a GPU, or Linux with a writable /proc/self/clear_refs, to '
            "measure the memory of a microbatch: give a number"
        )
    floor = memory.process_now()

    def of_process() -> float:
        found = memory.process_peak() - floor
        release_freed_memory()
        memory.reset_peaks()
        return found

    return of_process


def _batch(count: int, prompt_tokens: int, response_tokens: int, vocabulary: int) -> Batch:
    """Sequences of random tokens with distinct prompts, as a shared one would be computed once."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, prompt_tokens + response_tokens)
    tokens = torch.randint(vocabulary, shape, generator=generator).tolist()
    return funcprobe.collate(
        [row[:prompt_tokens] for row in tokens], [row[prompt_tokens:] for row in tokens], range(count)
    )


def _gradient(params: Params, batch: Batch, forward: Forward, max_tokens: int) -> None:
    p_NR = funcprobe.response_mask(batch).double()
    funcprobe.weighted_grad(params, batch, p_NR, p_NR, forward, max_tokens)
