"""What attribution costs a run: the level "summary" against "off", in turns, every stage computed anew.

    python benchmarks/attribution_cost.py configs/quickstart.toml --times 3
    python benchmarks/attribution_cost.py configs/smollm2.toml --times 2 --out smollm2.json

Each run is a process of its own. Seconds by the clock vary with what else the machine does, processor
seconds hardly; passes are those of results.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LEVELS = ("off", "summary")
BOUND = 1.1  # times a run at "off"


def run(config: Path, level: str, folder: Path, changes: list[str]) -> dict[str, Any]:
    """One run: seconds by the clock and of the processor, and by stage; passes over E and U."""
    name = f"{config.stem}-{level}"
    given = [f'run.folder="{folder}"', f'run.name="{name}"', f'attribution.level="{level}"', *changes]
    before = os.times()
    command = [sys.executable, "-c", "from funcprobe.adapters.cli import main; main()", "run"]
    command += [str(config), "--fresh", *(x for one in given for x in ("--set", one))]
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
    cost = results["cost"]
    return {
        "level": level,
        "seconds": after.elapsed - before.elapsed,
        "processor": sum(after[2:4]) - sum(before[2:4]),
        "passes": cost["total"]["passes"],
        "stages": {stage["stage"]: stage["seconds"] for stage in cost["stages"]},
        "errors": errors(results),
    }


def errors(results: dict[str, Any]) -> dict[str, float] | None:
    """The error of the derivative by draws and by blocks; the latter lacks the term of D'."""
    if results["attribution"] is None:
        return None
    return {
        "by draws": results["first_order"]["se_given_U"]["value"],
        "by blocks": results["attribution"]["whole"]["se"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--times", type=int, default=3, help="pairs of runs")
    parser.add_argument("--set", action="append", default=[], help="as of funcprobe run")
    parser.add_argument("--out", type=Path, help="JSON of every run")
    arguments = parser.parse_args()
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.times):
            for level in LEVELS if turn % 2 == 0 else LEVELS[::-1]:
                done.append(run(arguments.config, level, Path(folder), arguments.set))
                print(json.dumps(done[-1]), flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(done, indent=2), encoding="utf-8")
    for of in ("seconds", "processor"):
        by = {level: [one[of] for one in done if one["level"] == level] for level in LEVELS}
        ratios = [b / a for a, b in zip(by["off"], by["summary"], strict=True)]
        print(
            f"{arguments.config.stem}, {of}: off {statistics.median(by['off']):.1f}, summary "
            f"{statistics.median(by['summary']):.1f}; ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} pairs; bound {BOUND})"
        )


if __name__ == "__main__":
    main()
