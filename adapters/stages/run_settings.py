"""Keys that the user's file leaves unset take the training run's values, from its sidecar."""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from funcprobe.step.objective import PRESETS
from funcprobe.types import InputError

from ..config.schema import Config, Section
from ..machine.home import expanded
from ..optimizer import Sidecar, find_sidecar
from ..optimizer.sidecar import FILE
from .differences import ADVANTAGES, has_trl_loss, loss_type, one_microbatch
from .trl_settings import is_trls, trl_settings


def with_run_settings(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with the run's values, which one line names, if there are any.

    A key that is set stays as it is; that it differs is said by `differences`. Of the objective, a
    preset that is set determines the advantage as well. Raises InputError as `run_settings`.
    """
    taken = run_settings(config)
    if not taken:
        return config
    mine = config.objective.settings
    shown = {
        f"{section}.{key}": {name: one for name, one in value.items() if name not in mine}
        if key == "settings"
        else value
        for section, values in taken.items()
        for key, value in values.items()
    }
    if named := [f"{key} = {_shown(value)}" for key, value in shown.items() if value != {}]:
        say(f"from {FILE}, as not set here: {', '.join(named)}")
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in taken.items()}
    )


def run_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> key -> the run's value, of each key that is unset; {} without a sidecar.

    Raises InputError, naming the key, for a value that the configuration cannot have.
    """
    place = expanded(config.optimizer.state or config.policy.checkpoint)
    sidecar = find_sidecar(place) if place.exists() else None
    if sidecar is None:
        return {}
    recorded: dict[str, dict[str, Any]] = {
        "sampling": _sampling(config, sidecar),
        "objective": _objective(config, sidecar),
        "optimizer": {}
        if config.optimizer.rule != "adamw"
        else {"max_grad_norm": sidecar.max_grad_norm},
    }
    taken = {}
    for name, values in recorded.items():
        section = getattr(config, name)
        unset = {
            key: value
            for key, value in values.items()
            if value is not None and key not in section.model_fields_set
        }
        taken[name] = _valid(section, name, unset, sidecar)
        if "settings" in values and "settings" in section.model_fields_set:
            taken[name]["settings"] = values["settings"] | section.settings  # each is a key of its own
    return taken


def _sampling(config: Config, sidecar: Sidecar) -> dict[str, Any]:
    ran = sidecar.sampling
    found = {
        "temperature": ran.get("temperature"),
        "max_new_tokens": ran.get("max_completion_length"),
    }
    if config.rollouts.update is None:
        G = ran.get("num_generations")
        found |= {"G": G, "B_U": prompts_of_a_step(sidecar, G)}
    return found


def prompts_of_a_step(sidecar: Sidecar, G: Any) -> int | None:
    """Prompts of one optimizer step; None if the file does not determine them, or there is just one."""
    keys = ("generation_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    counts: list[Any] = [*(sidecar.loss.get(key) for key in keys), G]
    if any(type(count) is not int or count < 1 for count in counts):
        return None
    generated, accumulated, per_generation, G = counts
    prompts, rest = divmod(generated * accumulated, per_generation * G)
    return prompts if prompts > 1 and not rest else None


def _objective(config: Config, sidecar: Sidecar) -> dict[str, Any]:
    """The preset, the advantage where it is not the preset's, and L of the normalisation "constant";
    or, where no preset has the gradient of the run's loss, TRL's loss with the run's settings."""
    chosen, kind = config.objective, loss_type(sidecar)
    by_preset = {"preset", "normalisation"} & chosen.model_fields_set and chosen.loss is None
    asked = chosen.loss == "trl" or bool(chosen.settings) or has_trl_loss(sidecar)
    if is_trls(sidecar) and chosen.loss in (None, "trl") and asked and not by_preset:
        supplied = config.rollouts.update is not None
        advantage = "rollouts" if supplied else ADVANTAGES.get(str(sidecar.loss.get("scale_rewards")))
        return {"loss": "trl", "settings": trl_settings(sidecar), "advantage": advantage}
    if chosen.loss is not None:
        return {}
    if kind == "bnpo" and one_microbatch(sidecar):
        kind = "dapo"  # one mean over the tokens of a micro-batch, of which there is one
    if kind not in PRESETS:
        return {}
    found: dict[str, Any] = {}
    preset: str = config.objective.preset
    if "preset" not in config.objective.model_fields_set:
        found["preset"] = preset = kind
        advantage = ADVANTAGES.get(str(sidecar.loss.get("scale_rewards")))
        if advantage != PRESETS[kind].advantage:
            found["advantage"] = advantage
    longest = sidecar.sampling.get("max_completion_length")
    divisor = config.objective.normalisation or PRESETS[preset].normalisation
    if PRESETS[kind].normalisation == divisor == "constant":
        found["constant"] = float(longest) if type(longest) is int and abs(longest) < 2**53 else longest
    return found


def _valid(section: Section, name: str, values: dict[str, Any], sidecar: Sidecar) -> dict[str, Any]:
    """The values as the configuration holds them."""
    try:
        found = type(section).model_validate(section.model_dump() | values, strict=True)
        return {key: getattr(found, key) for key in values}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]))
        raise InputError(
            f"{sidecar.path} has {first['input']!r:.60} for {key}: {first['msg']}; set {key}"
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else repr(value)
