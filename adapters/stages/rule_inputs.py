"""What rules read of a run's U: advantages, rewards, divisors, log-probabilities, shares."""

from collections.abc import Collection

import torch
from torch import Tensor

from funcprobe.attribution.token_shares import update_shares
from funcprobe.losses.loss import loss_gradient
from funcprobe.policy.layout import response_mask
from funcprobe.rules.rule import RuleInputs
from funcprobe.step.objective import coefficients
from funcprobe.tree import f64
from funcprobe.types import InputError, TokenStats

from ..checkpoint.reference import reference_params
from ..console import Narrator
from ..rollouts.schema import padded
from ..store import Stages
from .attribution import marginals
from .first_order import Predicted
from .loss import update_statistics


def rule_inputs(
    found: Predicted, needs: Collection[str], stages: Stages, narrator: Narrator
) -> tuple[RuleInputs, dict[str, str]]:
    """The inputs of rules on a run's U, and why those are None or NaN that are, by name.

    `needs` names the fields that some rule reads. Of these, ref_logp_NR may take a forward of U at the
    reference policy, and marginal_NR a pass over U; a run that has made them before stored them.
    """
    plan, batches = found.plan, found.batches
    update, rollouts = batches.update, batches.update_rollouts
    batch, chosen = update.batch, batches.loss_inputs
    stats, params = found.prediction.update_stats, plan.policy.params
    if not update.moves:  # U was not passed
        stats = update_statistics(plan, batch, params, "statistics of U", stages, narrator)
    mask_NR = response_mask(batch) if chosen is None else chosen.mask_NR
    old_NR, ref_NR = _logp(found)
    why = {}
    if old_NR is None and "old_logp_NR" in needs:
        why["old_logp_NR"] = (
            "U has no log-probabilities at the policy that sampled it: supply them as the column "
            "old_logp of rollouts.update"
        )
    if ref_NR is None and "ref_logp_NR" in needs:
        try:
            at = reference_params(plan.policy)
        except InputError as error:
            why["ref_logp_NR"] = str(error)
        else:
            ref_NR = update_statistics(
                plan, batch, at, "reference policy on U", stages, narrator
            ).logp_NR
    advantage_N = torch.tensor(rollouts.advantage, dtype=torch.float64)
    unit_NR = _unit(found, stats)
    if unit_NR is None:
        unit_NR = torch.full_like(update.coef_NR, torch.nan)
        why["unit_NR"] = "the loss does not depend on the advantages, and no unit of it is known"
    marginal_NR = None
    if "marginal_NR" in needs:
        with narrator.phase("attribution", len(batch.prompt_N)) as stage:
            marginal_NR = update_shares(update, marginals(found, stages, stage)).token_NR
    reward_N = rollouts.reward
    return RuleInputs(
        update=update,
        stats=TokenStats(f64(stats.logp_NR), f64(stats.entropy_NR)),
        mask_NR=mask_NR,
        advantage_NR=torch.where(mask_NR, advantage_N[:, None], 0.0),
        unit_NR=unit_NR,
        reward_N=None if reward_N is None else torch.tensor(reward_N, dtype=torch.float64),
        old_logp_NR=old_NR,
        ref_logp_NR=ref_NR,
        share_NR=update_shares(update, found.passes.along_PX).token_NR,
        marginal_NR=marginal_NR,
    ), why


def _logp(found: Predicted) -> tuple[Tensor | None, Tensor | None]:
    """Of the policy of the ratios and of the reference policy: of the loss, or columns of rollouts."""
    rollouts, batch = found.batches.update_rollouts, found.batches.update.batch
    chosen = found.batches.loss_inputs
    if chosen is not None:
        return chosen.old_logp_NR, chosen.ref_logp_NR
    columns = (rollouts.old_logp, rollouts.ref_logp)
    old_NR, ref_NR = (None if column is None else padded(column, batch) for column in columns)
    return old_NR, ref_NR


def _unit(found: Predicted, stats: TokenStats) -> Tensor | None:
    """What a token of advantage 1 counts in J where every ratio is 1; None if that is nowhere known.

    Of a loss it is the difference that the advantage 1 makes to its coefficients, beside the advantage
    0, by which terms without advantages are left out.
    """
    plan, batch, chosen = found.plan, found.batches.update.batch, found.batches.loss_inputs
    ones_N = torch.ones(len(batch.prompt_N), dtype=torch.float64)
    if plan.loss is None or chosen is None:
        objective = plan.objective
        return coefficients(
            ones_N,
            batch.response_length_N,
            batch.prompt_N,
            objective.normalisation,
            objective.constant,
        )
    logp_NR, entropy_NR, function = f64(stats.logp_NR), f64(stats.entropy_NR), plan.loss.loss.function
    at_theta = chosen._replace(old_logp_NR=None, sampler_logp_NR=None)

    def gradient(advantage_N: Tensor) -> Tensor:
        given = at_theta._replace(advantage_N=advantage_N)
        return loss_gradient(function, logp_NR, entropy_NR, given)[1]

    unit_NR = gradient(0 * ones_N) - gradient(ones_N)  # of the loss, -J
    return unit_NR if bool(unit_NR.isfinite().all() and unit_NR.any()) else None
