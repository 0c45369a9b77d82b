"""Numbers as results.json holds them: with a unit, with an interval."""

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, model_validator

from funcprobe.statistics.intervals import student

if TYPE_CHECKING:
    from funcprobe.statistics.intervals import Error


class Section(BaseModel):
    """An object of results.json or manifest.json: immutable, with no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Quantity(Section):
    """A number with its unit."""

    value: float
    """In `unit`."""
    unit: str
    """The unit; "1" for a ratio."""
    normalised_by: str
    """What the number is an average over, is relative to, or is computed from."""


class Interval(Section):
    """A 95 % confidence interval, in the unit of the number that it belongs to."""

    low: float
    """Lower bound."""
    high: float
    """Upper bound."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"the upper bound {self.high:g} is below the lower, {self.low:g}")
        return self

    @property
    def half_width(self) -> float:
        """(high - low) / 2."""
        return (self.high - self.low) / 2


class StudentInterval(Interval):
    """A 95 % confidence interval from Student's t."""

    degrees_of_freedom: float
    """Of Student's t."""


def quantity(value: float, unit: str, normalised_by: str) -> Quantity:
    """A number with its unit and what it is normalised by."""
    return Quantity(value=value, unit=unit, normalised_by=normalised_by)


def student_interval(value: float, error: "Error") -> StudentInterval:
    """95 %, with the degrees of freedom by which the standard error becomes an interval."""
    low, high = student(value, error)
    return StudentInterval(low=low, high=high, degrees_of_freedom=error.dof)
