"""Optimizer steps of a real GRPOTrainer, with everything that its loss was called with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from trl import GRPOTrainer

import funcprobe
from funcprobe import Batch, TokenStats, tree
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.trainers import ParamNamesCallback, record_rollouts
from funcprobe.losses.loss import LossInputs, LossReport, loss_update
from funcprobe.losses.trl import TrlLoss, trl_loss
from support.checkpoints import Checkpoint
from support.trainers import LR, STEPS, grpo_trainer

Prepare = Callable[[GRPOTrainer], None]


class Call(NamedTuple):
    """A call of the trainer's loss: what it was given, and the coefficient of the entropy in it."""

    microbatch: int  # of the optimizer step, from 0
    process: int
    inputs: dict[str, Tensor]  # padded, as TRL holds them
    entropy_coef: float


class Step(NamedTuple):
    """The last optimizer step of a training, from the checkpoint before it."""

    before: Path
    calls: list[Call]  # of this process
    recorded: Path  # by record_rollouts; of all processes
    settings: TrlLoss
    temperature: float
    lr: float
    taken: dict[str, Tensor]  # (theta after - theta before) / lr, by the registry's names
    logged: dict[str, float]  # by TRL, of this step


def train(
    checkpoint: Checkpoint,
    folder: Path,
    prepare: Prepare = lambda _: None,
    gradients: int | None = None,
    **settings: Any,
) -> Step:
    """STEPS steps, recorded; `prepare` may change the trainer first.

    Gradients are not clipped by default, which would hide a wrong factor.
    """
    trainer = grpo_trainer(checkpoint, folder, **({"max_grad_norm": 0.0} | settings))
    trainer.add_callback(ParamNamesCallback())
    prepare(trainer)
    calls: list[Call] = []
    compute = trainer._compute_loss

    def computing(model: Any, inputs: dict[str, Any]) -> Tensor:
        if trainer.state.global_step == STEPS - 1:
            on = trainer._last_world_entropy <= trainer.args.entropy_target
            coef = trainer.entropy_coef if on or not trainer.use_adaptive_entropy else 0.0
            held = {name: x.clone() for name, x in inputs.items() if torch.is_tensor(x)}
            calls.append(Call(len(calls), trainer.accelerator.process_index, held, coef))
        return compute(model, inputs)

    trainer._compute_loss = computing  # inside what records, so as it is without it
    record_rollouts(trainer, folder / "rollouts", gradients=gradients)
    trainer.train()
    args = trainer.args
    named = {name: getattr(args, name) for name in TrlLoss._fields}
    theta = [
        {
            name.replace(".weight", ".default.weight"): tensor.double()
            for name, tensor in load_file(
                folder / f"checkpoint-{n}" / "adapter_model.safetensors"
            ).items()
        }
        for n in (STEPS - 1, STEPS)
    ]
    lr = LR / STEPS
    (logged,) = (
        entry for entry in trainer.state.log_history if entry["step"] == STEPS and "loss" in entry
    )
    return Step(
        before=folder / f"checkpoint-{STEPS - 1}",
        calls=calls,
        recorded=folder / "rollouts" / f"step-{STEPS:06d}.parquet",
        settings=TrlLoss(**(named | {"entropy_coef": calls[0].entropy_coef})),
        temperature=args.temperature,
        lr=lr,
        taken={name: (theta[1][name] - theta[0][name]) / lr for name in theta[0]},
        logged=logged,
    )


