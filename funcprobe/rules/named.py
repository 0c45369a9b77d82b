"""Rules with a name, a source and an argument: how the argument is read, and the rule bound to it."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from ..types import InputError
from .columns import COLUMNS
from .grammar import Expression, nearest, parse, shown
from .rule import SUPPLIES, Rule

Kind: TypeAlias = Literal["none", "numbers", "condition", "number expression", "prompt index", "choice"]

LONGEST_LABEL = 40


class Range(NamedTuple):
    """Of an argument: low <= x <= high; with `open` low < x. `whole`: no fraction."""

    low: float
    high: float
    open: bool = False
    whole: bool = False

    def holds(self, x: float) -> bool:
        above = self.low < x if self.open else self.low <= x
        return above and x <= self.high and (not self.whole or x == int(x))

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isinf(self.low) and math.isinf(self.high):
            return kind
        low = f"{'above' if self.open else 'from'} {self.low:g}"
        return f"{kind} {low}" + ("" if math.isinf(self.high) else f" to {self.high:g}")


class NamedRule(NamedTuple):
    """A rule that takes its argument yet. `argument` names it, several numbers with commas between.

    `make` takes the argument's value: a tuple of the numbers, an Expression, an index, a choice, or
    None. `default` is its text if none is given; numbers that are left out have theirs. `optional`: it
    may be left out without one. `temperature`: the rule changes no coefficient; its number is the
    temperature of the log-probabilities in J.
    """

    name: str
    about: str  # in one sentence
    equation: str
    make: Callable[[Any], Rule]
    source: str = ""  # paper, trainer; none of a selection of one's own
    argument: str | None = None
    default: str | None = None
    kind: Kind = "none"
    ranges: tuple[Range, ...] = ()  # of the numbers
    choices: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # optional fields of RuleInputs
    optional: bool = False
    temperature: bool = False


class BoundRule(NamedTuple):
    """A rule with its argument: `apply` maps RuleInputs to J under the rule."""

    named: NamedRule
    argument: Any
    text: str  # which `rule` reads as this rule
    label: str  # for tables
    needs: tuple[str, ...]  # optional fields of RuleInputs; those of an expression's columns too
    temperature: float | None  # of the log-probabilities in J; None: the run's own
    apply: Rule

    @property
    def name(self) -> str:
        return self.named.name


def bind(named: NamedRule, argument: str | float | None = None) -> BoundRule:
    """A rule with its argument as text or, of one number, as the number; None: the default.

    InputError where `rule` raises it.
    """
    given = argument if argument is None or isinstance(argument, str) else repr(float(argument))
    value, text = _read(named, given)
    needs = set(named.needs)
    if isinstance(value, Expression):
        of_columns = (COLUMNS[name].needs for name in value.columns)
        needs |= {need for need in of_columns if need is not None}
    return BoundRule(
        named=named,
        argument=value,
        text=named.name if text is None else f"{named.name}:{text}",
        label=_label(named, value, text),
        needs=tuple(name for name in SUPPLIES if name in needs),
        temperature=value[0] if named.temperature else None,
        apply=named.make(value),
    )


def _label(named: NamedRule, value: Any, text: str | None) -> str:
    if named.kind == "numbers" and value is not None:
        text = ", ".join(f"{x:.4g}" for x in value)
    label = named.name.replace("_", " ") + ("" if text is None else f" {text}")
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _read(named: NamedRule, given: str | None) -> tuple[Any, str | None]:
    """The argument's value, and its text in full."""
    if named.kind == "none":
        if given is not None:
            raise InputError(f"rule {named.name} takes no argument, found {shown(given)}")
        return None, None
    text = named.default if given is None else given
    if text is None and named.optional:
        return None, None
    if text is None or text == "":
        raise InputError(
            f"rule {named.name} needs its argument: write {named.name}:{named.argument}"
            + (f", one of {', '.join(named.choices)}" if named.choices else "")
        )
    if named.kind == "numbers":
        numbers = _numbers(named, text)
        return numbers, ",".join(repr(x).removesuffix(".0") for x in numbers)
    if named.kind == "prompt index":
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InputError(f"rule {named.name}: {shown(text)} is no index of a prompt, from 0 on")
        return int(text), str(int(text))
    if named.kind == "choice":
        if text not in named.choices:
            raise InputError(
                f"rule {named.name}: unknown {named.argument} {nearest(text, named.choices)}"
            )
        return text, text
    kind: Literal["number", "condition"] = "condition" if named.kind == "condition" else "number"
    expression = parse(text, kind)
    return expression, expression.text


def _numbers(named: NamedRule, text: str) -> tuple[float, ...]:
    names = (named.argument or "").split(",")
    given = text.split(",")
    if len(given) > len(names):
        raise InputError(
            f"rule {named.name}: {len(given)} numbers, at most {len(names)} ({named.argument})"
        )
    defaults = (named.default or "").split(",")
    if len(given) < len(names):
        if len(defaults) != len(names):
            raise InputError(
                f"rule {named.name}: {len(given)} of the numbers {named.argument}, give all"
            )
        given = [*given, *defaults[len(given) :]]
    return tuple(
        _number(named, name, x, wanted)
        for name, x, wanted in zip(names, given, named.ranges, strict=True)
    )


def _number(named: NamedRule, name: str, text: str, wanted: Range) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or not wanted.holds(found):
        raise InputError(f"rule {named.name}: {name} is {shown(text.strip())}, expected {wanted}")
    return found
