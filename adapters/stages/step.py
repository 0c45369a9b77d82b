"""Objective, Adam's state and rule of the step, from the configuration and the checkpoint."""

from pathlib import Path

from funcprobe.step import adam
from funcprobe.step.objective import PRESETS, Objective
from funcprobe.types import AdamGroup, AdamState, InputError, Step

from ..checkpoint.model import Policy
from ..checkpoint.trainer_state import FILE, trained_steps
from ..config.schema import Config
from ..machine.home import expanded
from ..optimizer import AdamOverrides, OptimizerReport, Sidecar, find_state, read_adam_state
from ..rollouts import Rollouts
from .differences import differences

DEFAULT_MAX_GRAD_NORM = 1.0  # transformers.TrainingArguments'


def load_step(config: Config, policy: Policy) -> tuple[AdamState, OptimizerReport | None, Step]:
    """Adam's state, how it was read, and the rule; InputError if they do not determine a step.

    Below `min_coverage`, with on_low_coverage = "identity", the rule becomes "sgd".
    """
    chosen = config.optimizer
    if chosen.rule == "sgd":
        group = AdamGroup(tuple(policy.params), chosen.lr or 0.0, 0.9, 0.999, 1e-8, 0.0)
        return AdamState({}, {}, {}, (group,)), None, _step(config, None)
    checkpoint = expanded(config.policy.checkpoint)
    if chosen.state is None:
        require_own_state(checkpoint, config.policy.adapter)
    path = expanded(chosen.state) if chosen.state else find_state(checkpoint)
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
        accept_positional=True,  # the gradients on U decide: `gradient.verify_state`
    )
    if chosen.state is None:
        _require_one_adapter(checkpoint, config.policy.adapter, report)
    step = _step(config, report.sidecar)
    covered = min(report.coverage["exp_avg"], report.coverage["exp_avg_sq"])
    if covered < chosen.min_coverage * report.parameters:
        step = step._replace(rule="sgd")
    adam.require_state(policy.params, adam_state, step.rule)
    return adam_state, report, step


def choose_objective(config: Config) -> Objective:
    """J of the preset, or as set. InputError if it needs a column or a constant that is not given."""
    chosen, preset = config.objective, PRESETS[config.objective.preset]
    supplied = config.rollouts.update is not None
    if chosen.advantage == "rollouts" and not supplied:
        raise InputError(
            'objective.advantage = "rollouts" uses the column advantage of rollouts.update, which is '
            "not set: set it, or choose an advantage that is computed from the rewards"
        )
    normalisation = chosen.normalisation or preset.normalisation
    if normalisation == "constant" and supplied and chosen.constant is None:
        raise InputError(
            'normalisation "constant" divides by L, and sampling.max_new_tokens need not be that of '
            "rollouts.update: set objective.constant to the trainer's value (max_completion_length)"
        )
    return Objective(
        chosen.advantage or preset.advantage,
        normalisation,
        chosen.constant or float(config.sampling.max_new_tokens),
    )


def require_own_state(checkpoint: Path, adapter: str) -> None:
    """InputError if the state in a checkpoint is another adapter's, as with TRL's ref/ in a policy."""
    if adapter != "default" and (checkpoint / "adapter_config.json").is_file():
        raise InputError(
            f"the optimizer state in {checkpoint} belongs to the adapter in that folder, not to "
            f'{adapter}/: set optimizer.state to that of {adapter}, or optimizer.rule = "sgd"'
        )


def _require_one_adapter(checkpoint: Path, adapter: str, report: OptimizerReport) -> None:
    """InputError for a state without names beside several adapters: its adapter is unknown."""
    folders = sorted(path.parent.name for path in checkpoint.glob("*/adapter_config.json"))
    if report.positional and adapter in folders and len(folders) > 1:
        raise InputError(
            f"{report.path} has no names and is beside the adapters {', '.join(folders)}: which of "
            "them was trained is unknown; save names with ParamNamesCallback, or set optimizer.state "
            f"to a state of {adapter} alone"
        )


def _step(config: Config, sidecar: Sidecar | None) -> Step:
    chosen = config.optimizer
    clip = chosen.max_grad_norm
    if clip is None:
        clip = sidecar.max_grad_norm if sidecar else None
    if clip is None:
        clip = DEFAULT_MAX_GRAD_NORM
    return Step(chosen.rule, clip or None, chosen.max_update)


def step_lines(
    config: Config,
    adam_state: AdamState,
    report: OptimizerReport | None,
    step: Step,
    update: Rollouts | None = None,
) -> list[str]:
    """Log lines on the optimizer state, warnings included."""
    if report is None:
        unused = (f"warning: {line}" for line in differences(config, None, update))
        return ['optimizer: rule "sgd", no state is read', *unused]
    covered = ", ".join(f"{what} {count}" for what, count in report.coverage.items())
    verified = "; the gradients on U verify the order" if report.twins and step.rule != "sgd" else ""
    lines = [
        f"optimizer state {report.path.name}: {report.format}; parameters matched {report.route}, "
        f"{report.certainty}{verified}; coverage: {covered} of {report.parameters}",
        *report.notes,
    ]
    if step.rule == "sgd":
        lines.append('warning: coverage is below min_coverage, on_low_coverage = "identity": v = Y')
    return [
        *lines,
        *_clipping(config, report.sidecar, step),
        *(f"warning: {line}" for line in differences(config, report.sidecar, update)),
        *_other_checkpoint(config, adam_state, report.sidecar),
    ]


def _clipping(config: Config, sidecar: Sidecar | None, step: Step) -> list[str]:
    given, saved = config.optimizer.max_grad_norm, sidecar.max_grad_norm if sidecar else None
    if step.rule != "adamw":
        return []
    if given is None and saved is None:
        return [
            f"warning: the run's max_grad_norm is unknown, {DEFAULT_MAX_GRAD_NORM:g} (the Trainer's "
            "default) is used: set optimizer.max_grad_norm"
        ]
    if None not in (given, saved) and given != saved:
        return [
            f"warning: optimizer.max_grad_norm is {given:g}, the run was trained with {saved:g}: the "
            "config's is used"
        ]
    return []


def _other_checkpoint(config: Config, adam_state: AdamState, sidecar: Sidecar | None) -> list[str]:
    """A warning for a state of another checkpoint: shapes are equal, only the step count differs."""
    if not adam_state.step:
        return []
    recorded: dict[str, int] = {}
    checkpoint = expanded(config.policy.checkpoint)
    if (trained := trained_steps(checkpoint)) is not None:
        recorded[str(checkpoint / FILE)] = trained
    if sidecar is not None and sidecar.global_step is not None:
        recorded[str(sidecar.path)] = sidecar.global_step
    taken = max(adam_state.step.values())
    return [
        f"warning: the optimizer state has taken {taken} steps but {place} records {trained}: it may "
        "belong to another checkpoint, and the prediction would not be of this policy's next step"
        for place, trained in recorded.items()
        if taken != trained
    ]
