"""Text of a data set, a model or a file name in a page: what cannot be seen is made visible."""

import re
import unicodedata
from typing import Any

from markupsafe import Markup

KEPT = "\t\n"  # white space of a page
JOINERS = "\u200c\u200d"  # of Persian and Hindi words, and of one emoji from several
PICTURES = 0x2400  # Unicode's pictures of the control characters, from U+0000
DELETE = 0x7F
PICTURE_OF_DELETE = "\u2421"
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

# Whatever is neither printable ASCII nor surely visible; the categories decide.
_SUSPECT = re.compile(r"[^\t\n\x20-\x7e\xa1-\xac\xae-\u05ff]")


def visible(text: str) -> str:
    """The text with control, direction, invisible and unassigned characters written out.

    Control characters as their pictures, ESC as ␛; others by their number, as ⟨U+202E⟩, so that no
    text changes the order in which it is read, or contains what is not seen. To be escaped still.
    """
    return _SUSPECT.sub(lambda found: _shown(found.group()), text.replace("\r\n", "\n"))


def finalized(value: Any) -> Any:
    """What a template prints: text made visible, markup of this package as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def sentence(line: str) -> str:
    """A line as it is printed, as a sentence: with a full stop, a capital if it begins with a word."""
    ended = line if line.endswith((".", "?", "!", ":")) else line + "."
    return ended[:1].upper() + ended[1:] if ended.split(maxsplit=1)[0].isalpha() else ended


def _shown(character: str) -> str:
    code = ord(character)
    if character in KEPT or character in JOINERS or unicodedata.category(character) not in UNSEEN:
        return character
    if code < 0x20:
        return chr(PICTURES + code)
    return PICTURE_OF_DELETE if code == DELETE else f"⟨U+{code:04X}⟩"
