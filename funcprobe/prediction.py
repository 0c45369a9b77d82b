"""What `predict` returns: the first-order change with its errors and parts."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from .html_table import html_table
from .statistics.estimators import FirstOrder
from .statistics.evaluation import Evaluation
from .statistics.intervals import Error, student, total
from .step.adam import UpdateDirection
from .step.masked import OverMasks
from .types import Params, TokenStats


class Prediction(NamedTuple):
    """First-order entropy change per unit of learning rate, with all quantities that enter it.

    Errors: `given_u` over E's sampling units, v held fixed; `over_u` over U's prompts, the second
    moment in P held fixed, both with their degrees of freedom; `masks.se` over the dropout masks of one
    step; `se_total` the root of the sum of their squares, and `total` the same with degrees of freedom.
    Units: the entropy estimator's, per unit of eta. With masks, Y, v and P are means over them.
    """

    derivative: float  # d/d eta of the entropy along v, from tangents
    bars_dot: float  # the same number as <X, v>, from the gradient
    bars_dot_identity: float  # <X, Y>: the derivative along Y, a step without Adam
    from_momentum: float  # <X, v_momentum>
    from_decay: float  # <X, v_decay>
    from_update: float  # <X, P Y>
    entropy: float  # H(theta) on E
    given_u: Error
    over_u: Error
    se_total: float
    first_order: FirstOrder  # with the error given U
    t_N: Float[Tensor, " N"]  # <P X, Y_n> of every sequence of U
    X: Params
    Y: Params
    direction: UpdateDirection
    at: Evaluation  # E at theta, its baseline fitted
    tangent: TokenStats  # of E along v
    update_stats: TokenStats  # of U at theta; 0 where every advantage is, as U is not passed
    masks: OverMasks | None = None  # None: Y without dropout

    @property
    def se_over_u(self) -> float:
        """Standard error over U's prompts, the second moment in P held fixed."""
        return self.over_u.se

    @property
    def total(self) -> Error:
        """Of the derivative along the step of an average U: all errors, taken as independent."""
        masks = [Error(self.masks.se, len(self.masks.derivative) - 1)] if self.masks else []
        return total(self.given_u, self.over_u, *masks)

    @property
    def stats(self) -> TokenStats:
        """Token statistics of E at theta."""
        return self.at.stats

    def _repr_html_(self) -> str:
        low, high = student(self.derivative, self.total)
        errors = {"over E, U given": self.given_u.se, "over the prompts of U": self.over_u.se}
        if self.masks:
            errors["over dropout masks"] = self.masks.se
        parts = {
            "this batch": self.from_update,
            "momentum": self.from_momentum,
            "weight decay": self.from_decay,
        }
        return html_table(
            f"Derivative of the entropy along the step: {self.derivative:+.4g} "
            f"(95 %: {low:+.4g} to {high:+.4g})",
            ("", "value"),
            [
                *((f"standard error {over}", f"{se:.2g}") for over, se in errors.items()),
                *((f"part of {name}", f"{part:+.4g}") for name, part in parts.items()),
                ("entropy at theta", f"{self.entropy:.4f}"),
            ],
            "In nats per token or per sequence, as the entropy was asked for; all but the last are per "
            "unit of learning rate.",
        )
