"""run.max_tokens = "auto": from the peak memory of ever larger trials of a gradient, not their time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch

import funcprobe
from funcprobe.policy.forward import Forward
from funcprobe.policy.layout import MAX_TOKENS, out_of_memory
from funcprobe.ranks import ALONE
from funcprobe.types import Batch, InputError, Params

from ..machine import memory
from ..machine.allocator import LARGE_PAGES, leaves_holes
from .peaks import Curve, Trial, at_most, curve

MOST = {"cpu": 4096, "cuda": 32768}  # larger microbatches are not faster
SHARE = 0.5  # of the free memory: of a trial, and of a microbatch
SHARE_OF_ONE = 0.75  # of a microbatch of one sequence, before its gradient is recomputed instead
FIRST = 16  # tokens of the first trial; each other has twice as many
AT_LEAST = 240  # tokens of the largest trial, if they fit; a whole number of sequences is near 256
BEYOND, BEYOND_IN_ONE = 16, 4  # how far the curve is extended: in sequences, and within one
MIB = 2**20


class Passes(NamedTuple):
    """What trials are made of: a policy, and the longest sequence of a run."""

    params: Params
    forward: Forward
    prompt_tokens: int
    response_tokens: int
    vocabulary: int
    devices: tuple[torch.device, ...]  # of the policy

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.response_tokens


Compute: TypeAlias = Callable[[Passes, Batch, Forward, int], None]


class Choice(NamedTuple):
    """The size of a microbatch, what it takes, and a line on how it was found."""

    max_tokens: int
    recompute: bool  # whether gradients recompute layer by layer
    curve: Curve | None  # of a gradient; None: peaks cannot be measured
    message: str


def choose(passes: Passes, room: float | None = None) -> Choice:
    """The largest power of two, up to MOST, whose gradient takes at most half of what is free.

    At least one longest sequence, if it takes at most three quarters; else its gradient is recomputed
    layer by layer. Raises InputError if that does not fit either. `room`: free bytes, by default those
    of the device. Where peaks cannot be measured, MAX_TOKENS of the core.
    """
    devices, longest = passes.devices, passes.longest
    room = memory.free(*devices) if room is None else room
    if not memory.can_measure(*devices):
        chosen = max(MAX_TOKENS, longest)
        why = "the memory of a pass cannot be measured without a GPU, or Linux's /proc/self/clear_refs"
        return Choice(chosen, False, None, f"run.max_tokens = {chosen} (auto): {why}")
    most = MOST[devices[0].type]
    trials = explore(passes, room, most)
    ordinary = curve(trials, longest) if trials else None
    wanted = ordinary is None or ordinary.peak(longest) > SHARE_OF_ONE * room
    why_not = funcprobe.unlayered(passes.params, passes.forward) if wanted else None
    recompute, found = wanted and why_not is None, ordinary
    if recompute:
        again = passes._replace(forward=passes.forward._replace(recompute=True))
        trials = explore(again, room, most)
        found = curve(trials, longest) if trials else None
    if found is None or found.peak(longest) > room:
        needed = None if found is None else found.peak(longest)
        raise _too_little(longest, needed, room, why_not, _advice(devices))
    chosen = fitted(found, room=room, most=most)
    how = ", and gradients recompute layer by layer, about a forward more" if recompute else ""
    how = how if why_not is None else f", and gradients cannot recompute layer by layer: {why_not}"
    how += f"; {advice}" if wanted and (advice := _advice(devices)) else ""
    a_token = (found.peak(chosen) - found.peak(0)) / chosen
    line = f"run.max_tokens = {chosen} (auto): {a_token / 1024:.0f} KiB a token, "
    return Choice(chosen, recompute, found, f"{line}{room / 2**30:.1f} GiB free{how}")


def gradient(passes: Passes, batch: Batch, forward: Forward, size: int) -> None:
    """A gradient over one microbatch, the pass that takes most."""
    p_NR = funcprobe.response_mask(batch).double()
    funcprobe.weighted_grad(passes.params, batch, p_NR, p_NR, forward, size)


def along(passes: Passes, batch: Batch, forward: Forward, size: int) -> None:
    """Tangents over one microbatch, which hold the activations of a layer."""
    funcprobe.tangents(passes.params, batch, passes.params, forward, size)


def explore(passes: Passes, room: float, most: int, compute: Compute = gradient) -> list[Trial]:
    """Passes over ever larger microbatches; none is predicted to take more than half of `room`.

    Up to the size from which the curve is extended to the one that will be chosen; no further where
    the longest sequence is seen not to fit. Where that is after the first, one of half its size, which
    shows what is fixed and what grows. No trial if memory runs out on the first.
    """
    peak = memory.peak_meter(*passes.devices)
    trials: list[Trial] = []
    tokens = FIRST
    while (trial := _trial(passes, tokens, peak, compute)) is not None:
        trials.append(trial)
        known = _measured(trials)
        found = curve(known, passes.longest)
        tokens *= 2
        if _is_enough(known, found, room, most):
            break
        if at_most(known, found, _whole(passes, tokens)) > SHARE * room:
            smaller = _trial(passes, FIRST // 2, peak, compute) if len(trials) == 1 else None
            return _measured(trials) if smaller is None else [smaller, *trials]
    return _measured(trials)


def _measured(trials: list[Trial]) -> list[Trial]:
    """Without the first, which loads libraries on the way, unless it is the only one."""
    return trials[1:] or trials


def _is_enough(trials: list[Trial], found: Curve, room: float, most: int) -> bool:
    longest, last = found.longest, trials[-1].tokens
    hopeless = len(trials) > 1 and found.peak(longest) > 2 * room
    goal = fitted(found, room=room, most=most)
    return hopeless or last >= max(AT_LEAST, min(goal, longest) / BEYOND_IN_ONE, goal / BEYOND)


def fitted(found: Curve, *, room: float, most: int) -> int:
    """The largest power of two up to `most` whose peak is at most half of `room`, in bytes.

    At least one longest sequence.
    """
    powers = [1 << i for i in range(most.bit_length())]
    fits = [n for n in powers if n <= most and found.peak(n) <= SHARE * room]
    return max(found.longest, fits[-1] if fits else 0)


def _trial(passes: Passes, tokens: int, peak: Callable[[], float], compute: Compute) -> Trial | None:
    """A pass over a microbatch of about `tokens`; None if memory ran out, be it for a while.

    Of one sequence, shortened like the longest, or of several of the longest ones.
    """
    size = _whole(passes, tokens)
    length = min(size, passes.longest)
    prompt = max(1, passes.prompt_tokens * length // passes.longest)
    batch = _batch(size // length, prompt, length - prompt, passes.vocabulary)
    short: list[int] = []  # halved, or recomputed: the peak is not that of the pass
    forward = passes.forward._replace(
        ranks=ALONE, halved=short.append, recomputing=lambda: short.append(size)
    )
    peak()
    try:
        compute(passes, batch, forward, size)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    taken = peak()
    return None if short else Trial(size, taken)


def _whole(passes: Passes, tokens: int) -> int:
    """The tokens of the microbatch that `_trial` makes of so many."""
    return max(1, round(tokens / passes.longest)) * min(tokens, passes.longest)


def _batch(count: int, prompt_tokens: int, response_tokens: int, vocabulary: int) -> Batch:
    """Sequences of random tokens with distinct prompts, as a shared one would be computed once."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, prompt_tokens + response_tokens)
    tokens = torch.randint(vocabulary, shape, generator=generator).tolist()
    return funcprobe.collate(
        [row[:prompt_tokens] for row in tokens], [row[prompt_tokens:] for row in tokens], range(count)
    )


def _advice(devices: Sequence[torch.device]) -> str:
    if any(leaves_holes(device.type) for device in devices):
        return f"{LARGE_PAGES}=1 in the environment takes less memory"
    return ""


def _too_little(
    longest: int, needed: float | None, room: float, why_not: str | None, advice: str
) -> InputError:
    takes = "more" if needed is None else f"{needed / MIB:.0f} MiB"
    how = "recomputed layer by layer"
    how = how if why_not is None else f"which cannot be {how} ({why_not})"
    return InputError(
        f'run.max_tokens = "auto": the longest sequence may have {longest} tokens, whose gradient '
        f"takes {takes}, {how}; {room / MIB:.0f} MiB are free: lower sampling.max_new_tokens, drop "
        f"long prompts, or free memory{advice and f'; {advice}'}"
    )
