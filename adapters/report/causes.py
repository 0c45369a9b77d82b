"""The section of causes: parts of the step, modules, prompts, momentum, as tables and sentences."""

import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from ..results.attribution_sections import AttributionSection, GroupShare, PromptOfU, Share
from ..results.attribution_words import beyond_shares
from ..results.attribution_words import causes as in_words
from ..results.influence_sections import InfluenceSection
from ..results.momentum_sections import MomentumSection
from ..results.saved import SavedRun
from . import numbers
from .table import Cell, Column, Table, table

PARTS = ("attribution", "tokens", "momentum", "influence")


class Causes(NamedTuple):
    """What the template of the section shows."""

    words: list[str]
    """The largest causes, and what the shares leave out."""
    modules: list[Table]
    prompts: list[Table]
    momentum: list[Table]
    missing: dict[str, Markup | str]
    """One of PARTS -> what the run lacks of it, and how to get that; empty: nothing."""


class Scale(NamedTuple):
    """From shares to changes: the learning rate of the next step, or 1 where it is not known."""

    eta: float
    unit: str

    def amount(self, share: float) -> Markup:
        return numbers.number(self.eta * share, signed=True)

    def share(self, share: Share) -> Markup:
        if share.interval is None:
            return self.amount(share.share)
        low, high = self.eta * share.interval.low, self.eta * share.interval.high
        scaled = share.interval.model_copy(update={"low": low, "high": high})
        return numbers.change(self.eta * share.share, scaled)


def causes(run: SavedRun) -> Causes:
    """Who makes the predicted change."""
    results, section = run.results, run.results.attribution
    if section is None:
        return Causes(in_words(results), [], [], _momentum(run, None), _missing(run))
    scale = scale_of(run, section.unit)
    return Causes(
        [*in_words(results), *beyond_shares(results)],
        _modules(section, scale),
        [*_prompts(section, scale), *_influence(results.influence, scale)],
        _momentum(run, scale),
        _missing(run),
    )


def scale_of(run: SavedRun, unit: str) -> Scale:
    """`unit`: of shares, where the learning rate is not known."""
    results = run.results
    eta = results.next_lr.value
    return Scale(eta, results.entropy.unit) if eta else Scale(1.0, unit)


def again(run: SavedRun, setting: str) -> str:
    """The command that repeats the run with one more setting."""
    config = shlex.quote(str(run.folder / "config.toml"))
    return f"funcprobe run {config} --set {shlex.quote(setting)}"


def _missing(run: SavedRun) -> dict[str, Markup | str]:
    results = run.results
    found: dict[str, Markup | str] = dict.fromkeys(PARTS, "")
    if results.attribution is None:
        found["attribution"] = Markup(
            "This run has no attribution: which prompts and modules make the change is not known. "
            "<code>{}</code> adds it, by one more pass over U."
        ).format(again(run, "attribution.level=tokens"))
    elif run.table("tokens") is None:
        found["tokens"] = Markup(
            "Shares of single tokens are not in this run. <code>{}</code> adds them."
        ).format(again(run, "attribution.level=tokens"))
    if results.momentum is None and results.first_order.from_momentum.value:
        found["momentum"] = Markup(
            "Which earlier steps the momentum is from is not known: their gradients are not recorded. "
            "<code>record_rollouts</code> with <code>gradients=K</code> records them while the trainer "
            "runs; <code>attribution.earlier_checkpoint</code> splits the momentum at a checkpoint."
        )
    if results.attribution is not None and results.influence is None:
        found["influence"] = Markup(
            "On which prompts of E the largest prompts of U act is not computed. <code>{}</code> "
            "computes it for three, by a pass over E each."
        ).format(again(run, "attribution.influence=3"))
    return found


def _modules(section: AttributionSection, scale: Scale) -> list[Table]:
    of = {
        "layer": section.layers,
        "projection": section.projections,
        "factor of LoRA": section.factors,
        "module (the ten largest)": section.modules,
    }
    return [_groups(name, groups, scale) for name, groups in of.items() if groups]


def _groups(name: str, groups: Sequence[GroupShare], scale: Scale) -> Table:
    rows = [
        [
            g.name,
            scale.share(g.total),
            scale.share(g.update),
            scale.amount(g.momentum),
            scale.amount(g.decay),
        ]
        for g in groups
    ]
    return table(
        f"Table: shares by {name}",
        f"Predicted change, {scale.unit}, by {name}; ± is half a 95 % interval over E, given U.",
        [
            _title(name),
            *map(Column, ("All", "This batch", "Momentum", "Weight decay")),
        ],
        rows,
    )


def _title(name: str) -> str:
    words = name.split(" (", maxsplit=1)[0]
    return words[:1].upper() + words[1:]


