"""What charts share: amounts and their unit, numbers in words, axes, points with intervals."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import altair as alt

from ...console import excerpt
from ...results.digits import SMALLEST_POWER, power_of
from ...results.quantity import Interval
from ...results.saved import SavedRun
from ..theme import BY_NAME, TEXT

Row = Mapping[str, Any]
Chart: TypeAlias = Any
"""Of Altair, whose methods return Any."""
# Words, as the font of the files has no superscript minus.
SIZES = {3: "thousands", -3: "thousandths", -6: "millionths", -9: "billionths", -12: "trillionths"}
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS = "\N{MINUS SIGN}"
PLAIN = (1e-3, 1e6)  # sizes between which a number is written without a power of ten


class Amounts(NamedTuple):
    """The one unit in which the figures of a run show shares of the derivative along v."""

    factor: float
    """From "per unit of learning rate"."""
    unit: str
    """As "nats per token"."""
    at: str
    """As "at learning rate 0.0005"."""


def amounts(run: SavedRun) -> Amounts:
    """At the learning rate of the next step where it is known, else per unit of learning rate."""
    unit, eta = run.results.entropy.unit, run.results.next_lr.value
    if eta > 0:
        return Amounts(eta, unit, f"at the next learning rate, {eta_text(eta)}")
    return Amounts(1.0, unit, "per unit of learning rate")


def eta_text(eta: float) -> str:
    """A learning rate as configurations have them: 0.0005, 6.67e-5."""
    if not 0 < eta < math.inf:
        return f"{eta:g}"
    digits, exponent = f"{eta:.2e}".split("e")
    plain = f"{eta:.3g}"
    return plain if "e" not in plain and len(plain) < 7 else f"{float(digits):g}e{int(exponent)}"


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """As text with a minus sign and without the letter e, to `digits` digits: 0.0005, 6.67·10⁻⁵."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    sign = MINUS if rounded < 0 else "+" if signed else ""
    size = abs(rounded)
    if PLAIN[0] <= size < PLAIN[1]:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
        return sign + (text.rstrip("0").rstrip(".") if "." in text else text)
    exponent = power_of(size)
    return (
        f"{sign}{size / 10**exponent:.{digits - 1}f}".rstrip("0").rstrip(".")
        + f"·10{str(exponent).translate(SUPERSCRIPT)}"
    )


def interval_text(value: float, interval: Interval | None, factor: float = 1.0) -> str:
    """A value with its interval, in words."""
    shown = number(factor * value, signed=True)
    if interval is None:
        return shown
    low, high = (number(factor * x, signed=True) for x in (interval.low, interval.high))
    return f"{shown} ({low} to {high})"


def label(text: str, beginning: int = 22, end: int = 8) -> str:
    """Text of others on a line of bounded length, with nothing in it that is not seen."""
    return excerpt(" ".join(text.split()), beginning=beginning, end=end)[1:-1]


PERCENT = "format(datum.value * 100, '.6~r') + ' %'"
"""Vega's expression of a label that is a part of a whole."""


class Scaled(NamedTuple):
    """An axis in thousandths, millionths, thousands, so that its labels are short."""

    exponent: int

    def title(self, what: str, unit: str) -> str:
        """As "change, thousandths of nats per token"; no unit where `what` has it already."""
        if not self.exponent and unit in what.split():
            return what
        size = SIZES.get(self.exponent, f"1e{self.exponent}")
        scaled_unit = f"{size} of {unit}" if self.exponent else unit
        return f"{what}, {scaled_unit}" if what else scaled_unit

    @property
    def labels(self) -> str:
        """Vega's expression of a label; never with the letter e."""
        return f"format(datum.value * 1e{-self.exponent}, '.6~r')"

    def text(self, value: float) -> str:
        """A value as the labels of this axis are."""
        return number(value * 10.0**-self.exponent)


def scaled(values: Iterable[float | None]) -> Scaled:
    """By the largest of the values, a power of a thousand; none from 0.1 to 10,000."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    if largest == 0 or 0.1 <= largest < 1e4:
        return Scaled(0)
    return Scaled(max(3 * math.floor(math.log10(largest) / 3 + 1e-9), SMALLEST_POWER))


def padded(values: Iterable[float | None], *, zero: bool = True, part: float = 0.06) -> list[float]:
    """The range of the values, and 0, with some room."""
    found = [v for v in values if v is not None and math.isfinite(v)] + ([0.0] if zero else [])
    low, high = min(found, default=0.0), max(found, default=0.0)
    room = part * (high - low) or abs(high) * part or 1.0
    if not zero or low == high:
        return [low - room, high + room]
    return [low - room if low < 0 else low, high + room if high > 0 else high]


def decades(domain: Sequence[float]) -> list[float]:
    """Powers of ten within a range, thinned to at most seven."""
    low, high = (math.log10(x) for x in domain)
    exponents = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    return [10.0**e for e in exponents[:: 1 + len(exponents) // 8]]


def eta_axis(domain: Sequence[float], *, title: str | None = "learning rate") -> alt.X:
    """A logarithmic axis of learning rates with powers of ten as labels."""
    ticks = decades(domain)
    return alt.X(
        "eta:Q",
        scale=alt.Scale(type="log", domain=list(domain), nice=False),
        axis=alt.Axis(
            values=ticks,
            grid=False,
            title=title,
            labels=title is not None,
            labelExpr="datum.value < 1e-3 ? '1e' + round(log(datum.value) / LN10) : '' + datum.value",
            labelFlush=False,
        ),
    )


def intervals(
    rows: Sequence[Row],
    x: alt.X | alt.Y,
    *,
    low: str,
    high: str,
    colour: str,
    across: bool = False,
    width: float = 1.8,
) -> Chart:
    """Lines from `low` to `high`, of the rows that have them; `across`: they run along x."""
    known = inline(row for row in rows if row[low] is not None)
    mark = alt.Chart(known).mark_rule(color=BY_NAME[colour], strokeWidth=width)
    if across:
        return mark.encode(y=x, x=f"{low}:Q", x2=f"{high}:Q")
    return mark.encode(x=x, y=f"{low}:Q", y2=f"{high}:Q")


def zero_line(*, across: bool = False) -> Chart:
    """Where nothing changes; `across`: on an axis of values that runs along x."""
    mark = alt.Chart(inline([{"zero": 0}])).mark_rule(color=BY_NAME["muted"])
    return mark.encode(x="zero:Q") if across else mark.encode(y="zero:Q")


def haloed(chart: Chart, **mark: Any) -> Chart:
    """The text of a chart, readable where it lies on lines; `chart` encodes text and place."""
    behind = chart.mark_text(stroke=BY_NAME["page"], strokeWidth=5, strokeJoin="round", **mark)
    return alt.layer(behind, chart.mark_text(**mark))


def heading(text: str) -> alt.TitleParams:
    """What a panel shows, above its left edge; that is read from the side less easily."""
    return alt.TitleParams(text, fontSize=TEXT, anchor="start", frame="bounds", offset=6)


def inline(rows: Iterable[Row]) -> alt.InlineData:
    """Rows as the data of a chart: as text, which Altair does not copy value by value."""
    text = json.dumps([dict(row) for row in rows], allow_nan=False)
    return alt.InlineData(values=text, format=alt.JsonDataFormat(type="json"))


def grammar(chart: Chart) -> dict[str, Any]:
    """The chart as Vega-Lite, with its data as rows; tests hold every figure to the schema."""
    found: dict[str, Any] = chart.to_dict(validate=False)
    found["datasets"] = {name: json.loads(text) for name, text in found["datasets"].items()}
    return found
