"""Tests and costs of every pass on a GPU, in eight minutes at most.

    python benchmarks/gpu.py --out FOLDER [--device cuda] [--only STEP ...]
    python benchmarks/gpu.py --out FOLDER --tiny --device cpu

Steps, the most valuable first, each a process with a time limit of its own: the tests of -m device;
what every pass costs at Qwen2.5-0.5B's shape, long sequences first; the quickstart; an eighth of the
published experiment, with its sampling; a profile of one microbatch of gradient and of tangents, linear
layers in three products of TF32, torch.compile; the passes at 1.5B's shape. A step writes
FOLDER/STEP.json as it goes, and after each FOLDER/GPU.md is written anew, so that whatever ends this
early loses a step at most; all that steps print is in FOLDER/log.txt. After a step that fails the rest
goes on, and the exit status is 1. The second command runs the same code at tiny shapes.

benchmarks/GPU.md states how to run it where nothing can be installed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

SECONDS = {  # of each step at most
    "tests": 95,
    "passes-0.5B": 100,
    "quickstart": 50,
    "published": 90,
    "profile": 80,
    "passes-1.5B": 60,
}
WHOLE = 475  # of all steps together: of the last ones, what is left
PATIENCE = 5  # times as long with --tiny, which shows that the code runs, also on a busy machine
LEAST = 10  # with less left a step is not begun: torch takes as long to load


class Place(NamedTuple):
    """What the steps run on."""

    out: Path
    device: str
    tiny: bool


class Report:
    """What a step has found so far, in its file at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"status": "running", "machine": None, "tables": {}}
        self._write()

    def machine(self, line: str) -> None:
        self.content["machine"] = line
        self._write()

    def row(self, table: str, **cells: Any) -> None:
        """One row more of a table, whose columns are those of its first row."""
        self.content["tables"].setdefault(table, []).append(cells)
        self._write()
        print(table, cells, flush=True)

    def _write(self) -> None:
        _write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder; eight files at most")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same code at tiny shapes")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="STEP")
    parser.add_argument("--step", choices=SECONDS, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args()
    place = Place(args.out.absolute(), args.device, args.tiny)
    place.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        from gpu_steps import STEPS  # torch loads here, in the step's process alone

        STEPS[args.step](place, Report(place.out / f"{args.step}.json"))
        return
    sys.exit(0 if run_all(place, args.only) else 1)


def run_all(place: Place, names: list[str], whole: float = WHOLE) -> bool:
    """Whether all steps passed; each leaves its file, and the summary is written after each."""
    patience = PATIENCE if place.tiny else 1
    end = time.monotonic() + whole * patience
    found: dict[str, dict[str, Any]] = {}
    with (place.out / "log.txt").open("a", encoding="utf-8") as log:
        for name in names:
            left = min(float(SECONDS[name] * patience), end - time.monotonic())
            command = [sys.executable, __file__, "--step", name, "--out", str(place.out)]
            command += ["--device", place.device, *(["--tiny"] if place.tiny else [])]
            path = place.out / f"{name}.json"
            found[name] = run_step(command, path, left, log) if left >= LEAST else _not_begun(path)
            _write_whole(place.out / "GPU.md", summary(found, place))
            print(f"{name}: {found[name]['status']} in {found[name]['seconds']:.0f} s", flush=True)
    return all(step["status"] == "passed" for step in found.values())


def run_step(command: list[str], path: Path, limit: float, log: TextIO) -> dict[str, Any]:
    """What the step left in `path`, with how it ended; its process and its children's end with it."""
    path.unlink(missing_ok=True)
    start = time.monotonic()
    print(f"\n== {path.stem}, {limit:.0f} s at most", file=log, flush=True)
    at = log.tell()
    env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # A group of its own, so that what it started ends with it.
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0)
    try:
        code = process.wait(limit)
        status = "passed" if code == 0 else f"failed, exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped at its limit of {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tables": {}}
    content |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "passed":
        content["error"] = _last_line(log.name, at)
    _write_whole(path, json.dumps(content, indent=1) + "\n")
    return content


def summary(found: Mapping[str, Mapping[str, Any]], place: Place) -> str:
    """Markdown: the machine, then every step with its tables."""
    what = f"Measured on {place.device}"
    if place.tiny:
        what = f"Tiny shapes on {place.device}: that the code runs, and nothing about speed"
    machines = [step["machine"] for step in found.values() if step.get("machine")]
    parts = [f"# {what}", *machines[:1]]
    for name, step in found.items():
        parts.append(f"## {name}\n\n{step['status']}, {step['seconds']:.0f} s")
        parts += [f"`{step['error']}`"] if step.get("error") else []
        for title, rows in step["tables"].items():
            columns = list(rows[0])
            lines = [columns, ["---"] * len(columns)]
            lines += [[_cell(row.get(column)) for column in columns] for row in rows]
            table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
            parts.append(f"**{title}**\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _not_begun(path: Path) -> dict[str, Any]:
    content = {"status": "not begun: no time was left", "seconds": 0.0, "tables": {}}
    _write_whole(path, json.dumps(content, indent=1) + "\n")
    return content


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "/")[:160]


def _last_line(path: str, start: int) -> str:
    """The last line that a step printed: of a traceback, the error."""
    with Path(path).open(encoding="utf-8", errors="replace") as log:
        log.seek(start)
        lines = [line.strip() for line in log if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
