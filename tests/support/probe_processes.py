"""A training of two processes that is probed; `python -m support.probe_processes` is one of them."""

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from funcprobe import InputError
from funcprobe.adapters.trainers import ProbeCallback, probe, together
from funcprobe.adapters.trainers.together import Together
from support.checkpoints import Checkpoint
from support.trainers import outcome, plain_trainer, probe_config

FAILS = {2: 1, 3: 0}  # step: the process whose probe fails
HANGS = 2  # the step in whose probe the second process does not answer
PATIENCE, ASLEEP = 30, 45  # seconds


def trainer_of(checkpoint: Checkpoint, folder: Path) -> Trainer:
    """In float64, with dropout; each process has half of a step's sequences."""
    trainer = plain_trainer(checkpoint, folder, gradient_checkpointing=False)
    trainer.model.double()
    return trainer


def add_probe(trainer: Trainer, checkpoint: Checkpoint) -> None:
    # Thirteen sequences, of which a process has six or seven, in microbatches of a few.
    config = probe_config(checkpoint, sampling={"B_E": 13}, run={"max_tokens": 40})
    trainer.add_callback(ProbeCallback(trainer, every=1, config=config))


def shared_and_alone(seen: list[dict[str, Any]]) -> Any:
    """Every step is probed together, then by each process alone; the tokens of both are counted."""
    original, bound, counted = probe.probe_step, probe.funcprobe.frozen_forward, [0]

    def frozen_forward(*given: Any) -> Any:
        forward = bound(*given)

        def hidden(params: Any, rows: Any) -> torch.Tensor:
            counted[0] += rows.tokens
            out: torch.Tensor = forward.hidden(params, rows)
            return out

        return forward._replace(hidden=hidden)

    def both(*given: Any) -> Any:
        together: Together = given[5]
        steps, tokens = [], []
        for group in (together, Together()):
            counted[0] = 0
            steps.append(original(*given[:5], group, *given[6:]))
            tokens.append(counted[0])
        numbers = [probe.numbers(step) for step in steps]
        seen.append({"size": together.size, "numbers": numbers, "tokens": tokens})
        return steps[0]

    probe.funcprobe.frozen_forward = frozen_forward
    return original, both


def failing(original: Any, rank: int) -> Any:
    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    def fail(*given: Any) -> Any:
        if FAILS.get(given[4]) != rank:
            return original(*given)
        if rank:  # before it exchanges anything
            raise InputError("no numbers\nhere")
        passes, probe.eval_passes = probe.eval_passes, out_of_memory  # after sampling
        try:
            return original(*given)
        finally:
            probe.eval_passes = passes

    return fail


def hanging(original: Any, rank: int) -> Any:
    def hang(*given: Any) -> Any:
        if given[4] == HANGS and rank == 1:
            time.sleep(ASLEEP)
        return original(*given)

    return hang


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    checkpoint = Checkpoint(*torch.load(folder / "checkpoint.pt", weights_only=False))
    found: dict[str, Any] = {"off": outcome(trainer_of(checkpoint, folder / "off")), "seen": []}
    original, probe.probe_step = shared_and_alone(found["seen"])
    trainer = trainer_of(checkpoint, folder / "on")
    add_probe(trainer, checkpoint)
    found["on"] = outcome(trainer)
    for name, step in (("failing", failing(original, rank)), ("hanging", hanging(original, rank))):
        if name == "hanging":
            together.PATIENCE = timedelta(seconds=PATIENCE)
        probe.probe_step = step
        trainer = trainer_of(checkpoint, folder / name)
        add_probe(trainer, checkpoint)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found[name] = outcome(trainer)
        found[f"said by {name}"] = [str(w.message) for w in said if "is not probed" in str(w.message)]
    torch.save(found, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
