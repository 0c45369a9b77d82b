"""What every table of the configuration shares: immutable, unknown keys rejected."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A table of the file: immutable, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _without_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no path, name or prompt has one
            raise ValueError("contains a NUL character, plain text is expected")
        return value


def size_or_auto(value: Any) -> Any:
    """The value; ValueError, one instead of one for each type, unless it is a size or "auto"."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (whole and value >= 1):
        raise ValueError('a whole number of at least 1, or "auto", is expected')
    return value
