"""Runs that are killed at random moments, again and again, against an undisturbed one, byte by byte.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--every 1.0] [--folder /tmp/kills]

`funcprobe run` on the built-in toy policy, in small microbatches, in a process of its own that gets
SIGKILL after a delay drawn over the work of the undisturbed run, counted from the first microbatch or
batch that it finishes; then again on the same folder until one ends by itself, and again on a new
folder until there were so many kills. Compared are results.json
without `cost`, and every Parquet and safetensors file of the run. Work lost: microbatches, or batches
of responses, that were done and are done again, and the seconds since the last that is not.
`--every`: seconds between two writes of progress (`adapters/resume.py`).
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcprobe.adapters import resume, run, whatif  # noqa: F401 loaded once, before the processes
from funcprobe.adapters.cli import main as funcprobe_main

SETTINGS = {
    "run.name": "killed",
    "run.seed": 1,
    "run.max_tokens": 64,
    "run.report": False,
    "policy.checkpoint": "toy",
    "policy.dtype": "float64",
    "prompts.source": "toy",
    "sampling.B_E": 64,
    "sampling.B_U": 6,
    "sampling.G": 4,
    "sampling.max_new_tokens": 8,
    "sampling.generation_batch": 8,
    "measure.etas": [1e-5, 1e-3, 30.0],
    "measure.resample": True,
    "measure.observables": ["length", "reward", "kl_base"],
    "measure.second_order": "exact",
    "attribution.influence": 2,
}


class Attempt(NamedTuple):
    """How a process ended, and what it did by then: (what, seconds since the start)."""

    killed: bool
    status: int
    seconds: float
    done: list[tuple[str, float]]


class Loss(NamedTuple):
    """Of one kill."""

    parts: int
    seconds: float
    where: str


def main() -> int:
    """Exit status 1 if a run was not the undisturbed one, or could not be resumed."""
    asked = arguments()
    torch.set_num_threads(1)
    shutil.rmtree(asked.folder, ignore_errors=True)
    attempt(asked, "first", None)  # makes the toy policy, if it is not there
    whole = attempt(asked, "whole", None)
    assert whole.status == 0, "the undisturbed run failed"
    size = f"{whole.seconds:.1f} s, {len(whole.done)} microbatches and batches"
    print(f"undisturbed: {size}; seed {asked.seed}", flush=True)
    expected = contents(asked.folder / "whole/killed")
    work = whole.seconds - whole.done[0][1]
    rng, losses, delays = random.Random(asked.seed), list[Loss](), list[float]()
    bad, chains = list[str](), 0
    while len(losses) < asked.kills:
        chains += 1
        name, attempts = f"chain-{chains}", list[Attempt]()
        while not attempts or attempts[-1].killed:
            delay = rng.uniform(0, work) if len(losses) + len(attempts) < asked.kills else None
            attempts.append(attempt(asked, name, delay))
            delays += [delay] if delay is not None and attempts[-1].killed else []
        losses += lost(attempts)
        bad += judged(asked.folder / name, attempts[-1], expected, name)
        shutil.rmtree(asked.folder / name)
    report(losses, delays, bad, chains)
    return 1 if bad else 0


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=resume.EVERY)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/kills"))
    return parser.parse_args()


def attempt(asked: Any, name: str, delay: float | None) -> Attempt:
    """A run in a forked process, killed `delay` seconds after its first note; None: never."""
    folder = asked.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "done.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        probed(folder, log, start, asked.every)
    ended = 0
    if delay is not None:
        while not (ended or (log.is_file() and log.stat().st_size)):
            time.sleep(0.01)
            ended, result = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
    if not ended:
        result = os.waitpid(child, 0)[1]
    status = os.waitstatus_to_exitcode(result)
    seconds = time.monotonic() - start
    lines = log.read_text().splitlines() if log.is_file() else []
    pairs = [line.split() for line in lines if line.count(" ") == 1]
    return Attempt(status == -signal.SIGKILL, status, seconds, [(a, float(b)) for a, b in pairs])


def probed(folder: Path, log: Path, start: float, every: float) -> None:
    """The child: `funcprobe run`, each microbatch noted when it is done."""
    keep = resume._Pass.keep
    resume.EVERY = every
    if every == 0:
        resume.SHARE = float("inf")
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(self: Any, *given: Any) -> None:
        os.write(notes, f"{self.path.name}:{self.parts + 1} {time.monotonic() - start:.6f}\n".encode())
        keep(self, *given)

    resume._Pass.keep = noted  # type: ignore[method-assign]
    said = os.open(folder / "said.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    given = SETTINGS | {"run.folder": str(folder)}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in given.items()]
    config = folder / "c.toml"
    config.touch()
    sys.argv = ["funcprobe", "run", str(config), *sets]
    funcprobe_main()


def lost(attempts: list[Attempt]) -> list[Loss]:
    """What each kill cost: what was done before it, and again after it."""
    found = []
    for i, one in enumerate(attempts):
        if not one.killed:
            continue
        again = Counter(what for later in attempts[i + 1 :] for what, _ in later.done)
        twice = [what for what, _ in one.done if again[what]]
        kept = [when for what, when in one.done if not again[what]]
        since = one.seconds - max(kept, default=one.done[0][1] if one.done else one.seconds)
        last = one.done[-1][0].split("-")[0] if one.done else "start"
        found.append(Loss(len(twice), since if one.done else 0.0, last))
    return found


def judged(folder: Path, last: Attempt, expected: dict[str, bytes], name: str) -> list[str]:
    """What is wrong with a run that was killed and resumed; nothing."""
    if last.status != 0:
        said = (folder / "said.log").read_text().splitlines()
        return [f"{name} cannot be resumed: status {last.status}: {said[-1] if said else ''}"]
    found = contents(folder / "killed")
    bad = [f"{name}: {file} is missing" for file in expected.keys() - found.keys()]
    bad += [f"{name}: {file} differs" for file in found if found[file] != expected.get(file)]
    left = [path.name for path in (folder / ".stages").glob(f"*.{resume.SUFFIX}")]
    return bad + [f"{name}: {file} is left" for file in left]


def contents(run_folder: Path) -> dict[str, bytes]:
    results = json.loads((run_folder / "results.json").read_text())
    del results["cost"]
    found = {"results.json": json.dumps(results, sort_keys=True).encode()}
    for kind in ("parquet", "safetensors"):
        found |= {str(p.relative_to(run_folder)): p.read_bytes() for p in run_folder.rglob(f"*.{kind}")}
    return found


def report(losses: list[Loss], delays: list[float], bad: list[str], chains: int) -> None:
    print(f"{len(losses)} kills, {chains} runs resumed to their ends")
    print("delays: " + " ".join(f"{delay:.2f}" for delay in delays))
    hit = Counter(one.where for one in losses)
    print("last done before the kill: " + ", ".join(f"{what} {n}" for what, n in hit.most_common()))
    for what, values in (
        ("microbatches done again per kill", [float(one.parts) for one in losses]),
        ("seconds since the last that is not", [one.seconds for one in losses]),
    ):
        print(f"{what}: median {statistics.median(values):.2f}, worst {max(values):.2f}")
    wrong = {line.split(":")[0].split()[0] for line in bad}
    print(f"runs that differ or cannot be resumed: {len(wrong)}")
    for line in bad:
        print("  " + line)


if __name__ == "__main__":
    sys.exit(main())
