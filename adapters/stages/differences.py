"""Differences between the loss and sampling of a training run (its sidecar) and those used here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from funcprobe.step.objective import PRESETS

from ..config.schema import Config
from ..optimizer import Sidecar
from ..rollouts import Rollouts
from .trl_settings import is_trls, not_known, unlike_settings, unused_columns

# TRL's scale_rewards -> our advantage.
ADVANTAGES = {"group": "mean_std", "True": "mean_std", "none": "mean", "False": "mean"}
# Settings of TRL that change the distribution of U's responses, with the values at which they do not.
_CUTS = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,)}
# Settings of TRL (1.16), each with the value at which it has no effect. The first change the loss:
# while the ratio to the sampling policy is 1, also with importance_sampling_level "sequence", the
# gradient of LOSSES is otherwise that of J = sum of advantage x normalisation x l.
# (use_adaptive_entropy changes entropy_coef in training, also from 0.) The others change which
# sequences enter the step.
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
_TERMS = {
    "beta": 0.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
}
SEQUENCES = {"num_iterations": 1, "mask_truncated_completions": False}
# On by default, without effect unless vLLM is used: the loss of each token times the ratio of the
# policy's probability to vLLM's, of the token or of its sequence, clipped or masked.
_CORRECTION = "vllm_importance_sampling_correction"
# A term of the loss of a mixture of experts that is no function of the tokens' probabilities.
_ROUTER = "router_aux_loss_coef"


class Setting(NamedTuple):
    """A setting that is in effect, with the value at which it is not."""

    name: str
    value: Any
    off: Any


def terms(settings: Mapping[str, Any]) -> list[Setting]:
    """Settings of a run, by TRL's names, by which its loss has terms or weights that J does not have.

    A setting that is missing or None is off.
    """
    found = _switched_on(settings, _TERMS)
    if settings.get("use_vllm"):
        found += _switched_on(settings, {_CORRECTION: False})
    return found


def loss_type(sidecar: Sidecar) -> str | None:
    """TRL's loss_type; "rloo" for its RLOOTrainer, which has none, if it does not normalise further."""
    kind = sidecar.loss.get("loss_type")
    if kind is None and sidecar.loss.get("normalize_advantages") is False:
        return "rloo"
    return kind if isinstance(kind, str) else None


def one_microbatch(sidecar: Sidecar) -> bool:
    """Whether a step was one micro-batch, of one process, as far as the file says."""
    names = ("generation_batch_size", "per_device_train_batch_size", "steps_per_generation")
    sizes: list[Any] = [sidecar.loss.get(name) for name in names]
    generated, of_device, per_generation = sizes
    whole = all(type(size) is int for size in sizes)
    alone = not whole or generated == of_device * per_generation
    return alone and sidecar.loss.get("gradient_accumulation_steps") == 1


def has_trl_loss(sidecar: Sidecar) -> bool:
    """Whether the run's loss is TRL's, and no preset has its gradient at a step of the run."""
    kind, settings = loss_type(sidecar), {**sidecar.sampling, **sidecar.loss}
    if not is_trls(sidecar):
        return False
    per_step, generated = (
        settings.get(name) for name in ("gradient_accumulation_steps", "steps_per_generation")
    )
    plain = kind in LOSSES and (kind != "bnpo" or one_microbatch(sidecar))
    aligned = None in (per_step, generated) or per_step == generated
    return not (plain and aligned) or bool(terms(settings) + _switched_on(settings, SEQUENCES))


def differences(config: Config, sidecar: Sidecar | None, update: Rollouts | None = None) -> list[str]:
    """What of the run's step the predicted one does not have, by the sidecar and the supplied U."""
    columns = unused_columns(config, update)
    if sidecar is None:
        return columns
    if config.objective.loss is None:
        lines = [*_objective(config, sidecar), *_loss(sidecar)]
    else:
        lines = [*_advantage(config, sidecar), *_chosen(config, sidecar)]
        if config.objective.loss == "trl" and is_trls(sidecar):
            lines += not_known(sidecar, update)
    if sidecar.loss.get(_ROUTER):
        lines.append(f"{_ROUTER} was {sidecar.loss[_ROUTER]}: its term is not in the predicted step")
    return [*columns, *(f"the run's {line}" for line in (*_sampling(config, sidecar), *lines))]


