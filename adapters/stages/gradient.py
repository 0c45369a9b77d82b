"""The gradient on U, and what it shows about the optimizer's state before it is used."""

import torch

import funcprobe
from funcprobe.probe import update_gradient
from funcprobe.types import InputError, Params

from ..console import Narrator
from ..machine.cost import counted
from ..optimizer import OptimizerReport
from ..store import Stages
from .batches import Batches
from .plan import Plan

_LEAF = torch.zeros(0)


def gradient_on_U(plan: Plan, batches: Batches, stages: Stages, narrator: Narrator) -> Params:
    """Y, computed or from an earlier run. InputError if it is zero everywhere or not finite."""
    params, update = plan.policy.params, batches.update
    inputs = {
        "policy": plan.inputs["policy"],
        "max_tokens": plan.max_tokens,
        "temperature": plan.temperature,
        "coef": update.coef_NR,
        "update": update.batch,
    }
    with narrator.phase("gradient on U", len(update.batch.prompt_N)) as stage:

        def compute() -> Params:
            return update_gradient(params, update, counted(plan.forward, stage, "U"), plan.max_tokens)

        like = dict.fromkeys(params, _LEAF)
        Y: Params = stages.tensors("gradient", inputs, like, compute, stage.found)
        return Y


def verify_state(plan: Plan, Y: Params, narrator: Narrator) -> funcprobe.Evidence | None:
    """Whether Y confirms the optimizer state's names; None if the rule reads no second moments.

    Raises InputError for names by position that Y contradicts, and, unless accepted by the
    configuration, for those that it leaves open.
    """
    report = plan.optimizer
    if report is None or plan.step.rule == "sgd":
        return None
    evidence = funcprobe.state_evidence(Y, plan.adam_state)
    if not (report.positional and report.twins):
        return evidence
    if evidence.verdict == "contradicted":
        raise InputError(f"{report.path}: {_contradiction(evidence, report)}")
    found = f"{evidence.home} of {evidence.alike} parameters of equal shape fit their own moments best"
    if evidence.verdict == "confirmed":
        narrator.say(f"optimizer state confirmed by the gradients: {found}")
    elif plan.config.optimizer.accept_positional:
        narrator.say(
            f"warning: the gradients do not confirm the optimizer state's order: {found}; trusted as "
            "optimizer.accept_positional is set"
        )
    else:
        raise InputError(
            f"{report.path}: names are {report.route}, which the gradients on U neither confirm nor "
            f"contradict: {found}; use a larger U (sampling.B_U), save names with "
            "ParamNamesCallback, or set optimizer.accept_positional = true to trust the order"
        )
    return evidence


def _contradiction(evidence: funcprobe.Evidence, report: OptimizerReport) -> str:
    moved = [(name, other) for name, other in evidence.assigned.items() if name != other]
    name, other = moved[0] if moved else ("", "")
    example = f"; the gradient of {name} fits the state filed under {other}" if moved else ""
    return (
        f"names are {report.route}, but by the gradients on U another order "
        f"({evidence.likeliest}) is more than 1000 times as "
        f"likely: {evidence.home} of {evidence.alike} of equal shape fit their own moments best"
        f"{example}; save names with ParamNamesCallback, or give the state of this adapter"
    )
