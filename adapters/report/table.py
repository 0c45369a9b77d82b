"""A table of a page: its caption, its columns, and rows that begin with what they are of."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

Cell = str | Markup | None
Fact = tuple[str, Markup | str]
"""A term, and what was found of it."""


class Column(NamedTuple):
    """A heading, and what its numbers are of."""

    name: str | Markup
    of: str | Markup = ""
    """In small type under the name, as a unit or what the interval covers."""
    text: bool = False
    """Whether it holds words, which are set left and may be broken into lines."""
    wide: bool = False
    """Whether these are sentences."""


class Row(NamedTuple):
    """The first cell heads the row."""

    cells: Sequence[Cell]
    marked: bool = False
    """Whether it is the row that matters, as that of the next learning rate."""


class Table(NamedTuple):
    """As `tables.html.j2` draws it."""

    caption: str | Markup
    """What it shows, n, and what intervals cover."""
    columns: Sequence[Column]
    rows: Sequence[Row]
    label: str
    """Its name for a screen reader, unlike that of any other table of the page."""


def table(
    label: str, caption: str | Markup, columns: Iterable[Column | str], rows: Iterable[Sequence[Cell]]
) -> Table:
    """Without a marked row; a column by its name alone has words."""
    named = [Column(c, text=True) if isinstance(c, str) else c for c in columns]
    return Table(caption, named, [Row(cells) for cells in rows], label)
