"""Folders that `datasets` loads: a card in them may name files elsewhere, which are not followed."""

from pathlib import Path, PurePosixPath
from typing import Any

from funcprobe.types import InputError

CARD, SETTINGS = "README.md", ".huggingface.yaml"


def require_own_files(folder: Path) -> None:
    """InputError for a folder whose card has data files at an address, or outside the folder.

    A data set that is given as a folder is read without a network.
    """
    from huggingface_hub.repocard import metadata_load

    if (folder / SETTINGS).is_file():
        raise InputError(f"{folder / SETTINGS} may name data files elsewhere: delete it")
    card = folder / CARD
    if not card.is_file():
        return
    try:
        found = metadata_load(card) or {}
    except Exception as error:
        # PyYAML's own kinds of exception, and those of huggingface_hub for a header that is no table.
        raise InputError(
            f"{card}: its header cannot be read ({type(error).__name__}): correct or delete it"
        ) from error
    for name in _texts([found.get(key) for key in ("configs", "data_files")], 0):
        path = PurePosixPath(name)
        if "://" in name or path.is_absolute() or ".." in path.parts:
            raise InputError(
                f"{card} names data files outside its folder, {name!r:.120}: copy them into it, or "
                "give the data set's name on the Hub"
            )


def _texts(value: Any, depth: int) -> list[str]:
    if isinstance(value, str):
        return [value]
    if depth > 10:
        raise InputError("a data set's card is nested more than 10 deep: it is damaged")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _texts(part, depth + 1)]