def _sampling(config: Config, sidecar: Sidecar) -> list[str]:
    ran, here = sidecar.sampling, config.sampling.temperature
    lines = []
    if ran.get("temperature") not in (None, here):
        lines.append(f"sampling had temperature {ran['temperature']}, sampling.temperature is {here:g}")
    rendered, chosen = ran.get("chat_template_kwargs"), config.prompts.chat_template_kwargs
    if rendered and rendered != chosen and None in (config.rollouts.eval, config.rollouts.update):
        lines.append(
            f"chat_template_kwargs were {rendered!r}, prompts.chat_template_kwargs are {chosen!r}: the "
            "prompts may differ"
        )
    if config.rollouts.update is None:
        lines += [
            f"sampling had {key} = {ran[key]}, but U is sampled without it here"
            for key, off in _CUTS.items()
            if ran.get(key) not in (None, *off)
        ]
    return lines


def _objective(config: Config, sidecar: Sidecar) -> list[str]:
    objective, kind = config.objective, loss_type(sidecar)
    lines = []
    if kind in PRESETS and kind != objective.preset and objective.normalisation is None:
        lines.append(f"loss_type was {kind}, objective.preset is {objective.preset}")
    divisor = objective.normalisation or PRESETS[objective.preset].normalisation
    if kind in PRESETS and objective.normalisation not in (None, PRESETS[kind].normalisation):
        lines.append(f"loss_type was {kind}, objective.normalisation is {divisor}")
    longest, L = sidecar.sampling.get("max_completion_length"), objective.constant
    if kind == "dr_grpo" and divisor == "constant" and None not in (longest, L) and longest != L:
        lines.append(f"max_completion_length was {longest}, objective.constant is {L:g}")
    return lines + _advantage(config, sidecar)


def _advantage(config: Config, sidecar: Sidecar) -> list[str]:
    objective, scale = config.objective, sidecar.loss.get("scale_rewards")
    advantage = objective.advantage or PRESETS[objective.preset].advantage
    ran = ADVANTAGES.get(str(scale))
    if scale is None or advantage in ("rollouts", ran):
        return []
    remedy = f'set it to "{ran}"' if ran else "only the run's own rollouts have these advantages"
    return [f"scale_rewards was {scale}, objective.advantage is {advantage}: {remedy}"]


def _chosen(config: Config, sidecar: Sidecar) -> list[str]:
    """Where a chosen loss is another than the run's, or has other settings."""
    chosen, kind = config.objective.loss, loss_type(sidecar)
    if kind is None:
        return []
    if chosen == "trl" and is_trls(sidecar):
        return unlike_settings(config, sidecar)
    if chosen in ("trl", "verl"):
        return [f"loss_type was {kind}, objective.loss is {chosen}"]
    return [
        f"loss_type was {kind}, objective.loss is {chosen}: whether they are equal is not known; "
        "compare the loss below with the trainer's log"
    ]


def _loss(sidecar: Sidecar) -> list[str]:
    kind, lines = loss_type(sidecar), []
    if kind == "bnpo":
        lines.append(
            "loss_type was bnpo, a token mean of each micro-batch: this is the preset dapo with one "
            "micro-batch per step, and no preset otherwise"
        )
    elif kind is not None and kind not in {*LOSSES, *PRESETS}:
        lines.append(f"loss_type was {kind}, whose gradient is not that of any objective here")
    unlike = terms({**sidecar.sampling, **sidecar.loss}) + _switched_on(sidecar.loss, SEQUENCES)
    return lines + [
        f"{name} was {value}, but J here has no such term: the run's step is a different one"
        for name, value, _ in unlike
    ]


def _switched_on(settings: Mapping[str, Any], table: Mapping[str, Any]) -> list[Setting]:
    return [
        Setting(name, settings[name], off)
        for name, off in table.items()
        if settings.get(name) not in (off, None)
    ]
