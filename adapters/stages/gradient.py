"""The gradient on U, and what it shows about the optimizer's state before it is used."""

import funcprobe
from funcprobe.along import update_gradients
from funcprobe.types import InputError, Params

from ..checkpoint.padding import as_trained
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..optimizer import OptimizerReport
from ..resume import computed
from ..store import Stages
from .batches import Batches
from .like import like_gradient
from .plan import Plan


def gradients_on_U(
    plan: Plan, batches: Batches, stages: Stages, narrator: Narrator
) -> tuple[Params, ...]:
    """`funcprobe.along.update_gradients`, computed or from an earlier run; InputError as there."""
    params, update = plan.policy.params, batches.update
    inputs = {
        "policy": plan.inputs["policy"],
        **plan.cut,
        "temperature": plan.temperature,
        "coef": [update.coef_NR, update.entropy_coef_NR],
        "update": update.batch,
        "masks": [len(plan.masks), plan.config.run.seed] if plan.masks else 0,
    }
    count = (len(plan.masks) or 1) if update.moves else 1
    sequences = count * len(update.batch.prompt_N) if update.moves else 0
    with narrator.phase("gradient on U", sequences) as stage:

        def compute(stage: Stage) -> tuple[Params, ...]:
            trained = (as_trained(f, plan.policy.padding) for f in (plan.forward, *plan.masks))
            forward, *masks = (counted(f, stage, "U") for f in trained)
            return update_gradients(params, update, forward, plan.max_tokens, masks)

        like = (like_gradient(params),) * count
        return computed(stages, "gradient", inputs, like, compute, stage)


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
    if Y and not any(bool(grad.any()) for grad in Y.values()):
        found = "every advantage is 0, and so is Y"
        if plan.loss is not None:
            found = "the loss has no gradient on U, so that Y is 0"
    if evidence.verdict == "confirmed":
        narrator.say(f"optimizer state confirmed by the gradients: {found}")
    elif plan.config.optimizer.accept_positional:
        narrator.say(
            f"warning: the gradients do not confirm the optimizer state's order: {found}"
            f"{_misfiled(evidence)}; trusted as "
            "optimizer.accept_positional is set"
        )
    else:
        raise InputError(
            f"{report.path}: names are {report.route}, which the gradients on U neither confirm nor "
            f"contradict: {found}{_misfiled(evidence)}; use a larger U (sampling.B_U), save names with "
            "ParamNamesCallback, or set optimizer.accept_positional = true to trust the order"
        )
    return evidence


def _contradiction(evidence: funcprobe.Evidence, report: OptimizerReport) -> str:
    return (
        f"names are {report.route}, but by the gradients on U another order "
        f"({evidence.likeliest}) is more than 1000 times as "
        f"likely: {evidence.home} of {evidence.alike} of equal shape fit their own moments best"
        f"{_misfiled(evidence)}; save names with ParamNamesCallback, or give the state of this adapter"
    )


def _misfiled(evidence: funcprobe.Evidence) -> str:
    """An example of a parameter that another's moments fit best, for the end of a sentence."""
    moved = [(name, other) for name, other in evidence.assigned.items() if name != other]
    if not moved:
        return ""
    name, other = moved[0]
    return f"; the gradient of {name} fits the state filed under {other}"