def _prompts(section: AttributionSection, scale: Scale) -> Iterable[Table]:
    if section.U_prompts:
        later = any(prompt.later is not None for prompt in section.U_prompts)
        yield table(
            "Table: the largest prompts of U",
            f"The {len(section.U_prompts)} prompts of U with the largest shares, {scale.unit}. Share: "
            "with the second moment held fixed; they sum to this batch's part. Marginal: derivative in "
            "the prompt's weight, through the second moment as well.",
            [
                "Prompt",
                "Text",
                Column("Share"),
                Column("Marginal"),
                *([Column("Later", "through momentum")] if later else []),
                Column("Rewards", "mean"),
                Column("Right"),
                Column("Advantages", text=True),
                Column("Tokens"),
            ],
            [_prompt(prompt, scale, later) for prompt in section.U_prompts],
        )
    if section.E_prompts:
        yield table(
            "Table: the prompts of E where the entropy changes most",
            f"The {len(section.E_prompts)} prompts of E with the largest shares, {scale.unit}: where "
            "the entropy changes. ± is half a 95 % interval over E, as wide as the share itself for a "
            "prompt that was drawn once.",
            ["Prompt", "Text", Column("Share"), Column("Responses"), Column("Tokens")],
            [
                [
                    str(p.prompt_index),
                    p.text,
                    scale.share(p.total),
                    numbers.count(p.responses),
                    numbers.count(p.tokens),
                ]
                for p in section.E_prompts
            ],
        )


def _prompt(prompt: PromptOfU, scale: Scale, later: bool) -> list[Cell]:
    right = None if prompt.right is None else f"{prompt.right} of {prompt.responses}"
    low, high = prompt.advantage_low, prompt.advantage_high
    advantages = None
    if low is not None and high is not None:
        advantages = Markup("{} to {}").format(
            numbers.number(low, 2, signed=True), numbers.number(high, 2, signed=True)
        )
    return [
        str(prompt.prompt_index),
        prompt.text,
        scale.amount(prompt.share),
        scale.amount(prompt.marginal),
        *([None if prompt.later is None else scale.amount(prompt.later)] if later else []),
        numbers.number(prompt.mean_reward),
        right,
        advantages,
        numbers.count(prompt.tokens),
    ]


def _influence(section: InfluenceSection | None, scale: Scale) -> Iterable[Table]:
    if section is None:
        return
    yield table(
        "Table: prompts of U with their intervals",
        f"Predicted change, {scale.unit}, by a prompt of U; ± is half a 95 % interval over E, given U.",
        ["Prompt of U", "Text", Column("Share"), Column("At least half of it in", text=True)],
        [[str(p.prompt_index), p.text, scale.share(p.share), p.region] for p in section.prompts],
    )
    yield table(
        "Table: pairs of prompts",
        f"The {len(section.pairs)} pairs that matter most: predicted change, {scale.unit}, that a "
        "prompt of U makes through the responses to a prompt of E.",
        ["Prompt of U", "Text", "Prompt of E", "Its text", Column("Influence")],
        [
            [str(p.U_prompt), p.U_text, str(p.E_prompt), p.E_text, scale.amount(p.influence)]
            for p in section.pairs
        ],
    )


def _momentum(run: SavedRun, scale: Scale | None) -> list[Table]:
    section = run.results.momentum
    if section is None:
        return []
    scale = scale or scale_of(run, section.unit)
    return [*_by_step(section, scale), *_by_prompt(section, scale)]


def _by_step(section: MomentumSection, scale: Scale) -> Iterable[Table]:
    rows: list[list[Cell]] = [
        [
            str(one.step),
            numbers.count(one.steps_ago),
            scale.amount(one.share),
            None if one.fraction is None else numbers.percent(one.fraction),
        ]
        for one in section.by_step
    ]
    if rows and section.before is not None:
        rows.append(["before them", None, scale.amount(section.before), None])
    if rows:
        yield table(
            "Table: momentum by step",
            f"Momentum's part of the predicted change, {scale.unit}, by the step whose gradient it is.",
            ["Step", Column("Steps ago"), Column("Share"), Column("Of momentum")],
            rows,
        )
    if section.earlier is not None:
        yield table(
            "Table: momentum before and since a checkpoint",
            f"Momentum's part of the predicted change, {scale.unit}, split at step "
            f"{section.earlier.step}.",
            ["Gradients", Column("Share")],
            [
                ["before", scale.amount(section.earlier.before)],
                ["since", scale.amount(section.earlier.since)],
            ],
        )


def _by_prompt(section: MomentumSection, scale: Scale) -> Iterable[Table]:
    for step in section.by_prompt:
        yield table(
            f"Table: momentum of step {step.step} by prompt",
            f"The largest prompts of step {step.step} in momentum, {scale.unit}; the gradient is "
            "recomputed at the parameters before it.",
            ["Prompt", "Text", Column("Responses"), Column("Share")],
            [
                [str(p.prompt_index), p.text, numbers.count(p.responses), scale.amount(p.share)]
                for p in step.prompts
            ],
        )
