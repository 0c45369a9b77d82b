"""The sanity checks of a run: those that take passes over E stored, the others in every run."""

import json
from pathlib import Path

import torch

import funcprobe
from funcprobe import checks, sampler_checks
from funcprobe.checks import Check
from funcprobe.policy.forward import Forward
from funcprobe.policy.layout import response_mask, select
from funcprobe.policy.reference import LAST_FACTOR
from funcprobe.types import Batch, InputError, TokenStats

from .. import store
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed, resumable
from ..store import Stages
from .batches import Batches
from .first_order import Predicted
from .like import like_stats
from .plan import Plan
from .sweep import state_inputs

FEW = 32  # sequences of E in the checks that take passes
FEWEST = 4  # in the one that is made in every run


def check(found: Predicted, stages: Stages, narrator: Narrator) -> list[Check]:
    """The sanity checks, on the run's batches.

    What depends on the policy, E and v alone is stored: the adapter's effect, the alpha trick, the
    change at eta = 0, the precision of every module. Arithmetic on results at hand is repeated, and so
    is what is about this process: whether a second forward of FEWEST sequences is the same.
    """
    plan, batches, prediction = found.plan, found.batches, found.prediction
    moves = batches.update.moves
    if not moves:
        why = "every advantage is 0" if plan.loss is None else "the loss has no gradient on U"
        narrator.say(f"{why}: the checks of the gradient Y are left out")
    with narrator.phase("sanity checks") as stage:
        of_model, of_derivatives, at_zero = _stored(found, stages, stage)
        return [
            *of_model,
            checks.gradients_reach("X", prediction.X),
            *([checks.gradients_reach("Y", prediction.Y)] if moves else []),
            checks.routes_agree(prediction, plan.forward),
            *of_derivatives,
            *(_of_the_state(found) if moves else []),
            *at_zero,
            _repeated(plan, batches.eval_batch, counted(plan.forward, stage, "E")),
            *_samplers(plan, batches, prediction, stages, stage),
        ]


def stored_checks(path: Path) -> list[list[Check]]:
    """The checks in a file of the stage; InputError if it has none."""
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        found = [[Check(**one) for one in group] for group in groups]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"no checks ({error})") from error
    typed = all(
        type(value) is (bool if field in {"passed", "advisory"} else str)
        for group in found
        for one in group
        for field, value in one._asdict().items()
    )
    if not typed or [len(group) for group in found[1:]] != [1, 1]:
        raise InputError("other checks")
    return found


def versions_of(model: torch.nn.Module) -> dict[str, int]:
    """PyTorch's count of in-place changes, of every tensor."""
    return {n: t._version for n, t in (*model.named_parameters(), *model.named_buffers())}


def untouched(before: dict[str, int], model: torch.nn.Module) -> Check:
    """Whether no parameter or buffer was written to in this process since `before`."""
    after = versions_of(model)
    changed = sum(before[n] != after.get(n) for n in before)
    return Check(
        "the model's weights are untouched",
        changed == 0 and before.keys() == after.keys(),
        f"{changed} of {len(before)} parameters and buffers modified",
        "0",
        "a module that modifies its own buffers in the forward",
    )


def _stored(found: Predicted, stages: Stages, stage: Stage) -> list[list[Check]]:
    """Of the model's forward, of its derivatives, of the change at eta = 0."""
    plan, batches = found.plan, found.batches
    inputs = {
        **state_inputs(plan, batches),
        "direction": found.prediction.direction.total,
        "entropy": plan.entropy,
        "fields": Check._fields,
    }

    def write(path: Path) -> None:
        made = _by_passes(found, counted(plan.forward, own, "E"))
        store.write_json([[one._asdict() for one in group] for group in made], path)

    with resumable(stages, "checks", inputs, stage) as own:
        return stages.file("checks", inputs, "json", write, stored_checks, stage.found)


