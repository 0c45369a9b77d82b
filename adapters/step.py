"""From the configuration and the checkpoint to Adam's state and the rule of the step."""

import json
from pathlib import Path

from funcprobe import adam
from funcprobe.objective import PRESETS
from funcprobe.types import AdamGroup, AdamState, InputError, Step

from .config import Config
from .model import Policy
from .optimizer import AdamOverrides, OptimizerReport, Sidecar, find_state, read_adam_state

DEFAULT_MAX_GRAD_NORM = 1.0  # transformers.TrainingArguments'


def load_step(config: Config, policy: Policy) -> tuple[AdamState, OptimizerReport | None, Step]:
    """Adam's state, how it was read, and the rule; InputError where they do not make a step.

    Below `min_coverage`, with on_low_coverage = "identity", the rule becomes "sgd".
    """
    chosen = config.optimizer
    if chosen.rule == "sgd":
        group = AdamGroup(tuple(policy.params), chosen.lr or 0.0, 0.9, 0.999, 1e-8, 0.0)
        return AdamState({}, {}, {}, (group,)), None, _step(config, None)
    path = Path(chosen.state).expanduser() if chosen.state else None
    path = path or _state_of(Path(config.policy.checkpoint).expanduser(), config.policy.adapter)
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
        accept_positional=chosen.accept_positional,
    )
    step = _step(config, report.sidecar)
    covered = min(report.coverage["exp_avg"], report.coverage["exp_avg_sq"])
    if covered < chosen.min_coverage * report.parameters:
        step = step._replace(rule="sgd")
    adam.require_state(policy.params, adam_state, step.rule)
    return adam_state, report, step


def _state_of(checkpoint: Path, adapter: str) -> Path:
    """The checkpoint's state, unless that is another adapter's: TRL's ref/ beside the policy's own."""
    if adapter != "default" and (checkpoint / "adapter_config.json").is_file():
        raise InputError(
            f"the optimizer's state in {checkpoint} is of the adapter that lies there, not of "
            f'{adapter}/: set optimizer.state to that of {adapter}, or rule = "sgd"'
        )
    return find_state(checkpoint)


def _step(config: Config, sidecar: Sidecar | None) -> Step:
    chosen = config.optimizer
    clip = chosen.max_grad_norm
    if clip is None:
        clip = sidecar.max_grad_norm if sidecar else None
    if clip is None:
        clip = DEFAULT_MAX_GRAD_NORM
    return Step(chosen.rule, clip or None, chosen.max_scale or None)


def step_lines(
    config: Config, adam_state: AdamState, report: OptimizerReport | None, step: Step
) -> list[str]:
    """What the reader is told of the optimizer's state, warnings included."""
    if report is None:
        return ['optimizer: rule "sgd", no state is read']
    covered = ", ".join(f"{what} {count}" for what, count in report.coverage.items())
    lines = [
        f"optimizer {report.path.name}: {report.format}; names {report.route}, {report.certainty}; "
        f"{covered} of {report.parameters} parameters",
        *report.notes,
    ]
    if step.rule == "sgd":
        lines.append("warning: coverage is low and on_low_coverage is identity: v is the raw gradient")
    return [
        *lines,
        *_clipping(config, report.sidecar, step),
        *_other_settings(config, report.sidecar),
        *_other_checkpoint(config, adam_state),
    ]


def _clipping(config: Config, sidecar: Sidecar | None, step: Step) -> list[str]:
    given, saved = config.optimizer.max_grad_norm, sidecar.max_grad_norm if sidecar else None
    if step.rule != "adamw":
        return []
    if given is None and saved is None:
        return [
            f"warning: the run's max_grad_norm is not known, {DEFAULT_MAX_GRAD_NORM:g} (the Trainer's "
            "default) is used: set optimizer.max_grad_norm"
        ]
    if None not in (given, saved) and given != saved:
        return [
            f"warning: optimizer.max_grad_norm is {given:g}, the run was trained with {saved:g}: the "
            "config's is used"
        ]
    return []


def _other_settings(config: Config, sidecar: Sidecar | None) -> list[str]:
    """Where the run, as its sidecar tells, sampled or summed otherwise than this probe will."""
    if sidecar is None:
        return []
    lines = []
    was = sidecar.sampling.get("temperature")
    if was is not None and was != config.sampling.temperature:
        lines.append(
            f"warning: the run sampled at temperature {was}, sampling.temperature is "
            f"{config.sampling.temperature:g}"
        )
    loss, objective = sidecar.loss, config.objective
    kind = loss.get("loss_type")
    if kind in PRESETS and kind != objective.preset and objective.normalisation is None:
        lines.append(f"warning: the run's loss_type was {kind}, objective.preset is {objective.preset}")
    if kind == "bnpo":
        lines.append(
            "warning: the run's loss_type was bnpo, a token mean of each micro-batch: it is the preset "
            "dapo where there is one micro-batch to a step, and no preset otherwise"
        )
    elif kind is not None and kind not in PRESETS:
        lines.append(
            f"warning: the run's loss_type was {kind}, of which no objective here is the gradient"
        )
    lines += [
        f"warning: the run's {key} was {loss[key]}, and J here has no such term: the run's step is "
        "another one than the step that is probed"
        for key, off in _TERMS.items()
        if loss.get(key, off) not in (off, None)
    ]
    return lines


# Settings of TRL that change the gradient of the loss, each with the value at which they do not.
_TERMS = {
    "beta": 0.0,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "num_iterations": 1,
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
}


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
