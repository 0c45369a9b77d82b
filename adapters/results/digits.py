"""Numbers as they are printed: with the digits that their intervals leave."""

import math

from .quantity import Interval

MOST_DECIMALS = 5  # smaller numbers are written with a power of ten
SMALLEST_POWER = -300  # of ten; below -307 doubles have fewer digits, and a power of ten is 0


def power_of(size: float) -> int:
    """The power of ten of a size above 0: 10 ** power <= size, but for the smallest of doubles."""
    return max(math.floor(math.log10(size)), SMALLEST_POWER)


def signed(change: float, low: float, high: float) -> tuple[str, str, str]:
    """Three numbers with the decimals that leave two digits to half the width of the interval."""
    half = (high - low) / 2
    decimals = 1 - power_of(half) if half > 0 else 3
    if decimals > MOST_DECIMALS:
        return f"{change:+.1e}", f"{low:+.1e}", f"{high:+.1e}"
    kept = max(decimals, 0)
    change, low, high = (round(x, kept) + 0.0 for x in (change, low, high))  # no -0.0
    return f"{change:+.{kept}f}", f"{low:+.{kept}f}", f"{high:+.{kept}f}"


def with_half(value: float, interval: Interval | None) -> str:
    """A number and half the width of its interval by one power of ten, with two digits of the half."""
    half = 0.0 if interval is None else interval.half_width
    largest = max(abs(value), half)
    if not largest:
        return "0"
    power = power_of(largest)
    decimals = 2
    if half:
        decimals = min(max(1 - math.floor(math.log10(half / 10**power)), 0), 4)
    number = f"{round(value / 10**power, decimals) + 0.0:+.{decimals}f}"  # no -0.0
    if half:
        number = f"{number} ± {half / 10**power:.{decimals}f}"
    return f"({number})e{power:+03d}" if half else f"{number}e{power:+03d}"
