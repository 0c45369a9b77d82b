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
# # Read a run
#
# `funcprobe run` writes a folder. This notebook reads one: the verdict, the sweep over learning
# rates, and who makes the predicted change, by part of the step, by prompt, token and module. Every
# number is in a table that pandas reads, so that a question the report does not answer is a `groupby`
# away. What a section claims of the numbers is an `assert`.
#
# The run is of the built-in toy policy and takes about 15 seconds here. For one of your own, set
# `folder`; nothing below depends on the policy, and all of it holds for a run of any size.

# %%
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
from IPython.display import SVG, display

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results.saved import load_run
from funcprobe.adapters.results.verdict import verdict_line
from funcprobe.adapters.run import run as probe

alt.renderers.enable("svg")  # drawn here, without a script from elsewhere
pd.options.display.float_format = "{:.4g}".format

folder = Path("runs/toy")
if not folder.exists():
    Path("toy.toml").write_text(
        """
        run.name = "toy"
        policy = { checkpoint = "toy", dtype = "float64" }
        prompts.source = "toy"
        sampling = { B_E = 256, B_U = 16, G = 8, max_new_tokens = 16 }
        measure.etas = [1e-6, 1e-5, 1e-4, 1e-3]
        """
    )
    probe(read_config(Path("toy.toml")), Narrator())

# %% [markdown]
# ## 1. The verdict
#
# `load_run` reads the whole folder. `run.results` is results.json as a typed object, in which every
# number has its unit; `run.manifest` says what it was made with.

# %%
run = load_run(folder)
results = run.results
print(verdict_line(results))
print(f"{sum(check.passed for check in results.checks)} of {len(results.checks)} sanity checks passed")
print({name: run.manifest.versions[name] for name in ("funcprobe", "torch", "transformers", "peft")})
run

# %% [markdown]
# The prediction is the derivative of the entropy along the step $v$, times the learning rate. It has
# three parts, the momentum of earlier steps, weight decay, and this batch's gradient, which sum to it
# exactly. Its 95 % interval is over the draws of E and the prompts of U; the half width is Student's
# $t$ times the root of the sum of both squared errors.

# %%
first = results.first_order
parts = pd.Series(
    {
        "momentum": first.from_momentum.value,
        "weight decay": first.from_weight_decay.value,
        "this batch": first.from_update.value,
    },
    name=first.derivative.unit,
)
assert np.isclose(parts.sum(), first.derivative.value, rtol=1e-9)
errors = first.se_given_U.value, first.se_over_U.value
assert np.isclose(np.hypot(*errors), first.se_total.value)
interval = first.interval_total
print(f"{first.derivative.value:.3f}, 95 %: {interval.low:.3f} to {interval.high:.3f}")
parts.to_frame()

# %% [markdown]
# ## 2. The sweep
#
# At each learning rate $\eta$ the same responses of E measure what the prediction claims, reweighted
# to $\theta + \eta v$. `predicted` is $\eta$ times the derivative, `second_order` adds $\eta^2
# H''/2$, `ess` is the effective sample size of the importance weights, and `verdict` says whether
# they can be relied on.

# %%
sweep = run.sweep
columns = ["eta", "is_next_lr", "predicted", "second_order", "measured", "ratio", "ess", "verdict"]
assert np.allclose(sweep.predicted, sweep.eta * first.derivative.value)
print(f"changes in {sweep.attrs['unit']}")
sweep[columns]

# %% [markdown]
# Prediction and measurement share their samples, so that their ratio tends to 1 as $\eta$ falls,
# whatever E is. What is missing of 1 is the quadratic term: with it the prediction is closer, within
# the range of first order. That range ends at `linear_until`, where the quadratic term is 10 % of the
# linear one.

# %%
assert abs(sweep.ratio.iloc[0] - 1) < 1e-2
missed = (sweep.measured - sweep.predicted).abs()
until = results.second_order.linear_until.eta
closer = (sweep.measured - sweep.second_order).abs() <= missed
assert closer[sweep.eta <= until].all()
print(
    f"first order is good to 10 % up to eta = {until:.2g}; the next step has {results.next_lr.value:g}"
)
display(SVG(filename=folder / "figures" / "sweep.svg"))

# %% [markdown]
# The figures of the report lie in `figures/` as SVG and PNG, each with its caption.

# %%
for caption in sorted((folder / "figures").glob("*.txt")):
    print(f"{caption.stem}: {caption.read_text(encoding='utf-8').splitlines()[0]}")

# %% [markdown]
# ## 3. The tables
#
# `run.to_pandas(name)` gives the tables of a run: `modules`, `sequences` and `tokens` from the
# folder, `prompts` and `proxies` made of them; `run.to_polars(name)` the same for polars, and
# `run.table(name)` the Arrow table, whose columns say in their metadata what they are and in which
# unit.

# %%
tables = {name: run.table(name) for name in ("modules", "sequences", "tokens")}
assert all(table is not None for table in tables.values())
about = [
    (name, field.name, field.metadata[b"unit"].decode(), field.metadata[b"about"].decode())
    for name, table in tables.items()
    for field in table.schema
]
modules, sequences, tokens = (run.to_pandas(name) for name in tables)
print({name: table.num_rows for name, table in tables.items()})
pd.DataFrame(about, columns=["table", "column", "unit", "what it is"]).set_index(["table", "column"])

# %% [markdown]
# A *share* is what a token, prompt or tensor adds to the derivative, the preconditioner held fixed.
# Shares of one kind sum to the whole: U's tokens to this batch's part, E's tokens and the tensors to
# the derivative.

