"""The fuzzer: atheris, by the coverage of this package's own code."""

import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from traceback import extract_tb, format_exception
from typing import Any, NoReturn

from .guard import Guard, Violation
from .mutation import mutated
from .target import Target

SLOW = 10  # seconds after which libFuzzer ends the process
MEMORY = 6000  # MiB, likewise
MOST_ACCEPTED = 1000  # inputs that were read, from which others are made


def fuzz(names: Sequence[str], seconds: int, keep: Path) -> int:
    """Run each target for so long, one after the other; the number of those with findings."""
    import atheris
    import datasets  # noqa: F401 the large libraries as they are, this package with its coverage
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    with atheris.instrument_imports(include=["funcprobe", "tomllib"]):
        from .table import targets

        known = targets()
    keep.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        # A process of its own, as libFuzzer ends its process; the imports are made once.
        if (child := os.fork()) == 0:
            _fuzz_one(known[name], seconds, keep)
        failed += os.waitpid(child, 0)[1] != 0
    return failed


def _fuzz_one(target: Target, seconds: int, keep: Path) -> NoReturn:
    import atheris

    warnings.simplefilter("ignore")
    name = target.name
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    corpus, place = folder / "corpus", folder / "place"
    corpus.mkdir()
    place.mkdir()
    guard = Guard(place, target.memory)
    findings: dict[str, str] = {}
    counts = Counter[str]()

    def read(data: bytes) -> object:
        return target.read(data, place)

    accepted: list[bytes] = []
    for i, seed in enumerate(target.seeds()):
        (corpus / f"{i}").write_bytes(seed)
        said = guard.run(read, target.file(seed))  # what libraries load of themselves, once
        counts["seeds rejected"] += said is not None
        accepted += [seed] if said is None else []
    guard.watch()
    start = time.perf_counter()

    def one(data: bytes) -> None:
        if time.perf_counter() - start > seconds:
            _end(name, counts, findings, folder, time.perf_counter() - start)
        counts["executions"] += 1
        file = target.file(data)
        try:
            rejected = guard.run(read, file) is not None
            counts["rejected"] += rejected
            if not rejected and len(accepted) < MOST_ACCEPTED:
                accepted.append(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 a panic of Rust is no Exception
            where = _signature(error)
            if where not in findings:
                path = keep / f"{name.replace('/', '_')}-{len(findings)}"
                path.write_bytes(file)
                path.with_name(path.name + ".txt").write_text("".join(format_exception(error)))
                findings[where] = str(path)
                print(f"{name}: FINDING {where} in {path}", flush=True)

    def structures(data: bytes, most: int, seed: int) -> bytes:
        # Half of the time from one that was read: libFuzzer keeps more and more of those that are not.
        if accepted and seed % 2:
            data = accepted[seed // 2 % len(accepted)]
        found = mutated(data, seed)
        return found if len(found) <= most else data[:most]

    options: dict[str, Any] = {"custom_mutator": structures} if target.encode else {}
    largest = 4 * max(map(len, target.seeds()))
    limits = [f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY}", f"-max_len={max(largest, 4096)}"]
    atheris.Setup(
        [name, str(corpus), *limits, f"-artifact_prefix={keep}/", "-verbosity=0"], one, **options
    )
    atheris.Fuzz()
    raise AssertionError  # the process has ended


def _end(name: str, counts: Counter[str], findings: dict[str, str], folder: Path, took: float) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    kinds = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"{name}: {took / 60:.1f} min, {kinds}, {len(findings)} findings", flush=True)
    os._exit(bool(findings))  # libFuzzer has no other end of its own


def _signature(error: BaseException) -> str:
    """The kind of an exception and the last place in this package that it passed."""
    frames = extract_tb((error.__cause__ or error).__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    last = next((f for f in reversed(own) if "/tests/" not in f.filename), own[-1])
    what = f" {str(error).partition(' ')[0]}" if isinstance(error, Violation) else ""
    return f"{type(error).__name__}{what} at {Path(last.filename).name}:{last.lineno}"
