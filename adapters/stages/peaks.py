"""What a pass over a microbatch takes of the memory, by its tokens: a curve through trials' peaks."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

TOLERANCE = 0.03  # of a peak: repeated trials differ by less
NOISE = 4 * 2**20  # bytes that come and go beside a pass


class Trial(NamedTuple):
    """A pass over one microbatch: its tokens, and its increase of the peak memory in bytes."""

    tokens: int
    peak: float


class Curve(NamedTuple):
    """peak(T) = fixed + a_token T + a_pair T min(T, longest), in bytes, of a microbatch of T tokens.

    A sequence has up to `longest` tokens; its pairs of tokens have an entry each in masks and scores.
    """

    fixed: float
    a_token: float
    a_pair: float
    longest: int

    def peak(self, tokens: float) -> float:
        """Bytes of a microbatch of so many tokens."""
        own = min(tokens, self.longest)
        return self.fixed + self.a_token * tokens + self.a_pair * tokens * own


def curve(trials: Sequence[Trial], longest: int) -> Curve:
    """Through trials of ascending sizes, with pairs only if the peaks are not linear without them.

    Coefficients are not negative. Of one trial: all of its peak is per token.
    """
    if len(trials) == 1:
        return Curve(0.0, trials[0].peak / trials[0].tokens, 0.0, longest)
    linear = _least_squares(trials, longest, (0, 1))
    if len(trials) == 2 or _is_close(linear, trials):
        return linear
    return _least_squares(trials, longest, (0, 1, 2))


def at_most(trials: Sequence[Trial], found: Curve, tokens: int) -> float:
    """An upper bound of the next, larger trial's peak, in bytes.

    The square of the tokens after one trial, as nothing in a pass grows faster; afterwards the curve,
    with three times its tolerance.
    """
    if len(trials) == 1:
        return trials[0].peak * (tokens / trials[0].tokens) ** 2
    return (1 + 3 * TOLERANCE) * found.peak(tokens)


def _is_close(found: Curve, trials: Sequence[Trial]) -> bool:
    return all(
        abs(found.peak(trial.tokens) - trial.peak) <= max(TOLERANCE * trial.peak, NOISE)
        for trial in trials
    )


def _least_squares(trials: Sequence[Trial], longest: int, terms: Sequence[int]) -> Curve:
    """The least sum of squared deviations, relative but for noise; of these terms, none is negative."""
    tokens_M = torch.tensor([float(trial.tokens) for trial in trials], dtype=torch.float64)
    peak_M = torch.tensor([trial.peak for trial in trials], dtype=torch.float64)
    scale_M = peak_M.clamp(min=NOISE / TOLERANCE)
    pairs_M = tokens_M * tokens_M.clamp(max=longest)
    terms_MK = torch.stack([torch.ones_like(tokens_M), tokens_M, pairs_M], 1) / scale_M[:, None]
    target_M = peak_M / scale_M
    best, least = [0.0, 0.0, 0.0], float(target_M.square().sum())  # of the curve that is 0
    for count in range(1, len(terms) + 1):
        for chosen in itertools.combinations(terms, count):
            scale_K = terms_MK[:, list(chosen)].norm(dim=0)
            design_MK = terms_MK[:, list(chosen)] / scale_K
            found_K = torch.linalg.lstsq(design_MK, target_M, driver="gelsd").solution
            error = float((design_MK @ found_K - target_M).square().sum())
            if bool((found_K >= 0).all()) and error < least - 1e-12:
                least, best = error, [0.0, 0.0, 0.0]
                for term, value in zip(chosen, (found_K / scale_K).tolist(), strict=True):
                    best[term] = value
    return Curve(best[0], best[1], best[2], longest)
