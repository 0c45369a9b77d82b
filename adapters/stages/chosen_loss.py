"""The loss of [objective]: trl, verl, or a function of one's own, with its settings."""

import difflib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from funcprobe.losses.custom import custom_loss
from funcprobe.losses.loss import Loss
from funcprobe.losses.trl import WHOLE_STEP, LossType, TrlLoss, trl_loss
from funcprobe.losses.verl import VerlLoss, verl_loss
from funcprobe.types import InputError

from ..config.schema import Config
from ..rollouts import Rollouts
from ..sampling.functions import load_function
from .trl_settings import Rows

# Settings of which infinity means that there is no bound; sidecars and configurations have it as "inf".
_BOUNDS = ("delta", "vllm_importance_sampling_clip_max", "epsilon_high", "clip_ratio_c")


class ChosenLoss(NamedTuple):
    """objective.loss with its settings."""

    name: str  # trl, verl, or the function
    loss: Loss
    settings: dict[str, Any]  # with the defaults
    rows: Rows
    microbatches: int  # of a step and a process, where U is sampled
    reference: bool  # whether it needs log-probabilities of the reference policy


def choose_loss(config: Config, update: Rollouts | None = None) -> ChosenLoss | None:
    """The loss, if one is named, with the settings at the step of `update`, if U is supplied.

    InputError for a setting that it does not have, a bad value, and rollouts that lack what it needs.
    """
    name, given = config.objective.loss, config.objective.settings
    if name is None:
        if given:
            raise InputError(
                f"objective.settings has {', '.join(given)}, but objective.loss is not set: set it to "
                '"trl", "verl" or "file.py:function"'
            )
        return None
    if name in get_args(LossType):
        raise InputError(
            f'objective.loss is "{name}", a loss_type of TRL: set loss = "trl" and settings = '
            f'{{ loss_type = "{name}" }}'
        )
    if name not in ("trl", "verl"):
        function = load_function(name, "loss", '"trl", "verl" or a function of (logp, entropy, batch)')
        chosen = custom_loss(partial(function, **given) if given else function)
        return ChosenLoss(name, chosen, given, Rows(), 1, reference=True)
    own = {key: value for key, value in given.items() if key in Rows._fields}
    rest = {key: value for key, value in given.items() if key not in Rows._fields}
    rows = _validated(Rows, own)
    if name == "verl":
        verl = _validated(VerlLoss, rest)
        return ChosenLoss(name, verl_loss(verl), verl._asdict(), rows, 1, verl.use_kl_loss)
    trl = _validated(TrlLoss, rest)
    if update is not None:
        trl = _of_rollouts(trl, rows, update)
    elif config.rollouts.update is None:  # U is a generation of its own
        trl = trl._replace(steps_per_generation=None)
        _require_rows(config, trl.gradient_accumulation_steps * rows.world_size)
    settings = trl._asdict() | rows._asdict()
    count = trl.gradient_accumulation_steps
    return ChosenLoss(name, trl_loss(trl), settings, rows, count, trl.beta != 0)


def _require_rows(config: Config, calls: int) -> None:
    """InputError for a sampled U with fewer responses than the step had micro-batches."""
    if (count := config.sampling.B_U * config.sampling.G) < calls:
        raise InputError(
            f"sampling.B_U x G are {count} responses, for {calls} micro-batches (objective.settings: "
            "gradient_accumulation_steps x world_size): raise sampling.B_U to the prompts of a step"
        )


def _of_rollouts(trl: TrlLoss, rows: Rows, update: Rollouts) -> TrlLoss:
    """The settings at the step of supplied rollouts: its entropy coefficient, and its micro-batches.

    Rollouts without micro-batches are as good as one, unless the loss has sums over each.
    """
    if update.entropy_coef is not None:
        trl = trl._replace(entropy_coef=update.entropy_coef)
    _require_processes(trl, rows, update)
    calls = trl.gradient_accumulation_steps * rows.world_size
    if update.microbatch is not None or calls == 1:
        return trl
    aligned = trl.steps_per_generation in (None, trl.gradient_accumulation_steps)
    of_call = _of_calls(trl)
    if trl.loss_type in WHOLE_STEP and not aligned:
        of_call = f"the divisor of {trl.loss_type}"
    if of_call is not None:
        raise InputError(
            f"rollouts.update has no column microbatch, but {of_call} is of each of the step's {calls} "
            "micro-batches: record the rollouts by record_rollouts, or add the columns microbatch and "
            "process (docs/rollouts.md)"
        )
    return trl._replace(gradient_accumulation_steps=1, steps_per_generation=None)


def _of_calls(trl: TrlLoss) -> str | None:
    """What of the loss is a sum over each call's rows, if anything is."""
    if trl.loss_type == "bnpo":
        return "bnpo"
    if trl.entropy_coef != 0:
        return "the entropy bonus"
    return "the quantile" if trl.top_entropy_quantile < 1 else None


def _require_processes(trl: TrlLoss, rows: Rows, update: Rollouts) -> None:
    """InputError for rollouts of fewer processes than the training had: part of a step is missing."""
    if update.process is None:
        of_call = _of_calls(trl)
        if update.microbatch is not None and rows.world_size > 1 and of_call is not None:
            raise InputError(
                f"rollouts.update has no column process, but {of_call} is of each of the "
                f"{rows.world_size} processes: add it (docs/rollouts.md)"
            )
    elif (found := max(update.process) + 1) < rows.world_size:
        raise InputError(
            f"rollouts.update has rows of {found} of the training's {rows.world_size} processes "
            "(world_size): give all of the step, by the path without .rank-"
        )


def _validated(kind: Any, given: Mapping[str, Any]) -> Any:
    """The settings as `kind`. InputError, naming the setting."""
    values = {key: float("inf") if value == "inf" else value for key, value in given.items()}
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value) and key not in _BOUNDS:
            raise InputError(f"objective.settings.{key} is {value}, expected a finite number")
    try:
        return TypeAdapter(kind).validate_python(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise InputError(f"objective.settings has no {key}: {_instead(key, kind)}") from error
        raise InputError(
            f"objective.settings.{key} is {first['input']!r:.60}: {first['msg']}"
        ) from error


def _instead(key: str, kind: Any) -> str:
    """What to set in place of a setting that the loss does not have."""
    known = list(dict.fromkeys((*kind._fields, *Rows._fields)))
    if key in ("num_iterations", "scale_rewards"):
        return (
            "several iterations are in recorded rollouts (old_logp), not a setting"
            if key == "num_iterations"
            else "it is objective.advantage"
        )
    for name, other in (("trl", TrlLoss), ("verl", VerlLoss)):
        if other is not kind and key in other._fields:
            return f'it is one of objective.loss = "{name}"'
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]}?"
    return f"the settings are {', '.join(known)}"
