"""From the configuration and the checkpoint to Adam's state and the rule of the step."""

import json
from pathlib import Path

from funcprobe import adam
from funcprobe.types import AdamGroup, AdamState, InputError, Step

from .config import Config
from .model import Policy
from .optimizer import AdamOverrides, OptimizerReport, read_adam_state
from .optimizer_file import find_optimizer_file


def load_step(config: Config, policy: Policy) -> tuple[AdamState, OptimizerReport | None, Step]:
    """Adam's state, how it was read, and the rule; InputError where they do not make a step.

    Below `min_coverage`, with on_low_coverage = "identity", the rule becomes "sgd".
    """
    chosen = config.optimizer
    step = Step(chosen.rule, chosen.max_grad_norm or None, chosen.max_scale or None)
    if chosen.rule == "sgd":
        group = AdamGroup(tuple(policy.params), chosen.lr or 0.0, 0.9, 0.999, 1e-8, 0.0)
        return AdamState({}, {}, {}, (group,)), None, step
    path = Path(chosen.state).expanduser() if chosen.state else None
    path = path or find_optimizer_file(Path(config.policy.checkpoint).expanduser())
    beta1, beta2 = chosen.betas or (None, None)
    adam_state, report = read_adam_state(
        path,
        policy.model,
        policy.params,
        overrides=AdamOverrides(
            chosen.lr, beta1, beta2, chosen.eps, chosen.weight_decay, chosen.checkpoint_step
        ),
        min_coverage=chosen.min_coverage,
        allow_low_coverage=chosen.on_low_coverage == "identity",
    )
    covered = min(report.coverage["exp_avg"], report.coverage["exp_avg_sq"])
    if covered < chosen.min_coverage * report.parameters:
        step = step._replace(rule="sgd")
    adam.require_state(policy.params, adam_state, step.rule)
    return adam_state, report, step


def step_lines(
    config: Config, adam_state: AdamState, report: OptimizerReport | None, step: Step
) -> list[str]:
    """What the reader is told of the optimizer's state, warnings included."""
    if report is None:
        return ['optimizer: rule "sgd", no state is read']
    covered = ", ".join(f"{what} {count}" for what, count in report.coverage.items())
    lines = [
        f"optimizer {report.path.name}: {report.format}, names {report.route}; of {report.parameters} "
        f"parameters have {covered}",
        *report.notes,
    ]
    if step.rule == "sgd":
        lines.append("warning: coverage is low and on_low_coverage is identity: v is the raw gradient")
    return [*lines, *_other_checkpoint(config, adam_state)]


def _other_checkpoint(config: Config, adam_state: AdamState) -> list[str]:
    """A state of another checkpoint has the right shapes; only the count of its steps can tell."""
    file = Path(config.policy.checkpoint).expanduser() / "trainer_state.json"
    if not adam_state.step or not file.is_file():
        return []
    try:
        trained = json.loads(file.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} has no global_step ({error}): mend or delete it") from error
    taken = max(adam_state.step.values())
    if taken == trained:
        return []
    return [
        f"warning: the optimizer state has taken {taken} steps and {file} says {trained}: is it of "
        "another checkpoint? The prediction would be of a step nobody takes"
    ]
