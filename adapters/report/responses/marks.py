"""Texts of models as HTML in which everything is visible and nothing is obeyed."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

# What shows nothing of itself, turns the direction of what follows, or is no character: controls,
# format characters, fillers, tags, non-characters. Joiners and variation selectors stay, which emoji
# and several scripts are written with.
UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e"
    "\u200f\u2028-\u202e\u2060-\u206f\u3164\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff"
)
# A single space between words is seen by its gap; others are marked.
MARKS = re.compile(
    r"(?P<space> {2,}|(?<!\S) | (?!\S))|(?P<line>\n)|(?P<tab>\t)"
    r"|(?P<wide>[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000])"
    f"|(?P<control>[{UNSEEN}])"
)
CONTROL = re.compile(f"[{UNSEEN}]")
ELEMENTS = {"space": "m-s", "line": "m-n", "tab": "m-t", "wide": "m-w", "control": "m-c"}


class Marked(NamedTuple):
    """The text of a response as HTML, and how many UTF-16 units of it are of each token."""

    html: Markup
    units: list[int]


def mark(tokens: Sequence[str], special: Sequence[bool], levels: Sequence[str]) -> Marked:
    """The tokens' text, neighbours of one level in one element of that name; level "": in none.

    In it <m-s>: spaces where a gap would not show them; <m-n>: a line's end; <m-t>: a tab; <m-w>:
    another space; <m-c>: the name of a character that is not seen; <m-k>: a special token; <m-p>: a
    token without text of its own, a piece of a character that a later one completes.
    """
    text = "".join(tokens)
    marks = _Marks(text)
    pieces: list[str] = []
    position = 0
    for start, end in _runs(levels):
        inner: list[str] = []
        plain = position
        for i in range(start, end):
            after = position + len(tokens[i])
            if special[i] or not tokens[i]:
                inner += marks.between(plain, position)
                inner.append(_whole(tokens[i]))
                marks.skip(after)
                plain = after
            position = after
        inner += marks.between(plain, position)
        if levels[start]:
            inner = [f"<{levels[start]}>", *inner, f"</{levels[start]}>"]
        pieces += inner
    return Marked(Markup("".join(pieces)), [shown_units(token) for token in tokens])


def mark_text(text: str) -> Markup:
    """A text that is not divided into tokens."""
    return mark([text], [False], [""]).html


def shown_units(text: str, known: dict[str, int] = {}) -> int:  # noqa: B006
    """UTF-16 units of the text as shown, by which a script counts."""
    found = known.get(text)
    if found is None:
        shown = CONTROL.sub(lambda m: _name(m.group()), text)
        found = known[text] = len(shown.encode("utf-16-le")) // 2
    return found


def _runs(levels: Sequence[str]) -> Iterator[tuple[int, int]]:
    if not levels:
        return iter(())
    names: npt.NDArray[np.str_] = np.asarray(levels)
    edges = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
    return itertools.pairwise(edges)


class _Marks:
    """The marks of a text, in its order, as parts of it are written."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found = MARKS.finditer(text)
        self.next = next(self.found, None)

    def between(self, start: int, end: int) -> list[str]:
        """HTML of text[start:end]; starts are asked for in ascending order."""
        pieces: list[str] = []
        while self.next is not None and self.next.start() < end:
            first, last = max(self.next.start(), start), min(self.next.end(), end)
            kind = str(self.next.lastgroup)
            shown = _name(self.text[first]) if kind == "control" else self.text[first:last]
            pieces.append(escape(self.text[start:first]))
            pieces.append(f"<{ELEMENTS[kind]}>{shown}</{ELEMENTS[kind]}>")
            start = last
            if self.next.end() > end:
                break
            self.next = next(self.found, None)
        pieces.append(escape(self.text[start:end]))
        return pieces

    def skip(self, position: int) -> None:
        """Leave out the marks of the text before `position`."""
        while self.next is not None and self.next.end() <= position:
            self.next = next(self.found, None)


def _whole(token: str) -> str:
    if not token:
        return "<m-p></m-p>"
    return f"<m-k>{escape(CONTROL.sub(lambda m: _name(m.group()), token))}</m-k>"


def escape(text: str) -> str:
    """For the content of an element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _name(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # ␀ to ␟
    return "␡" if code == 0x7F else f"U+{code:04X}"
