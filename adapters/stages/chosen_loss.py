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


def choose_loss(config: Config) -> ChosenLoss | None:
    """The loss, if one is named; InputError for a setting that it does not have, or a bad value."""
    name, given = config.objective.loss, config.objective.settings
    if name is None:
        if given:
            raise InputError(
                f"objective.settings has {', '.join(given)}, but objective.loss is not set: set it to "
                '"trl", "verl" or "file.py:function"'
            )
        return None
    if name not in ("trl", "verl"):
        function = load_function(name, "loss", '"trl", "verl"')
        chosen = custom_loss(partial(function, **given) if given else function)
        return ChosenLoss(name, chosen, given, Rows(), 1, reference=True)
    own = {key: value for key, value in given.items() if key in Rows._fields}
    rest = {key: value for key, value in given.items() if key not in Rows._fields}
    rows = _validated(Rows, own)
    if name == "verl":
        verl = _validated(VerlLoss, rest)
        return ChosenLoss(name, verl_loss(verl), verl._asdict(), rows, 1, verl.use_kl_loss)
    trl = _validated(TrlLoss, rest)
    settings = trl._asdict() | rows._asdict()
    count = trl.gradient_accumulation_steps
    return ChosenLoss(name, trl_loss(trl), settings, rows, count, trl.beta != 0)


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
