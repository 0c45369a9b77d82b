"""results.json and manifest.json: every number with its unit, sign convention and normalisation."""

import math
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import stats as scipy_stats

import funcprobe
from funcprobe import tree
from funcprobe.checks import Check
from funcprobe.estimators import Measured
from funcprobe.types import InputError

if TYPE_CHECKING:
    from .batches import Batches
    from .plan import Plan

PACKAGES = (
    "funcprobe",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "optree",
    "safetensors",
    "numpy",
    "scipy",
    "pyarrow",
)
ROUNDING_SHARE = 0.1  # rounding is said to take over where it reaches this share of the change
MIN_POINTS = 3  # of a straight line, so that R^2 says something


class Sweep(NamedTuple):
    """Measured changes at ascending learning rates; the rounding noise of one of them."""

    etas: tuple[float, ...]
    measured: tuple[Measured, ...]
    extra: int  # how many more were measured for the rounding noise
    rounding_noise: float | None  # None where v moves nothing


class Line(NamedTuple):
    """A straight line in log-log coordinates."""

    slope: float
    r_squared: float
    points: int


def document(
    plan: "Plan",
    batches: "Batches",
    prediction: funcprobe.Prediction,
    sweep: Sweep,
    seen: list[Check],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of results.json. Only "seconds" differs between two runs of the same seed.

    Raises InputError for a number that is not finite, with its place, and for a predicted change
    of 0, of which nothing is a multiple.
    """
    for eta in sweep.etas:
        if not eta * prediction.derivative:
            raise InputError(
                f"the change predicted at eta = {eta:g} is 0, with derivative "
                f"{prediction.derivative:g}: leave this eta out of measure.etas"
            )
    written = {
        "conventions": {
            "sign": "positive: the step raises the entropy; v is theta_next - theta per unit of lr",
            "entropy": plan.entropy._asdict(),
            "step": plan.step._asdict(),
            "objective": plan.objective._asdict(),
            "temperature": plan.temperature,
            "dtype": plan.config.policy.dtype,
            "se": "one standard error; sampling units are the draws of E (its prompts, where E is "
            "brought) and the prompts of U",
            "names": "X: gradient of the entropy estimator on E; Y: gradient of the objective on U; "
            "P: diagonal through which Y enters v; <., .>: sum over all parameters",
        },
        "counts": _counts(plan, batches, sweep),
        "entropy": quantity(prediction.entropy, entropy_unit(plan), f"per {plan.entropy.per}, over E"),
        "mean_reward": _mean_reward(batches.update_rollouts.reward),
        "first_order": _first_order(plan, prediction),
        "norms": {
            name: quantity(tree.norm(value), unit, "Euclidean norm over all tensors")
            for name, value, unit in (
                ("X", prediction.X, entropy_unit(plan)),
                ("Y", prediction.Y, "objective"),
                ("v", prediction.direction.total, "per unit of learning rate"),
            )
        },
        "clip_coefficient": prediction.direction.clip_coefficient,
        "second_moments": _second_moments(plan, prediction),
        "next_lr": quantity(plan.next_lr, "learning rate", "the next step's, as saved or configured"),
        "sweep": [
            _row(eta, measured, plan, prediction, sweep)
            for eta, measured in zip(sweep.etas, sweep.measured, strict=True)
        ],
        "fit": _fits(prediction, sweep, entropy_unit(plan)),
        "checks": [check._asdict() for check in seen],
        "seconds": dict(seconds),
    }
    _require_finite(written, "results.json")
    return written


def quantity(value: float, unit: str, normalised_by: str) -> dict[str, Any]:
    """A number with its unit and what it is normalised by."""
    return {"value": value, "unit": unit, "normalised_by": normalised_by}


def _mean_reward(rewards: list[float] | None) -> dict[str, Any] | None:
    """None where no response has a reward: of TRL's None, or a U that brings its advantages alone."""
    known = [reward for reward in rewards or [] if not math.isnan(reward)]
    return quantity(float(np.mean(known)), "reward", "responses of U that have one") if known else None


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


def versions() -> dict[str, str]:
    """Versions of the packages the numbers depend on."""
    return {name: metadata.version(name) for name in PACKAGES}


def log_log(x: list[float], y: list[float]) -> Line | None:
    """Least squares of log |y| on log x.

    None for fewer than three points, a zero among them, or values that are all equal.
    """
    if len(x) < MIN_POINTS or not all(y):
        return None
    fit = scipy_stats.linregress(np.log(x), np.log(np.abs(y)))
    if not math.isfinite(fit.rvalue):
        return None
    return Line(float(fit.slope), float(fit.rvalue) ** 2, len(x))


def _counts(plan: "Plan", batches: "Batches", sweep: Sweep) -> dict[str, Any]:
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
        "model_passes": {"over_E": 3 + len(sweep.etas) + sweep.extra, "over_U": 2},
    }


