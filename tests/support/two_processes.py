"""A module run by two processes, joined by gloo."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.paths import ROOT

WORLD = 2


def run_on_two(module: str, folder: Path) -> None:
    """`python -m module folder` in each; fails with what they wrote if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    shared |= {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(WORLD):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank-{rank}.log").open("w") as log:
            command = [sys.executable, "-m", module, str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    # One that fails leaves the other waiting.
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.1)
    logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(WORLD)]
    assert [process.wait() for process in processes] == [0] * WORLD, "\n".join(logs)
