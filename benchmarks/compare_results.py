"""Are two runs' results.json equal in every number but their cost?

    python benchmarks/compare_results.py OLD NEW

OLD and NEW are folders: a run folder, or a folder of run folders, compared by name. What only one of
them has, and every text that differs, is listed; a number that differs, or an entry that is missing in
NEW, makes the exit status 1. Entries that only NEW has are allowed: results.json may grow.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NOT_COMPARED = {"cost"}  # seconds, memory, and which stages an earlier run had stored


class Leaf(NamedTuple):
    """One entry of the document that is no object and no list."""

    place: str
    value: Any


def leaves(value: Any, place: str = "") -> Iterator[Leaf]:
    """Every leaf with its place, as in sweep[2].measured.value; an empty container is one."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if place or key not in NOT_COMPARED:
                yield from leaves(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}[{number}]")
    else:
        yield Leaf(place, value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], int, bool]:
    """(lines about what differs, numbers that are equal, whether all that OLD has is in NEW and equal).

    Numbers are compared exactly; texts may change their wording.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    lines, equal, same = [], 0, True
    for place, value in before.items():
        if place not in after:
            lines.append(f"missing: {place} was {value!r}")
            same = False
        elif is_number(value) and value == after[place] and is_number(after[place]):
            equal += 1
        elif value != after[place]:
            wording = isinstance(value, str) and isinstance(after[place], str)
            lines.append(
                f"{'wording' if wording else 'differs'}: {place}: {value!r} -> {after[place]!r}"
            )
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
