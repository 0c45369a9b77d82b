"""The loss of [objective]: trl, verl, or a function of one's own, with its settings."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from funcprobe.losses.custom import custom_loss
from funcprobe.losses.loss import Loss
from funcprobe.losses.trl import TrlLoss, trl_loss
from funcprobe.losses.verl import VerlLoss, verl_loss
from funcprobe.types import InputError

from ..config.schema import Config
from ..rollouts import Rollouts
from ..sampling.functions import load_function
from .differences import Rows


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
    settings = trl._asdict() | rows._asdict()
    count = trl.gradient_accumulation_steps
    return ChosenLoss(name, trl_loss(trl), settings, rows, count, trl.beta != 0)


def _of_rollouts(trl: TrlLoss, rows: Rows, update: Rollouts) -> TrlLoss:
    """The settings at the step of supplied rollouts: its entropy coefficient, and its micro-batches.

    Rollouts without micro-batches are as good as one, unless the loss has sums over each.
    """
    if update.entropy_coef is not None:
        trl = trl._replace(entropy_coef=update.entropy_coef)
    calls = trl.gradient_accumulation_steps * rows.world_size
    if update.microbatch is not None or calls == 1:
        return trl
    bonus, quantile = trl.entropy_coef != 0, trl.top_entropy_quantile < 1
    if trl.loss_type == "bnpo" or bonus or quantile:
        what = "bnpo" if trl.loss_type == "bnpo" else "the entropy bonus" if bonus else "the quantile"
        raise InputError(
            f"rollouts.update has no column microbatch, but {what} is of each of the step's {calls} "
            "micro-batches: record the rollouts by record_rollouts, or add the columns microbatch and "
            "process (docs/rollouts.md)"
        )
    if trl.steps_per_generation in (None, trl.gradient_accumulation_steps):
        return trl._replace(gradient_accumulation_steps=1, steps_per_generation=None)
    return trl


def _validated(kind: Any, given: Mapping[str, Any]) -> Any:
    """The settings as `kind`. InputError, naming the setting."""
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = ", ".join(dict.fromkeys((*kind._fields, *Rows._fields)))
            raise InputError(f"objective.settings has no {key}: the settings are {known}") from error
        raise InputError(
            f"objective.settings.{key} is {first['input']!r:.60}: {first['msg']}"
        ) from error
