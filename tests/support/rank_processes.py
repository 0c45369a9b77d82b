"""Processes as torchrun starts them, without torchrun: its variables, a port, a group of gloo."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_ranks(
    size: int, command: Sequence[str], folder: Path, **variables: str
) -> list[subprocess.Popen[bytes]]:
    """`python *command` as ranks 0 to size - 1; what each prints is in folder/rank-R.out and .err."""
    port, found = free_port(), []
    for rank in range(size):
        of_rank = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        environment = os.environ | {k: str(v) for k, v in of_rank.items()} | variables
        with (
            (folder / f"rank-{rank}.out").open("wb") as out,
            (folder / f"rank-{rank}.err").open("wb") as err,
        ):
            found.append(
                subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=environment)
            )
    return found
