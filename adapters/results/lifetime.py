"""What this batch does now and through momentum later, for results.json and in words."""

from typing import TYPE_CHECKING

import funcprobe

from .quantity import Quantity, Section

if TYPE_CHECKING:
    from ..stages.first_order import Predicted


class LifetimeSection(Section):
    """The part of this batch beyond the predicted step, in the unit of the attribution: its gradient
    acts in later steps through the first moment. X, the second moment, the learning rate and the clip
    are those of the predicted step."""

    now: float
    """<X, P Y>: in this step."""
    later: float
    """In all later steps together, through momentum."""
    factor: float | None
    """later / now, the same for every prompt and token of U; null: the tensors differ in beta1 or in
    their steps, so that those would each need a further pass."""


def lifetime_section(found: "Predicted", attribution: funcprobe.Attribution) -> LifetimeSection:
    """Of the batch, summed over tensors with each its own factor."""
    shares = {name: parts.update for name, parts in attribution.modules.tensor.items()}
    made = funcprobe.lifetime(shares, found.plan.adam_state, found.plan.step)
    return LifetimeSection(**made._asdict())


def lifetime_lines(
    lifetime: LifetimeSection | None, next_lr: Quantity, unit: str, mark: str = ""
) -> list[str]:
    """This batch in this step and later, at the next learning rate or, where it is 0, per unit of it.

    No line without momentum, and for a batch without gradient. `unit` is the entropy's; `mark` says
    that the batch's part is indistinguishable from 0, and with it what it does later.
    """
    if lifetime is None or not lifetime.later:
        return []
    eta = next_lr.value or 1.0
    per = f"at lr {eta:g}" if next_lr.value else "per unit of learning rate"
    return [
        f"This batch: {eta * lifetime.now:+.2e} in this step{mark}, {eta * lifetime.later:+.2e} more "
        f"in later steps through momentum{mark}, if nothing else changes ({unit} {per})"
    ]
