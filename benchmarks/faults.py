"""Faults of disk, files, signals and a trainer that writes; pairs of runs at once. A Markdown table.

    python benchmarks/faults.py --times 5 --pairs 20

Every case is a whole run of a tiny policy in a process of its own, forked where the imports are done.
After each the folder is looked through for incomplete files, every stored stage is verified by its
checksum, and the same command runs again: its results are compared bit for bit with an undisturbed
run's, and no stage that was stored may be computed again.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
torch.set_num_threads(1)

from funcprobe.adapters import run, store  # noqa: E402, F401 (imported before the forks)
from funcprobe.adapters.cli import main  # noqa: E402
from funcprobe.adapters.store import sealed  # noqa: E402
from support.checkpoints import Checkpoint, edit_json, make_checkpoint, sets  # noqa: E402

ETAS = [1e-4, 1e-3]
DAY = 86_400


class Ended(NamedTuple):
    """How a run ended."""

    status: int
    said: str  # its last line


class Case(NamedTuple):
    """A fault: how it is brought about, and what may follow."""

    name: str
    prepare: Callable[[Path, random.Random], None] | None = None  # in the run's own process
    beside: Callable[[int, Path, random.Random], None] | None = None  # in the parent, with its pid
    before: Callable[[Path, random.Random], None] | None = None  # of a folder with stored stages


def started(folder: Path, settings: dict[str, Any], prepare: Callable[[], None] | None = None) -> int:
    """The process of a run, forked."""
    child = os.fork()
    if child:
        return child
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL if one != signal.SIGINT else signal.default_int_handler)
    path, flags = folder / f"said-{settings['run.name']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    said = os.open(path, flags, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 1  # of a traceback, which `ended` finds
    try:
        os.chdir(folder)
        if prepare is not None:
            prepare()
        sys.argv = ["funcprobe", "run", "c.toml", *sets(settings)]
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what the parent opened is the parent's to close


def ended(child: int, folder: Path, name: str = "one") -> Ended:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path = folder / f"said-{name}"
    said = path.read_text(errors="replace") if path.exists() else ""  # killed before it began
    if "Traceback" in said:
        raise SystemExit(f"a traceback:\n{said}")
    lines = [
        line
        for line in said.splitlines()
        if line.startswith("funcprobe: ") or "computed again" in line or "was deleted" in line
    ]
    return Ended(status, lines[-1].removeprefix("funcprobe: ") if lines else "nothing")


def results(folder: Path, name: str = "one") -> dict[str, Any]:
    """What a run wrote, without what is of the machine: seconds, memory, its name and place."""
    place = folder / "runs" / name
    document = json.loads((place / "results.json").read_text())
    document.pop("cost")
    found: dict[str, Any] = {"results.json": document}
    for path in sorted(place.rglob("*")):
        if path.suffix in (".parquet", ".safetensors"):
            found[path.name] = path.read_bytes()
    return found


def incomplete(runs: Path) -> list[str]:
    """Files that are neither of a whole run nor stages, and stages that are damaged."""
    found = []
    for path in runs.rglob("*") if runs.exists() else ():
        inside = path.relative_to(runs).parts
        if any(part.startswith(".") and part != ".stages" for part in inside):
            found.append("/".join(inside))
        elif inside[0] == ".stages" and path.suffix == ".safetensors" and path.is_file():
            try:
                sealed.unseal(path.read_bytes(), {})
            except sealed.Damaged as error:
                found.append(f"{path.name} {error}")
        elif inside[0] != ".stages" and len(inside) == 1 and not (path / "manifest.json").is_file():
            found.append(path.name)
    return found


# Faults


def failing_writes(number: int, _: Path, rng: random.Random) -> None:
    """At one of the writes half of it is there, and then an error; so are all that follow."""
    at, count = rng.randrange(1, 40), 0

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count < at:
                return write(*args, **kwargs)
            if isinstance(args[0], Path):
                half = args[1][: len(args[1]) // 2]
                args[0].open("wb" if isinstance(half, bytes) else "w").write(half)
            raise OSError(number, os.strerror(number))

        return wrapped

    for name in ("write_text", "write_bytes"):
        setattr(Path, name, failing(getattr(Path, name)))
    pq.write_table = failing(pq.write_table)


def failing_renames(number: int, often: int, _: Path, rng: random.Random) -> None:
    """From one of the renames on `often` in a row fail."""
    at, count, replace = rng.randrange(1, 25), 0, Path.replace

    def failing(here: Path, there: Path) -> Path:
        nonlocal count
        count += 1
        if at <= count < at + often:
            raise OSError(number, os.strerror(number))
        return replace(here, there)

    Path.replace = failing  # type: ignore[method-assign,assignment]


def no_temporary_folder(*_: Any) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        os.environ[name] = "/nowhere"
    tempfile.tempdir = "/nowhere"


def later(rng: random.Random, seconds: float) -> None:
    time.sleep(rng.uniform(0, seconds))


def signalled(number: int, seconds: float, child: int, _: Path, rng: random.Random) -> None:
    later(rng, seconds)
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return


def deleted(name: str, seconds: float, _: int, folder: Path, rng: random.Random) -> None:
    later(rng, seconds)
    shutil.rmtree(folder / name, ignore_errors=True)


def damaged(folder: Path, rng: random.Random) -> None:
    """A stored stage: a byte changed, cut off, or another's content."""
    stages = [one.path for one in store.stored(folder / "runs/.stages")]
    path, how = rng.choice(stages), rng.randrange(3)
    data = bytearray(path.read_bytes())
    if how == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[rng.randrange(len(data)) :]
    else:
        data = bytearray(rng.choice([p for p in stages if p != path]).read_bytes())
    path.write_bytes(data)
    shutil.rmtree(folder / "runs/one")


