"""The section of rules: what another rule would do to entropy and reward."""

import shlex
from typing import NamedTuple

from markupsafe import Markup

from ..results.saved import SavedRun
from ..results.whatif_sections import ChangeSection, RuleRow, WhatIf
from . import numbers
from .table import Cell, Column, Row, Table, table


class Rules(NamedTuple):
    """What the template of the section shows."""

    words: list[str]
    rules: Table
    about: Table
    """What each of them does."""
    left_out: Table | None
    solved: Markup | None
    limits: list[str]


def rules(run: SavedRun) -> Rules | None:
    """None where no rules were compared."""
    found = run.whatif
    if found is None:
        return None
    left_out = None
    if found.left_out:
        left_out = table(
            "Table: rules left out",
            "Rules of the default list that this run cannot have.",
            ["Rule", "Why"],
            [[one.rule, one.reason] for one in found.left_out],
        )
    about = table(
        "Table: what each rule does",
        "What each rule does, and the paper that it is from.",
        ["Rule", Column("What it does", text=True, wide=True)],
        [[row.rule, row.about] for row in found.rules],
    )
    return Rules(
        list(found.findings),
        _rules(found),
        about,
        left_out,
        _solved(found),
        list(found.limits),
    )


def comparing(run: SavedRun) -> str:
    """The command that compares rules on this run's batches."""
    return f"funcprobe whatif {shlex.quote(str(run.folder / 'config.toml'))}"


def all_trusted(found: WhatIf) -> bool:
    """Whether the importance weights of every rule are of verdict "trust"."""
    return all(row.verdict == "trust" for row in found.rules)


def _rules(found: WhatIf) -> Table:
    reward = found.reward is not None
    columns = [
        Column("Rule", text=True),
        Column("Entropy", "measured"),
        Column("Against own", "entropy"),
        *([Column("Reward", "measured"), Column("Against own", "reward")] if reward else []),
        Column("Predicted", "entropy"),
        Column("Tokens", "changed"),
        Column("Frontier", text=True),
        *([] if all_trusted(found) else [Column("Weights", text=True)]),
    ]
    next_step = ", that of the next step" if found.is_next_lr else ""
    caption = Markup(
        "One step of learning rate {}{}, under every rule, on the same E ({} responses) and U ({}). "
        "Changes of the entropy in {}; ± is half a 95 % interval over E, given U. Frontier: no other "
        "rule here has both a higher entropy and a higher reward, by point estimates. Rules marked * "
        "were chosen by shares of this E, and gain more here than on another. {}"
    ).format(
        numbers.setting(found.learning_rate.value),
        next_step,
        numbers.count(found.counts.E_sequences),
        numbers.count(found.counts.U_sequences),
        found.entropy.unit,
        "The importance weights of every rule can be trusted." if all_trusted(found) else "",
    )
    rows = []
    for i, row in enumerate(found.rules):
        weights = [] if all_trusted(found) else [row.verdict]
        rows.append(Row([*_cells(row, reward, i == 0), *weights], i == 0))
    return Table(caption, columns, rows, "Table: rules")


def _cells(row: RuleRow, reward: bool, own: bool) -> list[Cell]:
    return [
        row.rule + (" *" if row.chosen_on_E else ""),
        numbers.change(row.entropy.measured.value, row.entropy.measured_interval_given_U),
        numbers.NONE if own else _difference(row.entropy),
        *(_reward(row, own) if reward else []),
        numbers.number(row.entropy.predicted.value, signed=True),
        numbers.percent(row.touched.value),
        "yes" if row.on_frontier else "no",
    ]


def _reward(row: RuleRow, own: bool) -> list[Cell]:
    if row.reward is None:
        return [None, None]
    return [
        numbers.change(row.reward.measured.value, row.reward.measured_interval_given_U),
        numbers.NONE if own else _difference(row.reward),
    ]


def _difference(change: ChangeSection) -> Markup:
    return numbers.change(change.difference.value, change.difference_interval)


def _solved(found: WhatIf) -> Markup | None:
    one = found.solution
    if one is None:
        return None
    interval = ""
    if one.coefficient_interval is not None:
        interval = Markup(" (95 %: {} to {})").format(
            numbers.number(one.coefficient_interval.low), numbers.number(one.coefficient_interval.high)
        )
    within = {None: "", True: ", the target within its interval", False: ", not within its interval"}
    return Markup(
        "Solved for: the coefficient of {} at which the predicted change of the entropy is {} {} is "
        "{}{}; measured there, it misses the target by {} {}{}."
    ).format(
        one.rule,
        numbers.number(one.target.value, signed=True),
        one.target.unit,
        numbers.number(one.coefficient),
        interval,
        numbers.number(one.measured_missed.value, signed=True),
        one.measured_missed.unit,
        within[one.within_error],
    )
