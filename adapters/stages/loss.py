"""The coefficients that the chosen loss gives U at theta, and the reference policy it may need."""

import torch
from peft import PeftModel

import funcprobe
from funcprobe.losses.loss import LossInputs, LossReport, loss_update
from funcprobe.types import Batch, InputError, Params, Rule, TokenStats, UpdateBatch

from ..checkpoint.padding import as_trained
from ..checkpoint.reference import initial_adapter, reference_params
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..rollouts import Rollouts
from ..rollouts.loss_inputs import loss_inputs
from ..store import Stages
from .batches import Batches
from .chosen_loss import ChosenLoss
from .like import like_stats
from .plan import Plan

LARGE_RESIDUAL = 0.01  # a hundredth of a standard error, if a prompt is typical


def with_loss(plan: Plan, batches: Batches, stages: Stages, narrator: Narrator) -> Batches:
    """U with the coefficients of the chosen loss at theta, and its value there; unchanged without one.

    One forward of U at theta, and one at the reference policy where the loss needs it and the rollouts
    do not have it. InputError as `loss_update`, and if nothing is left of the step.
    """
    chosen, rollouts, batch = plan.loss, batches.update_rollouts, batches.update.batch
    if chosen is None:
        return batches
    stats = update_statistics(plan, batch, plan.policy.params, "loss on U", stages, narrator)
    inputs = loss_inputs(rollouts, batch, torch.tensor(rollouts.advantage, dtype=torch.float64))
    if plan.supplied_update is None:
        inputs = _as_called(inputs, rollouts, chosen, plan.config.run.seed)
        if inputs.sampler_logp_NR is None:  # the policy itself sampled, no server
            inputs = inputs._replace(sampler_logp_NR=stats.logp_NR)
    reference = None if inputs.ref_logp_NR is None else "column ref_logp of the rollouts"
    if chosen.reference and reference is None and not _without_reference(plan, chosen):
        found, reference = reference_params(plan.policy), _reference(plan)
        at = update_statistics(plan, batch, found, "reference policy on U", stages, narrator)
        inputs = inputs._replace(ref_logp_NR=at.logp_NR)
    loss = chosen.loss
    if plan.known_step and loss.divisor is None:  # v has no error over U: no need to derive it
        loss = loss._replace(divisor="tokens", entropy_divisor="tokens")
    # By the first of several processes: a loss of one's own may depend on anything.
    update, report = plan.world.on_first(lambda: loss_update(batch, stats, inputs, loss))
    for line in (*_lines(reference, report), *without_gradient(update, plan.step.rule)):
        narrator.say(line)
    return batches._replace(
        update=update,
        loss=report,
        loss_inputs=inputs,
        reference=reference if chosen.reference else None,
        equal_groups=groups_without_coefficients(update),
    )


def _without_reference(plan: Plan, chosen: ChosenLoss) -> bool:
    """Whether there is no reference policy, and the loss, of the user's own, may not need one."""
    own = chosen.name not in ("trl", "verl")
    return own and not isinstance(plan.policy.model, PeftModel)


def _reference(plan: Plan) -> str:
    found = initial_adapter(plan.policy)
    if found is None:
        return "the policy without its adapter"
    return f"the adapter in {'/'.join(part for part in found if part)}"


def _lines(reference: str | None, report: LossReport) -> list[str]:
    """Of the reference policy, and where the error over U rests on an approximation."""
    lines = [] if reference is None else [f"reference policy of the loss: {reference}"]
    if report.divisor_residual > LARGE_RESIDUAL:
        lines.append(
            "warning: without one prompt the loss weighs the others' tokens otherwise, by up to "
            f"{report.divisor_residual:.0%} beside a common factor: the error over U leaves it out"
        )
    return lines


def update_statistics(
    plan: Plan, batch: Batch, params: Params, phase: str, stages: Stages, narrator: Narrator
) -> TokenStats:
    """l and h of U's tokens at `params`, as in training: by a phase of this name, or stored."""
    inputs = {
        "policy": plan.inputs["policy"],
        "params": params,
        **plan.cut,
        "temperature": plan.temperature,
        "update": batch,
    }
    with narrator.phase(phase, len(batch.prompt_N)) as stage:

        def compute(stage: Stage) -> TokenStats:
            forward = counted(as_trained(plan.forward, plan.policy.padding), stage, "U")
            return funcprobe.token_stats(params, batch, forward, plan.max_tokens)

        return computed(stages, "update-stats", inputs, like_stats(batch), compute, stage)


def _as_called(inputs: LossInputs, rollouts: Rollouts, chosen: ChosenLoss, seed: int) -> LossInputs:
    """Rows in the processes and micro-batches of a step, and masks, as the trainer would have them.

    A process has consecutive prompts; its rows are shuffled into micro-batches of equal size, as by
    TRL. At the sampled policy the ratios are 1.
    """
    count, generator = len(inputs.prompt_N), torch.Generator().manual_seed(seed)
    process_N, microbatch_N = torch.zeros(2, count, dtype=torch.int64)
    for process, rows in enumerate(torch.arange(count).tensor_split(chosen.rows.world_size)):
        process_N[rows] = process
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for microbatch, part in enumerate(shuffled.tensor_split(chosen.microbatches)):
            microbatch_N[part] = microbatch
    mask_NR = inputs.mask_NR
    if chosen.rows.mask_truncated_completions:
        ended_N = torch.tensor([reason != "length" for reason in rollouts.finish_reason])
        mask_NR = mask_NR & ended_N[:, None]
    return inputs._replace(process_N=process_N, microbatch_N=microbatch_N, mask_NR=mask_NR)


def groups_without_coefficients(update: UpdateBatch) -> int:
    """Prompts of U whose coefficients are all 0, so that they add no gradient."""
    moves_N = update.coef_NR.any(1)
    if update.entropy_coef_NR is not None:
        moves_N = moves_N | update.entropy_coef_NR.any(1)
    prompt_N = update.batch.prompt_N
    return len(prompt_N.unique()) - len(prompt_N[moves_N].unique())


def without_gradient(update: UpdateBatch, rule: Rule) -> list[str]:
    """A line if the loss has no gradient on U. InputError if v is then 0: a rule without momentum."""
    if update.moves:
        return []
    found = "the loss has no gradient on U: every advantage is 0, or every token is clipped or masked"
    if rule == "adamw":
        return [f"{found}; Y = 0, and AdamW's step is by momentum and weight decay alone"]
    raise InputError(
        f'{found}, and so v is 0 by rule "{rule}": supply other rollouts, or set optimizer.rule = '
        '"adamw", whose step has momentum and weight decay as well'
    )
