"""results.json and manifest.json: every number with its unit, sign convention and normalisation."""

import math
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import funcprobe
from funcprobe import tree
from funcprobe.checks import Check
from funcprobe.statistics.estimators import entropy_influence
from funcprobe.statistics.intervals import Error, delta_error
from funcprobe.types import InputError

from .. import store
from ..machine import cost
from ..machine.cost import Cost
from ..machine.versions import versions
from .sweep import Errors, errors_of, fits, interval, quantity, rows, second_order

if TYPE_CHECKING:
    from ..stages.batches import Batches
    from ..stages.plan import Plan
    from ..stages.sweep import Sweep


def document(
    plan: "Plan",
    batches: "Batches",
    prediction: funcprobe.Prediction,
    unit_N: torch.Tensor,
    sweep: "Sweep",
    seen: list[Check],
    costs: dict[str, Cost],
) -> dict[str, Any]:
    """The content of results.json. Only "cost" differs between two runs of the same seed.

    Raises InputError for a number that is not finite, with its place, and for a predicted change
    of 0, of which nothing is a multiple.
    """
    for point in sweep.points:
        if not prediction.derivative:
            raise InputError(
                "the derivative of the entropy along v is 0, so there is nothing to compare with: look "
                "whether the learning rates are 0, and whether v moves any response of E"
            )
        if not point.eta * prediction.derivative:
            raise InputError(
                f"the change predicted at eta = {point.eta:g} is 0, with derivative "
                f"{prediction.derivative:g}: leave this eta out of measure.etas"
            )
    errors = errors_of(prediction, unit_N, batches.update.batch.prompt_N)
    written = {
        "conventions": {
            "sign": "positive: the step raises the entropy; v is theta_next - theta per unit of lr",
            "entropy": plan.entropy._asdict(),
            "step": plan.step._asdict(),
            "objective": plan.objective._asdict(),
            "temperature": plan.temperature,
            "dtype": plan.config.policy.dtype,
            "precision": plan.config.policy.precision or "as dtype",
            "max_tokens": plan.max_tokens,
            "se": "one standard error; sampling units are the draws of E (its prompts, where E is "
            "brought) and the prompts of U",
            "interval": "95 %, Student's t; degrees of freedom by Welch-Satterthwaite for the total",
            "names": "X: gradient of the entropy estimator on E; Y: gradient of the objective on U; "
            "P: diagonal through which Y enters v; <., .>: sum over all parameters",
        },
        "counts": _counts(plan, batches),
        "entropy": quantity(prediction.entropy, entropy_unit(plan), f"per {plan.entropy.per}, over E"),
        "entropy_interval": interval(prediction.entropy, _entropy_error(prediction, unit_N)),
        "mean_reward": _mean_reward(batches.update_rollouts.reward),
        "first_order": _first_order(plan, prediction, errors),
        "second_order": second_order(prediction, sweep, entropy_unit(plan)),
        "norms": {
            name: quantity(tree.norm(value), unit, "Euclidean norm over all tensors")
            for name, value, unit in (
                ("X", prediction.X, f"{entropy_unit(plan)} per unit of parameter"),
                ("Y", prediction.Y, "objective per unit of parameter"),
                ("v", prediction.direction.total, "per unit of learning rate"),
            )
        },
        "clip_coefficient": prediction.direction.clip_coefficient,
        "second_moments": _second_moments(plan, prediction),
        "next_lr": quantity(plan.next_lr, "learning rate", "the next step's, as saved or configured"),
        "sweep": rows(prediction, unit_N, sweep, errors, entropy_unit(plan), plan.next_lr),
        "fit": fits(prediction, sweep, entropy_unit(plan)),
        "checks": [check._asdict() for check in seen],
        "cost": cost.document(costs.values(), _sizes(batches)),
    }
    store.require_finite(written, "results.json")
    return written


def _mean_reward(rewards: list[float] | None) -> dict[str, Any] | None:
    """None where no response has a reward: of TRL's None, or a U that brings its advantages alone."""
    known = [reward for reward in rewards or [] if not math.isnan(reward)]
    return quantity(float(np.mean(known)), "reward", "responses of U that have one") if known else None