def _first_order(plan: "Plan", prediction: funcprobe.Prediction) -> dict[str, Any]:
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
    }


def _row(
    eta: float, measured: Measured, plan: "Plan", prediction: funcprobe.Prediction, sweep: Sweep
) -> dict[str, Any]:
    unit, over = entropy_unit(plan), f"per {plan.entropy.per}, over E"
    predicted = eta * prediction.derivative
    return {
        "eta": eta,
        "is_next_lr": eta == plan.next_lr,
        "predicted": quantity(predicted, unit, over),
        "se_given_U": quantity(eta * prediction.first_order.se, unit, "units of E"),
        "se_total": quantity(eta * prediction.se_total, unit, "units of E and prompts of U"),
        "measured": quantity(measured.delta, unit, over),
        "ratio": quantity(measured.delta / predicted, "1", "measured / predicted"),
        "ess": quantity(measured.ess, "sequences", "whole-response importance weights"),
        "max_weight": quantity(measured.max_weight, "1", "mean weight"),
        "clipped": quantity(measured.clipped, "sequences", "entropy.clip"),
        "rounding": _is_rounding(measured.delta, sweep.rounding_noise),
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


def _require_finite(value: Any, where: str) -> None:
    if isinstance(value, dict):
        place = f" at eta = {value['eta']:g}" if "eta" in value else ""
        for key, item in value.items():
            _require_finite(item, f"{where}{place}, {key}")
    elif isinstance(value, list):
        for item in value:
            _require_finite(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"{where}, is {value}, a finite number is expected: numbers overflow or vanish on the way, "
            "look at measure.etas, optimizer.lr, optimizer.weight_decay and sampling.temperature"
        )


def _is_rounding(delta: float, noise: float | None) -> bool:
    return noise is not None and noise > ROUNDING_SHARE * abs(delta)


def _fits(prediction: funcprobe.Prediction, sweep: Sweep, unit: str) -> dict[str, Any]:
    noise = sweep.rounding_noise
    kept = [
        (eta, m.delta)
        for eta, m in zip(sweep.etas, sweep.measured, strict=True)
        if not _is_rounding(m.delta, noise)
    ]
    curve = log_log([eta for eta, _ in kept], [delta for _, delta in kept])
    # |ratio - 1| says something where rounding is a small share of the deviation itself.
    deviations = [
        (eta, delta / (eta * prediction.derivative) - 1, delta - eta * prediction.derivative)
        for eta, delta in kept
    ]
    clear = [(eta, r) for eta, r, d in deviations if noise is None or noise < ROUNDING_SHARE * abs(d)]
    bend = log_log([eta for eta, _ in clear], [r for _, r in clear])
    floor = None
    if noise is not None:
        floor = noise / (ROUNDING_SHARE * abs(prediction.derivative))
    return {
        "measured_against_eta": _line(curve, "log |measured| on log eta; 1 is linear"),
        "deviation_against_eta": _line(bend, "log |ratio - 1| on log eta; 1 is a quadratic term"),
        "rounding_noise": None if noise is None else quantity(noise, unit, "one measured change"),
        "rounding_eta": None
        if floor is None
        else quantity(floor, "learning rate", f"rounding = {ROUNDING_SHARE:.0%} of the change"),
    }


def _line(line: Line | None, what: str) -> dict[str, Any] | None:
    return None if line is None else {"what": what, **line._asdict()}


def _git_commit() -> str | None:
    source = Path(__file__).parents[1]
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
