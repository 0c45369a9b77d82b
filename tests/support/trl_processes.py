"""TRL trainings of two processes, joined by gloo; `python -m support.trl_processes` is one of them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from support.checkpoints import Checkpoint
from support.trl_cases import CASES, Change
from support.trl_training import Step, train
from support.two_processes import WORLD, run_on_two

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
    run_on_two("support.trl_processes", folder)
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