def captured(calls: Sequence[Call]) -> tuple[Batch, LossInputs]:
    """The sequences of these calls one after the other, and what TRL's loss knew of each."""
    prompts: list[tuple[int, ...]] = []
    responses: list[list[int]] = []
    columns: dict[str, list[Any]] = {
        "advantage": [],
        "microbatch": [],
        "process": [],
        "generated_tokens": [],
    }
    tokens: dict[str, list[Tensor]] = {"mask": [], "old": [], "ref": [], "sampler": []}
    for call in calls:
        x = call.inputs
        mask_NR = x["completion_mask"].bool()
        in_loss_NR = mask_NR & x["tool_mask"].bool() if "tool_mask" in x else mask_NR
        for i in range(len(mask_NR)):
            # Of a truncated completion the mask is all 0: its tokens go up to the end.
            length = int(mask_NR[i].sum()) or mask_NR.shape[1]
            prompts.append(tuple(x["prompt_ids"][i][x["prompt_mask"][i].bool()].tolist()))
            responses.append(x["completion_ids"][i, :length].tolist())
            columns["advantage"].append(float(x["advantages"][i]))
            columns["microbatch"].append(call.microbatch)
            columns["process"].append(call.process)
            columns["generated_tokens"].append(float(x["num_items_in_batch"]))
            tokens["mask"].append(in_loss_NR[i, :length])
            for name, key in (
                ("old", "old_per_token_logps"),
                ("ref", "ref_per_token_logps"),
                ("sampler", "sampling_per_token_logps"),
            ):
                if key in x:
                    tokens[name].append(x[key][i, :length].double())
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    batch = funcprobe.collate(
        [list(prompt) for prompt in prompts], responses, [index[prompt] for prompt in prompts]
    )
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else None
        for name, rows in tokens.items()
    }
    mask_NR = padded["mask"]
    assert mask_NR is not None
    inputs = LossInputs(
        advantage_N=torch.tensor(columns["advantage"], dtype=torch.float64),
        mask_NR=mask_NR,
        prompt_N=batch.prompt_N,
        microbatch_N=torch.tensor(columns["microbatch"]),
        process_N=torch.tensor(columns["process"]),
        old_logp_NR=padded["old"],
        ref_logp_NR=padded["ref"],
        sampler_logp_NR=padded["sampler"],
        generated_tokens_N=torch.tensor(columns["generated_tokens"], dtype=torch.float64),
    )
    return batch, inputs


class Ours(NamedTuple):
    """Statistics at theta; the step with given settings and arrays, and what is said of the loss."""

    stats: TokenStats
    direction: Callable[[TrlLoss, LossInputs], tuple[funcprobe.Params, LossReport]]


def ours(step: Step, batch: Batch) -> Ours:
    policy = load_policy(PolicyConfig(checkpoint=str(step.before)), torch.device("cpu"))
    adam_state, report = read_adam_state(step.before / "optimizer.pt", policy.model, policy.params)
    assert report.coverage == dict.fromkeys(("exp_avg_sq", "exp_avg", "step"), len(policy.params))
    probe = funcprobe.bind(policy.model, temperature=step.temperature)
    stats = probe.token_stats(probe.params, batch)

    def direction(settings: TrlLoss, inputs: LossInputs) -> tuple[funcprobe.Params, LossReport]:
        update, report = loss_update(batch, stats, inputs, trl_loss(settings))
        Y = probe.grad_Y(probe.params, update)
        return funcprobe.update_direction(probe.params, Y, adam_state).total, report

    return Ours(stats, direction)


class Distance(NamedTuple):
    """Of a direction from the step taken."""

    worst: float  # |v - taken| / |taken|, of the tensor where it is largest
    median: float
    cosine: float  # of all tensors as one vector

    @property
    def is_the_step(self) -> bool:
        """The bounds of acceptance. Rounding of theta in float32 leaves 1e-5 of a tensor."""
        return self.worst < 1e-4 and 1 - self.cosine < 1e-7


def distance(found: funcprobe.Params, taken: funcprobe.Params) -> Distance:
    assert found.keys() == taken.keys()
    errors = sorted(float((found[n].double() - v).norm() / v.norm()) for n, v in taken.items())
    cosine = tree.dot(found, taken) / tree.norm(found) / tree.norm(taken)
    return Distance(errors[-1], errors[len(errors) // 2], float(cosine))
