"""TRL trainings of two processes, joined by gloo; `python -m support.trl_processes` is one of them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from support.checkpoints import Checkpoint
from support.paths import ROOT
from support.trl_cases import CASES, Change
from support.trl_training import Step, train

WORLD = 2
# Groups of 4 responses on each process, so half of what one process has in a step.
LAYOUTS: dict[str, Change] = {
    "first": {"per_device_train_batch_size": 8, "temperature": 1.3},
    "second, accumulated": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "temperature": 0.7,
    },
    "half of a generation": {"per_device_train_batch_size": 4, "steps_per_generation": 2},
}


def train_on_two(
    checkpoint: Checkpoint, folder: Path, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Step]:
    """The step of each (case, layout), with the calls of both processes."""
    torch.save((tuple(checkpoint), list(pairs)), folder / "wanted.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    shared |= {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(WORLD):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank-{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "support.trl_processes", str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    # One that fails leaves the other waiting.
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.1)
    logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(WORLD)]
    assert [process.wait() for process in processes] == [0] * WORLD, "\n".join(logs)
    of_rank = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {
        pair: first._replace(calls=[*first.calls, *second.calls])
        for pair, first, second in zip(pairs, *of_rank, strict=True)
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    paths, pairs = torch.load(folder / "wanted.pt", weights_only=False)
    steps = []
    for number, (case, layout) in enumerate(pairs):
        settings, _, prepare = CASES[case]
        place = folder / str(number)
        steps.append(train(Checkpoint(*paths), place, prepare, **(settings | LAYOUTS[layout])))
    torch.save(steps, folder / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