def clock(days: int, *_: Any) -> None:
    """Jumps at every second look, back or forth."""
    now, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return now() + days * DAY * (looks[0] % 2)

    time.time = jumping


def cases(seconds: float) -> list[Case]:
    def writes(number: int) -> Callable[[Path, random.Random], None]:
        return partial(failing_writes, number)

    def renames(number: int, often: int) -> Callable[[Path, random.Random], None]:
        return partial(failing_renames, number, often)

    def sent(number: int) -> Callable[[int, Path, random.Random], None]:
        return partial(signalled, number, seconds)

    return [
        Case("disk full (ENOSPC), half of a file written", writes(errno.ENOSPC)),
        Case("quota (EDQUOT)", writes(errno.EDQUOT)),
        Case("read-only from some write on (EROFS)", writes(errno.EROFS)),
        Case("rename busy, twice (EBUSY)", renames(errno.EBUSY, 2)),
        Case("rename stale, for good (ESTALE)", renames(errno.ESTALE, 10**6)),
        Case("rename across devices (EXDEV)", renames(errno.EXDEV, 10**6)),
        Case("no temporary folder", no_temporary_folder),
        Case("SIGINT", beside=sent(signal.SIGINT)),
        Case("SIGTERM", beside=sent(signal.SIGTERM)),
        Case("SIGHUP", beside=sent(signal.SIGHUP)),
        Case("SIGKILL", beside=sent(signal.SIGKILL)),
        Case(".stages deleted", beside=partial(deleted, "runs/.stages", seconds)),
        Case("folder of the runs deleted", beside=partial(deleted, "runs", seconds)),
        Case("stored stage damaged, cut off, swapped", before=damaged),
        Case("clock a year back and forth", partial(clock, -365)),
        Case("clock a year forth and back", partial(clock, 365)),
    ]


class Row(NamedTuple):
    """One case, all of its times."""

    name: str
    times: int
    statuses: Counter[int]
    said: Counter[str]
    incomplete: int
    other_results: int
    again: int  # stages that were stored, and computed once more


def tried(case: Case, times: int, settings: dict[str, Any], truth: dict[str, Any], rng: Any) -> Row:
    statuses: Counter[int] = Counter()
    said: Counter[str] = Counter()
    bad = other = again = 0
    for _ in range(times):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            folder = Path(place)
            (folder / "c.toml").touch()
            if case.before is not None:
                ended(started(folder, settings), folder)
                case.before(folder, rng)
            own = random.Random(rng.random())
            prepare = None if case.prepare is None else partial(case.prepare, folder, own)
            child = started(folder, settings, prepare)
            if case.beside is not None:
                case.beside(child, folder, own)
            how = ended(child, folder)
            statuses[how.status] += 1
            said[_without_places(how.said, folder)] += 1
            left = incomplete(folder / "runs")
            if how.status != -signal.SIGKILL:
                bad += bool(left)
            stored = {one.path.name for one in store.stored(folder / "runs/.stages")}
            good = {name for name in stored if not any(name in each for each in left)}
            times_of = {n: (folder / "runs/.stages" / n).stat().st_ino for n in good}
            second = ended(started(folder, settings), folder)
            if second.status:
                raise SystemExit(f"{case.name}: the run after it ends with {second}")
            now = {n: (folder / "runs/.stages" / n).stat().st_ino for n in good}
            again += sum(now[name] != times_of[name] for name in good)
            bad += bool(incomplete(folder / "runs"))
            other += results(folder) != truth
    return Row(case.name, times, statuses, said, bad, other, again)


