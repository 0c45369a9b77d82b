"""What whatif.json says in words: which rule keeps the entropy, at what price, and the limits."""

from collections.abc import Mapping, Sequence

from ..stages.rules import Given
from .digits import with_half
from .quantity import StudentInterval
from .whatif_sections import ChangeSection, RuleRow

SHARED = (
    "v is recomputed whole under every rule, second moment, momentum and clip included; the "
    "coefficients of l and h are held fixed at theta, as are the divisors of J: a token that a mask "
    "drops counts in them as before",
    "intervals are over E, given U, and one step deep: another U, and many steps of a rule, may differ",
)
SELECTED = (
    "chosen by shares of the same E that measures it, so that it gains more here than on another E: "
)


def limits(given: Given, rows: Sequence[RuleRow]) -> tuple[str, ...]:
    """What the predictions rest on, of these rules."""
    found = list(SHARED)
    if chosen := [row.rule for row in rows if row.chosen_on_E]:
        found.append(SELECTED + ", ".join(chosen))
    if given.found.plan.masks:
        found.append(
            f"dropout: v of every rule is the mean over the same {len(given.found.plan.masks)} masks"
        )
    return tuple(found)


def best(others: Sequence[RuleRow]) -> RuleRow | None:
    """Of the rules under which the entropy is not known to fall, the one with the most reward.

    Where it falls under all, the one that loses the least. Without rules that change nothing, have no
    reliable measurement, or read the shares of the E that measures them; None: none is left.
    """
    possible = [
        row
        for row in others
        if row.entropy.measured_interval_given_U and row.touched.value and not row.chosen_on_E
    ]
    keeping = [row for row in possible if _high(row.entropy) >= 0]
    if keeping:
        return max(keeping, key=_price)
    return max(possible, key=lambda row: row.entropy.measured.value, default=None)


def findings(
    given: Given, rows: Sequence[RuleRow], unit: str, linear_until: float | None
) -> tuple[str, ...]:
    """The run's own rule, the rule that keeps the entropy at the least price, and disagreements."""
    own, *others = rows
    prediction, eta = given.found.prediction, given.eta
    lines = [f"The run's own rule: entropy {_shown(own.entropy)} {unit}{_reward(own)}"]
    if earlier := eta * (prediction.from_momentum + prediction.from_decay):
        lines.append(
            f"Of its predicted {own.entropy.predicted.value:+.2e}, momentum and weight decay make "
            f"{earlier:+.2e}, which a rule for this batch changes through the second moment alone"
        )
    if (row := best(others)) is not None:
        lines.append(_keeps(row, unit))
    lines.append(_agreement("entropy", {row.rule: row.entropy for row in rows}))
    if own.reward is not None:
        lines.append(_agreement("reward", {row.rule: row.reward for row in rows if row.reward}))
    if linear_until is not None and eta > linear_until:
        lines.append(
            f"eta is beyond the range of first order of the run's own step (eta = {linear_until:.2g}): "
            "rely on the measured changes"
        )
    return tuple(lines)


def _agreement(what: str, changes: Mapping[str, ChangeSection]) -> str:
    """For how many rules measured - predicted is within the interval of the measured change."""
    known = {rule: change for rule, change in changes.items() if change.agrees is not None}
    missed = [f"{rule} ({x.missed.value:+.1e})" for rule, x in known.items() if not x.agrees]
    line = (
        f"Measured - predicted change of the {what}: within the interval for "
        f"{len(known) - len(missed)} of {len(known)} rules"
    )
    if not missed:
        return line
    return f"{line}; not for {', '.join(missed)}: the step is curved at this eta, try a smaller one"


def _keeps(row: RuleRow, unit: str) -> str:
    """The rule of `best` in words."""
    if _high(row.entropy) < 0:
        verb = "loses the least entropy, as no rule here keeps it"
    elif row.entropy.measured_interval_given_U and row.entropy.measured_interval_given_U.low > 0:
        verb = "raises the entropy"
    else:
        verb = "keeps the entropy, as far as its interval goes"
    price = "" if row.reward is None else f"; price in reward: {_against(row.reward)} against own"
    return (
        f"{row.rule} {verb}: {_shown(row.entropy)} {unit}, {_against(row.entropy)} against own{price}"
    )


def _price(row: RuleRow) -> float:
    """Reward, or without one nearness of the entropy's change to 0."""
    return -abs(row.entropy.measured.value) if row.reward is None else row.reward.measured.value


def _high(change: ChangeSection) -> float:
    interval = change.measured_interval_given_U
    return interval.high if interval else float("-inf")


def _reward(row: RuleRow) -> str:
    return "" if row.reward is None else f", reward {_shown(row.reward)}"


def _shown(change: ChangeSection) -> str:
    return _with_interval(change.measured.value, change.measured_interval_given_U)


def _against(change: ChangeSection) -> str:
    return _with_interval(change.difference.value, change.difference_interval)


def _with_interval(value: float, interval: StudentInterval | None) -> str:
    if interval is None:
        return f"{value:+.2e} (not reliable: see its weights)"
    zero = " (indistinguishable from 0)" if interval.low <= 0 <= interval.high else ""
    return f"{with_half(value, interval)}{zero}"
