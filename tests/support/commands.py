"""Commands of the command line, and how they end."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.checkpoints import sets


class Outcome(NamedTuple):
    """How a command of the command line ended."""

    status: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """What it printed, in one line: a long line is broken at the width of the output."""
        return " ".join(self.out.split())


Command = Callable[..., Outcome]


def left_in(runs: Path) -> list[str]:
    """Everything below the runs folder but whole stages."""
    found = [path.relative_to(runs).as_posix() for path in runs.rglob("*")]
    return [p for p in found if not p.startswith(".stages") or p.startswith(".stages/.")]


def refused(command: Command, given: dict[str, Any], *said: str, verb: str = "run") -> Outcome:
    """Runs it and asserts what every refusal has in common."""
    Path("c.toml").touch()
    outcome = command(verb, "c.toml", *sets(given | {"run.folder": "runs"}))
    assert outcome.status == 2
    assert outcome.out == ""
    *narrated, last = outcome.err.splitlines()
    assert last.startswith("funcprobe: ")
    assert not [line for line in narrated if line.startswith(("funcprobe:", "Traceback", " "))]
    for words in said:
        assert words in last
    assert left_in(Path("runs")) == []
    return outcome


def process(
    script: str, *arguments: str, cwd: Path, python_path: Path | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | ({"PYTHONPATH": str(python_path)} if python_path else {}),
        timeout=600,
    )


# Each command in a process of its own, forked where the libraries are imported: that takes seconds.
CHILDREN = """
    import json, os, resource, sys
    from funcprobe.adapters import run
    from funcprobe.adapters.cli import main

    commands, limits, prepared = json.loads(sys.argv[1])
    exec(prepared)
    ended = []
    for arguments, limit in zip(commands, limits):
        pipes = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            for number, (_, end) in zip((1, 2), pipes):
                os.dup2(end, number)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.argv[1:] = arguments
            main()
            raise AssertionError("main() ends the process")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # a pipe holds what they say
        for _, end in pipes:
            os.close(end)
        ended.append([status, *(open(start).read() for start, _ in pipes)])
    print(json.dumps(ended))
"""


def children(
    commands: list[list[str]],
    *,
    cwd: Path,
    limits: Sequence[int | None] | None = None,
    prepared: str = "",
    python_path: Path | None = None,
) -> list[Outcome]:
    """How each ended; a limit is of the bytes in any file that is written, `prepared` is run before."""
    given = json.dumps([commands, limits or [None] * len(commands), prepared])
    done = process(CHILDREN, given, cwd=cwd, python_path=python_path)
    assert (done.returncode, done.stderr) == (0, "")  # the imports say nothing
    return [Outcome(*one) for one in json.loads(done.stdout)]