def _entropy_error(prediction: funcprobe.Prediction, unit_N: torch.Tensor) -> Error:
    """Of H(theta) on E, over E's sampling units."""
    at = prediction.at
    influence_N = entropy_influence(at.stats, at.mask_NR, at.entropy, at.log_ratio_NR)
    return delta_error(influence_N, unit_N)


def entropy_unit(plan: "Plan") -> str:
    """nats per token or nats per sequence."""
    return f"nats per {plan.entropy.per}"


def manifest(plan: "Plan") -> dict[str, Any]:
    """What the run was made with: versions, seed, device, git commit, hashes of the input files."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": plan.config.run.seed,
        "device": str(next(iter(plan.policy.params.values())).device),
        "torch_threads": torch.get_num_threads(),
        "git": _git_commit(),
        "optimizer": plan.optimizer.document() if plan.optimizer else None,
        "inputs": plan.inputs,
    }


def _sizes(batches: "Batches") -> dict[str, int]:
    """Sequences of what passes go over; those sampled at theta + eta v are as many as E's."""
    count = len(batches.eval_batch.prompt_N)
    return {"E": count, "fresh": count, "U": len(batches.update.batch.prompt_N)}


def _counts(plan: "Plan", batches: "Batches") -> dict[str, Any]:
    update_batch = batches.update.batch
    return {
        "E_sequences": len(batches.eval_batch.prompt_N),
        "E_prompts": len(batches.eval_batch.prompt_N.unique()),
        "E_tokens": int(batches.eval_batch.response_length_N.sum()),
        "U_sequences": len(update_batch.prompt_N),
        "U_prompts": len(update_batch.prompt_N.unique()),
        "U_tokens": int(update_batch.response_length_N.sum()),
        "U_groups_without_gradient": batches.equal_groups,
        "trainable_parameters": sum(t.numel() for t in plan.policy.params.values()),
    }


def _first_order(plan: "Plan", prediction: funcprobe.Prediction, errors: Errors) -> dict[str, Any]:
    rate = f"{entropy_unit(plan)} per unit of learning rate"
    over, first = f"per {plan.entropy.per}, over E", prediction.first_order
    return {
        "derivative": quantity(prediction.derivative, rate, over),
        "bars_dot": quantity(prediction.bars_dot, rate, f"{over}, <X, v>"),
        "bars_dot_identity": quantity(prediction.bars_dot_identity, rate, f"{over}, <X, Y>"),
        "from_update": quantity(prediction.from_update, rate, f"{over}, <X, P Y>"),
        "from_momentum": quantity(prediction.from_momentum, rate, f"{over}, <X, v_momentum>"),
        "from_weight_decay": quantity(prediction.from_decay, rate, f"{over}, <X, v_decay>"),
        "se_given_U": quantity(first.se, rate, "units of E, delta method"),
        "se_given_U_jackknife": quantity(first.se_jackknife, rate, "units of E, delete one"),
        "se_over_U": quantity(prediction.se_over_u, rate, "prompts of U, P fixed"),
        "se_total": quantity(prediction.se_total, rate, "root of the sum of squares"),
        "interval_given_U": interval(prediction.derivative, errors.given_U),
        "interval_over_U": interval(prediction.derivative, errors.over_U),
        "interval_total": interval(prediction.derivative, errors.total),
    }


def _second_moments(plan: "Plan", prediction: funcprobe.Prediction) -> dict[str, Any] | None:
    """What the saved second moments do to a gradient."""
    if not plan.adam_state.exp_avg_sq:
        return None
    # The cap is of the rule "precondition" alone.
    cap = plan.step.max_scale if plan.step.rule == "precondition" else None
    _, info = funcprobe.preconditioner(plan.policy.params, plan.adam_state, cap)
    zero = sum(int((v == 0).sum()) for v in prediction.direction.total.values())
    return {
        **info._asdict(),
        "zero_outputs": zero,
        "healthy": "coverage near 1, max_scale up to 100; over 1000 is suspect",
    }


def _git_commit() -> str | None:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():  # installed, perhaps inside a repository of something else
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
