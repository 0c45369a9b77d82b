"""Dropout in the training run: no probe repeats its step; with step.masks, its mean and spread."""

from funcprobe.policy.dropout import dropouts, listed, masked_forwards, unmaskable
from funcprobe.policy.forward import Forward
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import Config
from ..optimizer import Sidecar


def dropout_masks(
    config: Config, policy: Policy, forward: Forward, sidecar: Sidecar | None
) -> tuple[list[Forward], list[str]]:
    """The forwards of step.masks, if set, and a line where the run trains with dropout.

    A sidecar with disable_dropout, by which TRL sets every nn.Dropout to 0, is heeded. InputError if
    masks are asked for and the run has no dropout, or one whose masks cannot be drawn.
    """
    count, params = config.step.masks, policy.params
    found = dropouts(policy.model)
    disabled = sidecar is not None and sidecar.loss.get("disable_dropout") is True
    if disabled:
        found = [one for one in found if one.place is None]
    if count and not found:
        why = "the run disabled dropout" if disabled else "neither adapter nor base has dropout"
        raise InputError(f"step.masks = {count}, but {why}: set it to 0")
    if count:
        masks = masked_forwards(policy.model, params, forward, count, config.run.seed)
        return masks, [
            f"dropout in training ({listed(found)}): Y and v are means over {count} masks, where the "
            f"trainer's step has one; {count} gradients of U instead of 1"
        ]
    if not found:
        return [], []
    remedy = "train without dropout"
    if not disabled and unmaskable(policy.model, params, forward) is None:
        remedy = f"set step.masks = 8 for their mean and spread, or {remedy}"
    return [], [
        f"warning: dropout in training ({listed(found)}): the trainer's gradient has random masks, so "
        f"that no probe can repeat its step, and v here has none: {remedy}"
    ]