# %%
U, E = (tokens[tokens.batch == batch] for batch in "UE")
assert np.isclose(U.share.sum(), first.from_update.value, rtol=1e-6, atol=1e-9)
assert np.isclose(E.share.sum(), first.derivative.value, rtol=1e-6)
assert np.isclose(modules.share.sum(), first.derivative.value, rtol=1e-6)

# %% [markdown]
# ## 4. By prompt
#
# Which prompts of U move the entropy? One `groupby`, here in nats per token at the learning rate of
# the next step. A positive share raises the entropy. The report shows the same prompts with their
# intervals.

# %%
eta = results.next_lr.value
by_prompt = (
    sequences[sequences.batch == "U"]
    .groupby(["prompt_index", "prompt"])
    .agg(
        share=("share", "sum"),
        reward=("reward", "mean"),
        rewards=("reward", "nunique"),
        responses=("share", "size"),
    )
    .assign(change=lambda frame: eta * frame.share)
    .sort_values("share", key=abs, ascending=False)
)
from_tokens = U.groupby("prompt_index").share.sum()
assert np.allclose(by_prompt.share.droplevel("prompt").sort_index(), from_tokens, atol=1e-9)
largest = results.attribution.U_prompts[0]
assert largest.prompt_index == by_prompt.index[0][0]
by_prompt.head(8)

# %% [markdown]
# A prompt all of whose rewards are equal has advantages of 0, hence no gradient and no share.

# %%
flat = by_prompt[by_prompt.rewards == 1]
assert (flat.share == 0).all()
assert len(flat) == results.counts.U_groups_without_gradient
print(f"{len(flat)} of {len(by_prompt)} prompts have equal rewards")

# %% [markdown]
# ## 5. By token
#
# The same table by what the token is. The sum over a kind of token mixes shares of both signs;
# `absolute` says how much there is to mix. Entropy and surprisal are those at $\theta$.

# %%
by_kind = (
    U.assign(surprisal=-U.logp)
    .groupby("token")
    .agg(
        count=("share", "size"),
        share=("share", "sum"),
        absolute=("share", lambda shares: shares.abs().sum()),
        surprisal=("surprisal", "mean"),
        entropy=("entropy", "mean"),
    )
    .sort_values("absolute", ascending=False)
)
assert np.isclose(by_kind.share.sum(), U.share.sum(), atol=1e-9)
by_kind.head(8)

# %% [markdown]
# How concentrated are the shares? The Lorenz curve takes the tokens by falling $|\text{share}|$ and
# shows which part of $\sum |\text{share}|$ the first of them hold. The steeper it begins, the more a
# mask over a few tokens can do.

# %%
absolute = U.share.abs().sort_values(ascending=False).to_numpy()
lorenz = pd.DataFrame(
    {
        "tokens": np.arange(1, len(absolute) + 1) / len(absolute),
        "held": absolute.cumsum() / absolute.sum(),
    }
)
top = lorenz[lorenz.tokens <= 0.05].held.max()
assert top > 0.05  # as in any unequal distribution
assert np.isclose(lorenz.held.iloc[-1], 1)
print(f"5 % of the tokens hold {100 * top:.0f} % of the sum of absolute shares")
alt.Chart(lorenz, width=360, height=240).mark_line().encode(
    x=alt.X("tokens", title="fraction of U's tokens").axis(format="%"),
    y=alt.Y("held", title="fraction of the sum of |share|").axis(format="%"),
)

# %% [markdown]
# Papers score tokens without a gradient of the entropy. How well does each score order the exact
# shares? The table `proxies` has them for every token that J counts; negative where the score
# predicts that the token lowers the entropy. The first is the covariance of log-probability and
# advantage (Cui et al., arXiv:2505.22617), which two lines of pandas give as well.

# %%
proxies = run.to_pandas("proxies")
covariance = -(U.logp - U.logp.mean()) * (U.advantage - U.advantage.mean())
assert np.allclose(proxies.covariance, covariance)
rank = proxies.loc[:, "covariance":].corrwith(proxies.share, method="spearman")
rank.to_frame(f"Spearman correlation with the share, {len(proxies)} tokens")

# %% [markdown]
# ## 6. By module
#
# Layer by projection, the sum over both LoRA factors, in nats per token at the next learning rate.

# %%
grid = modules.pivot_table(index="layer", columns="projection", values="share", aggfunc="sum") * eta
assert np.isclose(grid.to_numpy().sum(), eta * first.derivative.value, rtol=1e-6)
grid.index = grid.index.str.removeprefix("base_model.model.model.")
display(SVG(filename=folder / "figures" / "modules.svg"))
grid

# %% [markdown]
# ## 7. Where in E the entropy changes
#
# E's shares say where the change arises. Each splits into a *direct* part, by which the distribution
# at that token changes, a *score* part, by which the token's own probability changes and with it the
# prefixes that are visited, and the baseline's control variate of the latter, whose expectation is 0.

# %%
by_position = E.groupby("position")[["share", "direct", "score", "control"]].sum() * eta
pieces = by_position[["direct", "score", "control"]].sum(axis=1)
assert np.allclose(by_position.share, pieces, atol=1e-12)
assert np.isclose(by_position.direct.sum(), eta * results.attribution.direct.share, rtol=1e-6)
by_position.head(8)

# %% [markdown]
# The influence values of E's sequences give the standard error of the derivative: $\sqrt{B/(B-1)
# \sum_n \psi_n^2}$ over the $B$ draws.

# %%
psi = sequences[sequences.batch == "E"].influence
se = np.sqrt(len(psi) / (len(psi) - 1) * (psi**2).sum())
assert np.isclose(se, first.se_given_U.value, rtol=1e-6)
print(f"standard error given U: {se:.3f}")

# %% [markdown]
# `report.html` in the folder shows all of this in a browser, with the responses as coloured text. The
# next notebook, `03_design_a_rule`, asks what another rule for the step would have done.
