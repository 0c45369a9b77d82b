"""Tables as a notebook shows them: HTML of text alone, in the colours that are there, light or dark."""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

Row: TypeAlias = Sequence[str]
"""A name, and what is said of it."""

LEFT = "text-align: left"


def html_table(title: str, header: Sequence[str], rows: Sequence[Row], note: str = "") -> str:
    """A table with a title above and a note below; everything in it is escaped text.

    Without classes, colours or scripts, so that it looks as its surroundings do. The first cell of a
    row is its heading; a header of empty texts is left out.
    """
    head = "".join(f'<th scope="col" style="{LEFT}">{escape(name)}</th>' for name in header)
    body = "".join(_row(row) for row in rows)
    return (
        f'<table><caption style="caption-side: top; {LEFT}">{escape(title)}</caption>'
        + (f"<thead><tr>{head}</tr></thead>" if any(header) else "")
        + f"<tbody>{body}</tbody></table>"
        + (f"<p>{escape(note)}</p>" if note else "")
    )


def _row(row: Row) -> str:
    name, *cells = map(escape, row)
    rest = "".join(f'<td style="{LEFT}">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row" style="{LEFT}">{name}</th>{rest}</tr>'
