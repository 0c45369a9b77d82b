"""Are two runs' results.json equal in every number but their cost?

    python benchmarks/compare_results.py OLD NEW

OLD and NEW are folders: a run folder, or a folder of run folders, compared by name. Exit status 1 for
a number that differs, alone or within a text, for a choice that differs (a verdict, a method, a name),
for another length of a list, and for an entry that is missing in NEW. Sentences (WORDING) may be
phrased differently, and NEW may have entries that OLD has not; both are listed.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NOT_COMPARED = {"cost"}  # seconds, memory, and which stages an earlier run had stored
WORDING = {  # entries that are sentences: their numbers are compared, their words are not
    *("what", "unit", "normalised_by", "reason", "verdict_reason", "healthy"),
    *("sign", "se", "interval", "names", "saw", "bound", "failure_means"),
}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


class Leaf(NamedTuple):
    """One entry of the document that is no object and no list."""

    place: str
    value: Any


def leaves(value: Any, place: str = "") -> Iterator[Leaf]:
    """Every leaf with its place, as in sweep[2].measured.value, and the length of every list."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if place or key not in NOT_COMPARED:
                yield from leaves(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        yield Leaf(f"length of {place}", len(value))
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}[{number}]")
    else:
        yield Leaf(place, value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def only_words_differ(place: str, old: Any, new: Any) -> bool:
    """Whether both are sentences of one entry with the same numbers in the same order."""
    sentences = isinstance(old, str) and isinstance(new, str) and place.rsplit(".", 1)[-1] in WORDING
    return sentences and NUMBER.findall(old) == NUMBER.findall(new)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], int, bool]:
    """(lines about differences, equal numbers, whether all that OLD has is in NEW and equal)."""
    before, after = dict(leaves(old)), dict(leaves(new))
    lines, equal, same = [], 0, True
    for place, value in before.items():
        if place not in after:
            lines.append(f"missing: {place} was {value!r}")
            same = False
            continue
        found = after[place]
        if is_number(value) and is_number(found) and value == found:
            equal += 1
        elif type(value) is not type(found) or value != found:
            wording = only_words_differ(place, value, found)
            lines.append(f"{'wording' if wording else 'differs'}: {place}: {value!r} -> {found!r}")
            same &= wording
    lines += [f"new: {place} is {after[place]!r}" for place in after if place not in before]
    return lines, equal, same


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Run name -> results.json, of one run folder or of all in a folder."""
    files = [folder / "results.json", *sorted(folder.glob("*/results.json"))]
    return {f.parent.name: json.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old, new = documents(arguments.old), documents(arguments.new)
    if len(old) == len(new) == 1:
        new = dict(zip(old, new.values(), strict=True))
    if not old or old.keys() != new.keys():
        sys.exit(f"runs in OLD: {sorted(old) or 'none'}; in NEW: {sorted(new) or 'none'}")
    equal_runs = 0
    for name in old:
        lines, equal, same = compare(old[name], new[name])
        equal_runs += same
        print(f"{name}: {equal} numbers are equal; {'no number differs' if same else 'NOT THE SAME'}")
        for line in lines:
            print(f"  {line}")
    print(f"{equal_runs} of {len(old)} runs are equal in every number but cost")
    sys.exit(0 if equal_runs == len(old) else 1)


if __name__ == "__main__":
    main()
