"""The next step of a pretrained policy under several of TRL's losses, against the one that TRL takes.

    python benchmarks/real_losses.py [--step 8] [--losses kl gspo] [--folder FOLDER] [--out FOLDER]

TRL resumes from checkpoint-8 of benchmarks/real_policy.py and takes two steps over one generation, so
that in the second the ratio to the old policy is at work; both are recorded. From the checkpoint after
the first and the second's rollouts alone, the loss, the direction, and what is logged are computed and
compared. A loss takes 2 minutes on two cores, and 0.2 GB of disk. The policy is made first if it is
missing.
"""

import argparse
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_policy import FOLDER, Real, ensure_real, grpo_trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

import funcprobe
from funcprobe import tree
from funcprobe.adapters import rollouts
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.trainers import ParamNamesCallback, record_rollouts
from funcprobe.losses.loss import LossReport, loss_update
from funcprobe.losses.trl import TrlLoss, trl_loss

BOUND = 1e-3  # of a tensor: what rounding in float32 may leave of a step of 7e-5

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "kl": {"beta": 0.04},
    "entropy": {"entropy_coef": 0.01},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3},
    "quantile": {"top_entropy_quantile": 0.2},
}
LOGGED = ("loss", "entropy", "kl", "clip_ratio/region_mean", "cispo_clip_ratio")


class Trained(NamedTuple):
    """The second of TRL's two steps."""

    before: Path  # checkpoint
    after: Path
    rollouts: Path
    settings: TrlLoss
    logged: Mapping[str, float]
    seconds: float  # of both steps


class Compared(NamedTuple):
    """Of every tensor |v - taken| / |taken|, and the cosine of all of them as one vector."""

    errors: dict[str, float]
    cosine: float
    report: LossReport
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", type=int, default=8, help="checkpoint-N to resume from")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=Path("runs/real_losses"), help="new checkpoints")
    args = parser.parse_args()
    real = ensure_real(args.folder, lambda line: print(line, flush=True))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| loss | worst tensor | median | 1 - cosine | logged, TRL / here | seconds, TRL / here |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in args.losses:
        trained = train(real, args.step, args.out / name, LOSSES[name])
        print_row(name, trained, compare(trained))


def train(real: Real, step: int, folder: Path, settings: dict[str, Any]) -> Trained:
    start = time.perf_counter()
    with warnings.catch_warnings():
        # transformers 5.23 renames gradient checkpointing; TRL 1.16 and peft 0.21 do not.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = grpo_trainer(real.base, real.prompts, folder, num_iterations=2, **settings)
        trainer.remove_callback(PrinterCallback)
        for callback in (ParamNamesCallback(), StopAfter(step + 2)):
            trainer.add_callback(callback)
        record_rollouts(trainer, folder / "rollouts")
        trainer.train(resume_from_checkpoint=str(real.checkpoint(step)))
    log = trainer.state.log_history
    (logged,) = (entry for entry in log if entry["step"] == step + 2 and "entropy" in entry)
    return Trained(
        before=folder / f"checkpoint-{step + 1}",
        after=folder / f"checkpoint-{step + 2}",
        rollouts=folder / "rollouts" / f"step-{step + 2:06d}.parquet",
        settings=TrlLoss(**{name: getattr(trainer.args, name) for name in TrlLoss._fields}),
        logged=logged,
        seconds=time.perf_counter() - start,
    )


class StopAfter(TrainerCallback):
    """Ends the training in the middle of its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def compare(trained: Trained) -> Compared:
    start = time.perf_counter()
    policy = load_policy(PolicyConfig(checkpoint=str(trained.before)), torch.device("cpu"))
    state, _ = read_adam_state(trained.before / "optimizer.pt", policy.model, policy.params)
    U = rollouts.load_rollouts(
        trained.rollouts,
        policy.model.config.vocab_size,
        rewards=False,
        advantages=True,
        eos_ids=policy.eos_ids,
    )
    batch = rollouts.to_batch(U)
    inputs = rollouts.loss_inputs(U, batch, torch.tensor(U.advantage, dtype=torch.float64))
    probe = funcprobe.bind(policy.model, temperature=U.temperature)
    stats = probe.token_stats(probe.params, batch)
    update, report = loss_update(batch, stats, inputs, trl_loss(trained.settings))
    Y = probe.grad_Y(probe.params, update)
    v = funcprobe.update_direction(probe.params, Y, state, max_grad_norm=1.0).total
    seconds = time.perf_counter() - start
    taken = difference(trained, state.groups[0].lr)
    if taken.keys() != v.keys():
        raise SystemExit(f"the direction has {len(v)} tensors, the adapter {len(taken)}")
    errors = {name: float((v[name].double() - t).norm() / t.norm()) for name, t in taken.items()}
    cosine = float(tree.dot(v, taken) / tree.norm(v) / tree.norm(taken))
    return Compared(errors, cosine, report, seconds)


def difference(trained: Trained, lr: float) -> dict[str, Tensor]:
    """(theta after - theta before) / lr, by the registry's names."""
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (trained.before, trained.after)
    )
    return {
        name.replace(".weight", ".default.weight"): (after[name].double() - x.double()) / lr
        for name, x in before.items()
    }


def print_row(name: str, trained: Trained, found: Compared) -> None:
    errors = sorted(found.errors.values())
    missed = "" if errors[-1] < BOUND else f" **missed**: beyond {BOUND:g}"
    metrics = [
        f"{key} {trained.logged[key]:.5g} / {value:.5g}"
        for key, value in found.report.metrics.items()
        if key in LOGGED
    ]
    print(
        f"| {name} | {errors[-1]:.1e}{missed} | {errors[len(errors) // 2]:.1e} "
        f"| {1 - found.cosine:.1e} | {'; '.join(metrics)} "
        f"| {trained.seconds:.0f} / {found.seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
