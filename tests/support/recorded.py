"""What a trainer's loss was given at every step, and whether a file is exactly that."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from funcprobe.adapters.rollouts import Rollouts
from support.checkpoints import Checkpoint

EOS = 1
TENSORS = {
    "old_logp": "old_per_token_logps",
    "ref_logp": "ref_per_token_logps",
    "sampler_logp": "sampling_per_token_logps",
}
Calls = list[dict[str, torch.Tensor]]  # of the loss in one step


def calls_of_the_loss(trainer: GRPOTrainer) -> list[Calls]:
    """For every step, the tensors of each call, copied before TRL's own method gets them."""
    steps: list[Calls] = []
    compute = trainer._compute_loss

    def computing(model: Any, inputs: dict[str, Any]) -> Any:
        if trainer.model.training:
            first = len(steps) + trainer.state.global_step - computing.steps
            steps.extend([] for _ in range(first + 1 - len(steps)))
            computing.steps = trainer.state.global_step + 1
            steps[-1].append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return compute(model, inputs)

    computing.steps = 0
    trainer._compute_loss = computing
    return steps


def require_recorded(found: Rollouts, calls: Calls, rank: int = 0) -> None:
    """Every sequence of every call is in the file once, with all of its values to the last bit."""
    of_rank = [i for i, process in enumerate(found.process) if process == rank]
    assert len(of_rank) == sum(len(call["completion_ids"]) for call in calls)
    seen: set[int] = set()
    for number, call in enumerate(calls):
        mask = call["completion_mask"] * call.get("tool_mask", 1)
        rows = [i for i in of_rank if found.microbatch[i] == number]
        assert len(rows) == len(mask)
        for j in range(len(mask)):
            prompt = call["prompt_ids"][j][call["prompt_mask"][j].bool()].tolist()
            tokens, advantage = call["completion_ids"][j].tolist(), float(call["advantages"][j])
            same = [
                i
                for i in rows
                if i not in seen
                and found.prompt_ids[i] == prompt
                and tokens[: (n := len(found.response_ids[i]))] == found.response_ids[i]
                and not any(tokens[n:])  # the padding is token 0
                and found.advantage[i] == advantage
                and all(
                    str(getattr(found, name)[i]) == str(call[key][j].tolist()[:n])
                    for name, key in TENSORS.items()
                    if key in call
                )
            ]
            assert same, f"sequence {j} of micro-batch {number} is not in the file"
            i = same[0]
            seen.add(i)
            n = len(found.response_ids[i])
            assert found.loss_mask[i] == mask[j].bool().tolist()[:n]
            assert not call["completion_mask"][j][n:].any()
        tokens = float(call["num_items_in_batch"])
        assert [found.generated_tokens[i] for i in rows] == [tokens] * len(rows)
        assert [getattr(found, name) is not None for name in TENSORS] == [
            key in call for key in TENSORS.values()
        ]


# One process of a training: its steps recorded, and its calls of the loss.
PROCESS = """
import json, sys
from pathlib import Path
import torch
from funcprobe.adapters.trainers import ParamNamesCallback, record_rollouts
from support.checkpoints import Checkpoint
from support.recorded import calls_of_the_loss
from support.trainers import grpo_trainer

folder, places, settings = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
gradients = settings.pop("gradients", None)
trainer = grpo_trainer(Checkpoint(*map(Path, places)), folder, **settings)
steps = calls_of_the_loss(trainer)
trainer.add_callback(ParamNamesCallback())
record_rollouts(trainer, folder / "rollouts", gradients=gradients)
trainer.train()
torch.save(steps, folder / f"calls-{trainer.accelerator.process_index}.pt")
torch.distributed.destroy_process_group()
"""


def train_in_processes(
    checkpoint: Checkpoint, folder: Path, count: int = 2, **settings: Any
) -> list[list[Calls]]:
    """A training by gloo on the CPU, recorded in folder/rollouts; every rank's calls of the loss.

    `gradients` is record_rollouts'.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [str(path) for path in checkpoint]
    command = [sys.executable, "-c", PROCESS, str(folder), json.dumps(places), json.dumps(settings)]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(count)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * count
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"calls-{i}.pt", weights_only=True) for i in range(count)]
