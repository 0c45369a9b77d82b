"""Long parametrisations: some cases in the default suite, all of them with -m slow."""

from collections.abc import Iterable
from typing import Any

import pytest

Case = type(pytest.param())


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """The cases, all but the first `count` marked slow. A tuple has the values of several arguments."""
    given = [
        c if isinstance(c, Case) else pytest.param(*c) if type(c) is tuple else pytest.param(c)
        for c in cases
    ]
    slow = [pytest.param(*c.values, marks=[*c.marks, pytest.mark.slow], id=c.id) for c in given[count:]]
    return given[:count] + slow
