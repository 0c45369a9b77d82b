"""Numbers in a page: as many digits as their interval leaves, with the whole value beside them."""

import math

from markupsafe import Markup

from ..results.digits import power_of
from ..results.quantity import Interval

MINUS = "\N{MINUS SIGN}"
SMALLEST, LARGEST = 1e-4, 1e4  # outside of which a power of ten is factored out
MOST = 7  # decimals
NONE = Markup('<span class="none">–</span>')


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> Markup:
    """With `digits` significant digits; a dash where there is none."""
    if value is None:
        return NONE
    if not value:
        return _data(value, Markup("0"))
    power = _power(value)
    decimals = digits - 1 - math.floor(math.log10(abs(value / 10**power)))
    return _data(value, _fixed(value / 10**power, max(decimals, 0), signed) + _times(power))


def setting(value: float | None) -> Markup:
    """As it was set, a learning rate say: at most three significant digits, no zeros at the end."""
    if value is None:
        return NONE
    power = _power(value)
    return _data(value, Markup(f"{value / 10**power:.3g}".replace("-", MINUS)) + _times(power))


def change(value: float, interval: Interval | None) -> Markup:
    """Signed, with half the width of its interval, two digits of which decide the decimals."""
    return _with_half(value, interval, signed=True)


def level(value: float, interval: Interval | None) -> Markup:
    """A value that is no change: without its plus sign."""
    return _with_half(value, interval, signed=False)


def percent(fraction: float, *, signed: bool = False) -> Markup:
    """Two significant digits, none after the point beyond 10 %."""
    value = 100 * fraction
    if not value:
        return _data(fraction, Markup("0 %"))
    if abs(value) < 0.01:
        return _data(fraction, Markup("under 0.01 %"))
    decimals = 0 if abs(value) >= 10 else 1 if abs(value) >= 1 else 2
    return _data(fraction, _fixed(value, decimals, signed) + Markup("\N{NO-BREAK SPACE}%"))


def count(value: float) -> Markup:
    """A whole number, in groups of three digits."""
    return _data(value, Markup(f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")))


def _with_half(value: float, interval: Interval | None, *, signed: bool) -> Markup:
    half = interval.half_width if interval else 0.0
    if not half:
        return number(value, signed=signed)
    power = _power(max(abs(value), half))
    decimals = min(max(1 - math.floor(math.log10(half / 10**power)), 0), MOST)
    shown = _fixed(value / 10**power, decimals, signed)
    width = _fixed(half / 10**power, decimals, False)
    opening, closing = ("(", ")") if power else ("", "")
    return Markup('<span class="amount">{}{} <span class="half">± {}</span>{}{}</span>').format(
        opening, _data(value, shown), _data(half, width), closing, _times(power)
    )


def _power(value: float) -> int:
    size = abs(value)
    if not size or SMALLEST <= size < LARGEST:
        return 0
    return power_of(size)


def _fixed(value: float, decimals: int, signed: bool) -> Markup:
    rounded = round(value, decimals) + 0.0  # no -0.0
    return Markup(f"{rounded:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS))


def _times(power: int) -> Markup:
    if not power:
        return Markup("")
    return Markup("\u00a0×\u00a010<sup>{}</sup>").format(str(power).replace("-", MINUS))


def _data(value: float, shown: Markup) -> Markup:
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)
