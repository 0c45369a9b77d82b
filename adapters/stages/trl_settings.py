"""TRL's loss as a training run had it, by its sidecar; what of it a predicted step does not have."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import Field

from funcprobe.losses.trl import LossType, TrlLoss

from ..config.schema import Config
from ..optimizer import Sidecar
from ..rollouts import Rollouts

_BOUND = "vllm_importance_sampling_clip_max"


class Rows(NamedTuple):
    """Settings of a trainer that say which rows and tokens a call of its loss has, where U is sampled.

    Recorded rollouts hold these as they were.
    """

    mask_truncated_completions: bool = False
    world_size: Annotated[int, Field(gt=0)] = 1


# What None stands for.
_STANDS_FOR = {"epsilon_high": "epsilon", "steps_per_generation": "gradient_accumulation_steps"}
_DEFAULTS: dict[str, Any] = TrlLoss._field_defaults | Rows._field_defaults


def is_trls(sidecar: Sidecar) -> bool:
    """Whether the sidecar records one of TRL's losses."""
    return sidecar.loss.get("loss_type") in get_args(LossType)


def trl_settings(sidecar: Sidecar) -> dict[str, Any]:
    """The run's loss_type, and its other settings of TRL's loss and rows that are not the defaults."""
    recorded = _recorded(sidecar)
    resolved = _resolved(recorded)
    defaults = _DEFAULTS | {name: resolved[other] for name, other in _STANDS_FOR.items()}
    return {
        name: value
        for name, value in recorded.items()
        if name == "loss_type" or resolved[name] != defaults[name]
    }


def unlike_settings(config: Config, sidecar: Sidecar) -> list[str]:
    """Settings of objective.loss = "trl" that differ from those of the run."""
    recorded, chosen = _recorded(sidecar), config.objective.settings
    ran, here = _resolved(recorded), _resolved(chosen)
    unused = set() if "dr_grpo" in (ran["loss_type"], here["loss_type"]) else {"max_completion_length"}
    if config.rollouts.update is not None:
        unused |= set(Rows._fields)  # as recorded
    return [
        f"{name} was {ran[name]}, objective.settings.{name} is {here[name]}"
        for name in recorded
        if name not in unused and ran[name] != here[name]
    ]


def not_known(sidecar: Sidecar, update: Rollouts | None) -> list[str]:
    """What the run's step depends on that neither the sidecar nor U, sampled or supplied, has."""
    ran = _resolved(_recorded(sidecar))
    sampled = update is None
    lines = []
    steps = _steps_on_a_generation(sidecar)
    if steps > 1 and (update is None or update.old_logp is None):
        where = "U is sampled here" if sampled else "rollouts.update has no column old_logp"
        lines.append(
            f"rollouts served {steps:g} steps (num_iterations, steps_per_generation), and {where}: "
            "the predicted step is the first of them, at the policy that sampled; set rollouts.update "
            "to the step's file of record_rollouts"
        )
    if (
        ran["beta"]
        and sidecar.loss.get("sync_ref_model")
        and (update is None or update.ref_logp is None)
    ):
        lines.append(
            "sync_ref_model was true: the reference policy moved with the training, and the one here "
            "did not; give rollouts with the column ref_logp"
        )
    if ran["use_adaptive_entropy"] and (update is None or update.entropy_coef is None):
        lines.append(
            f"entropy_coef adapted from {ran['entropy_coef']!r:.40} on, and the one at this step is "
            "not known: give rollouts with the column entropy_coef"
        )
    if sampled and ran["use_vllm"] and ran["vllm_importance_sampling_correction"]:
        lines.append(
            "responses were sampled by vLLM, with a correction for its probabilities: U is sampled by "
            "the policy itself here, where the correction is 1"
        )
    return lines


def unused_columns(config: Config, update: Rollouts | None) -> list[str]:
    """A line for columns of the supplied U by which its loss was not that of a preset."""
    if config.objective.loss is not None or update is None:
        return []
    masked = update.loss_mask is not None and not all(map(all, update.loss_mask))
    there = {
        "old_logp": update.old_logp is not None,
        "ref_logp": update.ref_logp is not None,
        "loss_mask": masked,
        "entropy_coef": bool(update.entropy_coef),
    }
    if not any(there.values()):
        return []
    names = ", ".join(name for name, present in there.items() if present)
    return [
        f"rollouts.update has {names}, which a preset does not use: set objective.loss = "
        '"trl" and objective.settings to those of the run'
    ]


def _recorded(sidecar: Sidecar) -> dict[str, Any]:
    """As in the file, without what is None: TRL's default of `_BOUND` is not None."""
    recorded = {**sidecar.sampling, **sidecar.loss}
    if _BOUND in recorded and recorded[_BOUND] is None:
        recorded[_BOUND] = "inf"
    return {name: recorded[name] for name in _DEFAULTS if recorded.get(name) is not None}


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults, and the values that None stands for; infinity as the sidecar has it."""
    found = _DEFAULTS | {k: "inf" if v == float("inf") else v for k, v in settings.items()}
    for name, other in _STANDS_FOR.items():
        found[name] = found[other] if found[name] is None else found[name]
    return found


def _steps_on_a_generation(sidecar: Sidecar) -> float:
    """Optimizer steps for which a generation serves; 1 where the file does not say."""
    names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")
    iterations, generated, per_step = (sidecar.loss.get(name) for name in names)
    counts = [count for count in (iterations, generated, per_step) if count is not None]
    if not all(type(count) is int and count > 0 for count in counts):
        return 1
    share = generated / per_step if generated is not None and per_step is not None else 1
    return (iterations or 1) * share
