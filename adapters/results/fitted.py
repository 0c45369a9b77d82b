"""Prose in the width of a terminal, in lines that are counted: what is printed fits on a screen."""

from rich.console import Console
from rich.text import Text

WIDEST = 120  # columns: longer lines are hard to read


def fitted(line: str, console: Console, *, label: str = "", most: int | None = None) -> list[Text]:
    """A line in the console's width, broken at words; those after the first stand below its text.

    The text begins after `label`; without one, lines after the first are indented by two columns.
    Beyond `most` lines it ends in "...". Nothing in it is markup; widths are those of a terminal, as of
    east Asian characters.
    """
    hang = len(label) or 2
    width = min(console.width, WIDEST) - hang
    lines = list(Text(line).wrap(console, width, tab_size=4))
    if most is not None and len(lines) > most:
        lines = lines[:most]
        lines[-1].rstrip()
        lines[-1].truncate(width - 4)
        lines[-1].append(" ...")
    for i, one in enumerate(lines):
        one.rstrip()
        lines[i] = Text(" " * hang if i else label) + one
    return lines