def _by_passes(found: Predicted, forward: Forward) -> list[list[Check]]:
    plan, v = found.plan, found.prediction.direction.total
    params, max_tokens = plan.policy.params, plan.max_tokens
    part, sampler_logp_NR = _few(found.batches)
    stats = funcprobe.token_stats(params, part, forward, max_tokens)
    plain64 = forward.coarsest == torch.float64 and plan.config.policy.mode == "lora"
    has_adapter = any(LAST_FACTOR.search(name) for name in params)
    of_model = [
        *([checks.float64_throughout(plan.policy.model, part)] if plain64 else []),
        *(
            [checks.adapter_changes_logits(params, part, stats, forward, max_tokens)]
            if has_adapter
            else []
        ),
    ]
    at_zero = checks.eta_zero(
        params,
        part,
        v,
        stats,
        forward,
        entropy=plan.entropy._replace(baseline="auto"),  # ridge may need more prompts
        max_tokens=max_tokens,
        sampler_logp_NR=sampler_logp_NR,
    )
    return [of_model, [checks.alpha_cases(params, part, v, forward, max_tokens)], [at_zero]]


def _few(batches: Batches) -> tuple[Batch, torch.Tensor | None]:
    """E's first sequences, and the sampler's log-probabilities of them, if E has them."""
    few = torch.arange(min(FEW, len(batches.eval_batch.prompt_N)))
    part, logp_NR = select(batches.eval_batch, few), batches.sampler_logp_NR
    return part, None if logp_NR is None else logp_NR[few, : response_mask(part).shape[1]]


def _repeated(plan: Plan, E: Batch, forward: Forward) -> Check:
    part, params = select(E, torch.arange(min(FEWEST, len(E.prompt_N)))), plan.policy.params
    stats = funcprobe.token_stats(params, part, forward, plan.max_tokens)
    return checks.repeat_is_identical(params, part, stats, forward, plan.max_tokens)


def _of_the_state(found: Predicted) -> list[Check]:
    """Checks of the optimizer's state against the gradient; none if the rule reads no state."""
    if found.evidence is None:
        return []
    prediction, state = found.prediction, found.plan.adam_state
    scale = funcprobe.gradient_scale(prediction.Y, state, prediction.direction.clip_coefficient)
    return [checks.state_fits(found.evidence), checks.gradient_in_proportion(scale)]


def _samplers(
    plan: Plan, batches: Batches, prediction: funcprobe.Prediction, stages: Stages, stage: Stage
) -> list[Check]:
    """Whether all of E, and a supplied U, have the distributions that are assumed of them."""
    E, stats, logp_NR = batches.eval_batch, prediction.stats, batches.sampler_logp_NR
    part, few_logp_NR = _few(batches)
    seen = []
    if logp_NR is None or few_logp_NR is None:
        seen = [sampler_checks.sampled_from_policy(E, stats)]
    else:
        own = sampler_checks.sampler_logp_is_its_own(E, stats, logp_NR)
        if not own.passed and plan.temperature != 1:
            raw = _at_temperature_1(plan, batches, part, stages, stage)
            count, width = few_logp_NR.shape
            few = TokenStats(*(x_NR[:count, :width] for x_NR in stats))
            own = sampler_checks.explained_by_temperature(own, part, few, raw, few_logp_NR)
        seen = [sampler_checks.sampler_near_policy(E, stats, logp_NR), own]
    if _is_own_sample(plan, batches):
        seen.append(
            sampler_checks.sampled_from_policy(batches.update.batch, prediction.update_stats, "U")
        )
    return seen


def _at_temperature_1(
    plan: Plan, batches: Batches, part: Batch, stages: Stages, stage: Stage
) -> TokenStats:
    params = plan.policy.params

    def compute(stage: Stage) -> TokenStats:
        at_1 = funcprobe.frozen_forward(plan.policy.model, params, 1.0, "packed")
        return funcprobe.token_stats(params, part, counted(at_1, stage, "E"), plan.max_tokens)

    inputs = {**state_inputs(plan, batches), "few": FEW}
    return computed(stages, "at-temperature-1", inputs, like_stats(part), compute, stage)


def _is_own_sample(plan: Plan, batches: Batches) -> bool:
    """Whether a supplied U is said to be sampled from theta, and was passed.

    It is not if it has log-probabilities of the policy before, or tokens that no policy sampled.
    """
    found = plan.supplied_update
    if found is None or not batches.update.moves or found.old_logp is not None:
        return False
    return found.loss_mask is None or all(map(all, found.loss_mask))
