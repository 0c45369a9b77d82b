"""`funcprobe whatif`: rules of the next step compared on one E and U."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from funcprobe.rules import registry
from funcprobe.rules.named import BoundRule, NamedRule
from funcprobe.types import InputError

from . import store
from .config.schema import Config
from .console import Narrator
from .machine.cost import together
from .machine.precision import products
from .machine.ranks import ONE_PROCESS, World
from .report.afterwards import report_afterwards
from .results.saved import load_run, rules_file
from .results.whatif import whatif_document
from .results.whatif_sections import WhatIf
from .stages.everywhere import require_same
from .stages.first_order import Predicted, predicted
from .stages.holding import holding, run_folder
from .stages.observed import rewards_of_E
from .stages.plan import Plan
from .stages.rule_inputs import rule_inputs
from .stages.rules import Given, Rewarded, applied, linear_until, outcome, own, rewarded
from .stages.solve import require_solvable, solved
from .stages.unchanged import Sources, loaded, require_unchanged
from .store import Stages

OWN = "own"


class Question(NamedTuple):
    """What is asked, beside the configuration."""

    rules: tuple[str, ...] = ()  # none: whatif.rules of the configuration
    solve: str | None = None  # "entropy=0"
    by: str = "entropy_bonus"  # the rule whose coefficient is solved for
    eta: float | None = None  # None: the next step's learning rate
    out: Path | None = None  # None: RUN.FOLDER/RUN.NAME.whatif.json


def whatif(
    config: Config,
    question: Question,
    narrator: Narrator,
    *,
    fresh: bool = False,
    world: World = ONE_PROCESS,
) -> tuple[WhatIf, Path]:
    """The table of rules, and the file it was written to, which is whole or unchanged.

    Sampling, gradients and passes of first order that a run of the same configuration stored are not
    computed again; where its folder is there, its report is written again, with the rules. A rule of
    the default list that this run cannot have is left out with a line; one that was asked for is an
    InputError. What is wrong in the question itself is one before anything is loaded.
    """
    run = run_folder(config)
    path = question.out or rules_file(run)
    if world.first:
        store.require_place(path)
    rules = _parsed(question.rules or config.whatif.rules, narrator)
    solve = None if question.solve is None else _solve(question.solve, question.by)
    _require_eta(question.eta)
    with holding(config, narrator, world, fresh=fresh) as stages:
        document, sources = _answered(config, question, rules, solve, stages, narrator)
        if world.first:
            require_unchanged(sources, narrator)
            store.write_whole(path, partial(store.write_json, document.model_dump(mode="json")))
            here = path.absolute() == rules_file(run).absolute()
            if here and config.run.report and (run / "results.json").is_file():
                _report_again(run, narrator)
    return document, path


def _answered(
    config: Config,
    question: Question,
    rules: list[BoundRule],
    solve: tuple[float, NamedRule] | None,
    stages: Stages,
    narrator: Narrator,
) -> tuple[WhatIf, Sources]:
    asked = bool(question.rules) or "rules" in config.whatif.model_fields_set
    plan, sources = loaded(config, narrator, stages)
    require_same(config, plan.inputs, stages.world)
    eta = _eta(question.eta, plan)
    with products(config.policy.precision):
        found = predicted(plan, stages, narrator)
        needs = {need for rule in rules for need in rule.needs}
        if solve is not None:
            needs |= {*solve[1].needs}
        inputs, why = rule_inputs(found, needs, stages, narrator)
        left_out = {} if asked else _impossible(Given(found, inputs, why, None, eta), rules)
        rules = [rule for rule in rules if rule.text not in left_out]
        given = Given(found, inputs, why, _rewarded(found, stages, narrator), eta)
        for rule in rules:
            applied(given, rule)  # what is wrong is found before the passes
        outcomes = [own(given, stages, narrator)]
        there = None if solve is None else solved(given, solve[1], solve[0], stages, narrator)
        for count, rule in enumerate(rules, start=1):
            narrator.say(f"rule {count} of {len(rules)}: {rule.text}")
            outcomes.append(outcome(given, rule, stages, narrator))
    until = linear_until(found, stages)
    if there is not None:
        rules = [rule for rule in rules if rule.text != there.outcome.name]
        outcomes = [one for one in outcomes if one.name != there.outcome.name] + [there.outcome]
    bound = {rule.text: rule for rule in rules}
    if there is not None:
        bound[there.outcome.name] = there.rule
    costs = together(narrator.costs, stages.world)
    return whatif_document(given, outcomes, bound, left_out, there, until, costs), sources


def _report_again(folder: Path, narrator: Narrator) -> None:
    """The report of the run of this configuration, now with these rules; a line where it is another."""
    try:
        left_out = load_run(folder).whatif_left_out
    except InputError as error:
        left_out = str(error)
    if left_out is None:
        report_afterwards(folder, narrator)
    else:
        narrator.say(f"the report in {folder} is as it was: {left_out}")


def _parsed(texts: Sequence[str], narrator: Narrator) -> list[BoundRule]:
    """Each rule once, in the order given; the run's own stands first without being named."""
    every = [registry.rule(text) for text in texts]
    found = {rule.text: rule for rule in every}
    for text, count in Counter(rule.text for rule in every).items():
        if count > 1:
            narrator.say(f"rule {text} is given {count} times: it has one row")
    return [rule for text, rule in found.items() if text != OWN]


def _solve(text: str, by: str) -> tuple[float, NamedRule]:
    """The predicted change to reach, and the rule whose coefficient is looked for."""
    name, equals, value = text.partition("=")
    try:
        target = float(value)
    except ValueError:
        target = math.nan
    if name.strip() != "entropy" or not equals or not math.isfinite(target):
        raise InputError(
            f"--solve {text}: expected entropy=VALUE, a predicted change by the step, such as entropy=0"
        )
    rule = registry.rule(by).named
    require_solvable(rule)
    return target, rule


def _require_eta(eta: float | None) -> None:
    if eta is not None and not (eta > 0 and math.isfinite(eta)):
        raise InputError(f"--eta {eta:g}: a positive, finite learning rate is expected")


def _eta(given: float | None, plan: Plan) -> float:
    eta = plan.next_lr if given is None else given
    if not eta > 0:
        raise InputError(
            "the next step's learning rate is 0 or unknown, and so would every change be: give --eta, "
            "or set optimizer.lr"
        )
    return eta


def _impossible(given: Given, rules: Sequence[BoundRule]) -> dict[str, str]:
    """Why this run cannot have a rule, by its text."""
    reasons = {}
    for rule in rules:
        try:
            applied(given, rule)
        except InputError as error:
            reasons[rule.text] = str(error).removeprefix(f"rule {rule.text}: ")
    return reasons


def _rewarded(found: Predicted, stages: Stages, narrator: Narrator) -> Rewarded | None:
    """E[reward], or None, with a line that says why there is none."""
    try:
        return rewarded(found, rewards_of_E(found.plan, found.batches, narrator), stages, narrator)
    except InputError as error:
        narrator.say(f"no columns of the reward: {error}")
        return None