def _without_places(line: str, folder: Path) -> str:
    return line.replace(str(folder), "FOLDER")[:150]


# A trainer that writes, and pairs


def while_written(
    times: int, checkpoint: Checkpoint, settings: dict[str, Any], truth: Any, seconds: float, rng: Any
) -> Row:
    """The adapter is replaced at a random moment: results of the one, of the other, or none."""
    statuses: Counter[int] = Counter()
    said: Counter[str] = Counter()
    other = 0
    for _ in range(times):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            folder = Path(place)
            (folder / "c.toml").touch()
            shutil.copytree(checkpoint.adapter, folder / "saved")
            given = settings | {"policy.checkpoint": str(folder / "saved")}
            child = started(folder, given)
            later(rng, seconds)
            path = folder / "saved/adapter_model.safetensors"
            data = bytearray(path.read_bytes())
            data[-5] ^= 1  # another number of the same size
            path.write_bytes(data)
            how = ended(child, folder)
            statuses[how.status] += 1
            said[_without_places(how.said, folder)] += 1
            if how.status == 0 and results(folder) != truth:
                found = results(folder)
                shutil.rmtree(folder / "runs")
                ended(started(folder, given), folder)
                other += results(folder) != found  # then of the new adapter
    return Row("trainer writes the adapter", times, statuses, said, 0, other, 0)


def pairs(count: int, settings: dict[str, Any], truth: dict[str, Any], names: tuple[str, str]) -> str:
    statuses: Counter[int] = Counter()
    bad = other = waited = computed = 0
    for _ in range(count):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            folder = Path(place)
            (folder / "c.toml").touch()
            both = [started(folder, settings | {"run.name": name}) for name in names]
            for child, name in zip(both, names, strict=True):
                how = ended(child, folder, name)
                statuses[how.status] += 1
                if how.status and "is in use by process" not in how.said:
                    raise SystemExit(f"a run of a pair ends with {how}")
            bad += bool(incomplete(folder / "runs"))
            for name in set(names):
                other += results(folder, name) != truth
                text = (folder / f"said-{name}").read_text()
                waited += text.count("waiting for it")
                document = json.loads((folder / "runs" / name / "results.json").read_text())
                computed += document["cost"]["total"]["results_computed"]
    ends = ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items()))
    what = "one run folder" if len(set(names)) == 1 else "one cache"
    return f"| {what} | {count} | {ends} | {waited} | {bad} | {other} | {computed / count:.1f} |"


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="of every fault")
    parser.add_argument("--pairs", type=int, default=20)
    given = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        checkpoint = make_checkpoint(Path(place))
        edit_json(
            checkpoint.adapter / "adapter_config.json", base_model_name_or_path=str(checkpoint.base)
        )
        settings = checkpoint.settings() | {"run.name": "one", "run.folder": "runs"}
        settings |= {"measure.etas": ETAS, "measure.next_lr": False}
        folder = Path(place) / "truth"
        folder.mkdir()
        (folder / "c.toml").touch()
        start = time.monotonic()
        first = ended(started(folder, settings), folder)
        if first.status:
            raise SystemExit(f"the undisturbed run ends with {first}")
        seconds, truth = time.monotonic() - start, results(folder)
        print(f"a run takes {seconds:.1f} s\n", flush=True)
        print(
            "| pairs of runs on | pairs | exit statuses | waits | incomplete files | other results | "
            "stages computed, a pair |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        print(pairs(given.pairs, settings, truth, ("one", "one")), flush=True)
        print(pairs(given.pairs, settings, truth, ("one", "two")), flush=True)
        print(
            "\n| fault | times | exit statuses | incomplete files | other results | "
            "stored stages computed again | said, most often |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        for case in cases(seconds):
            _show(tried(case, given.times, settings, truth, rng))
        _show(while_written(2 * given.times, checkpoint, settings, truth, seconds, rng))


def _show(row: Row) -> None:
    ends = ", ".join(f"{status}: {count}" for status, count in sorted(row.statuses.items()))
    said = row.said.most_common(1)[0][0].replace("|", "\\|")
    counts = f"{row.incomplete} | {row.other_results} | {row.again}"
    print(f"| {row.name} | {row.times} | {ends} | {counts} | {said} |", flush=True)


if __name__ == "__main__":
    main_()
