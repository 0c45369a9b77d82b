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
# # Design a rule
#
# Clipping, masking and bonuses are rules: they give U's tokens other coefficients, and so make
# another step. This notebook designs one from the shares of a run, predicts what it does to the next
# step, and checks the prediction by measurement, first on the batch that the rule was chosen on, then
# on one that it has not seen. The second check is the one that counts.
#
# It reads the run of `02_read_a_run` (or makes it: 15 seconds), and tries some fifteen rules in half
# a minute.

# %%
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd

import funcprobe
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results.saved import load_run
from funcprobe.adapters.run import run as probe
from funcprobe.adapters.whatif import Question, whatif

alt.renderers.enable("svg")  # drawn here, without a script from elsewhere
pd.options.display.float_format = "{:.4g}".format

TOY = """
run.name = "toy"
policy = { checkpoint = "toy", dtype = "float64" }
prompts.source = "toy"
sampling = { B_E = 256, B_U = 16, G = 8, max_new_tokens = 16 }
measure.etas = [1e-6, 1e-5, 1e-4, 1e-3]
"""
Path("toy.toml").write_text(TOY)
if not Path("runs/toy").exists():
    probe(read_config(Path("toy.toml")), Narrator())
run = load_run("runs/toy")
results = run.results
eta = results.next_lr.value

# %% [markdown]
# ## 1. What there is to change
#
# A rule acts on this batch's gradient. Momentum is already in the optimizer, and a rule reaches it
# through the second moment alone. The parts of the predicted change say how much of it is this
# batch's to change.

# %%
first = results.first_order
unit = results.entropy.unit
parts = pd.Series(
    {
        "momentum": first.from_momentum.value,
        "weight decay": first.from_weight_decay.value,
        "this batch": first.from_update.value,
    }
)
(eta * parts).to_frame(f"change at lr {eta:g}, {unit}")

# %% [markdown]
# The sum over this batch may be small because its tokens cancel. Its absolute shares say how far a
# rule that chooses among them could move the entropy at most.

# %%
tokens = run.to_pandas("tokens")
U = tokens[(tokens.batch == "U") & (tokens.coef_logp != 0)].assign(surprisal=lambda U: -U.logp)
assert np.isclose(U.share.sum(), first.from_update.value, rtol=1e-6, atol=1e-9)
assert U.share.abs().sum() > abs(U.share.sum())
print(
    f"shares of {len(U)} tokens: {eta * U.share.sum():+.2e}, absolute {eta * U.share.abs().sum():.2e}"
)

# %% [markdown]
# ## 2. Where to cut
#
# Rules of papers choose tokens by the sign of the advantage and by how probable they are. The same
# two axes, with shares summed in each cell, in nats per token at the next learning rate: negative
# cells lower the entropy. The count says how many tokens a cell has.

# %%
edges = [0.0, 0.02, 0.2, 1.0, np.inf]
U["bin"] = pd.cut(U.surprisal, edges, right=False)
U["sign"] = np.where(U.advantage > 0, "advantage > 0", "advantage < 0")
cells = U.groupby(["sign", "bin"], observed=True).agg(
    share=("share", "sum"), marginal=("marginal", "sum"), count=("share", "size")
)
assert np.isclose(cells.share.sum(), U.share.sum(), atol=1e-9)
(eta * cells.share).unstack("bin").join(cells["count"].unstack("bin"), rsuffix=" (tokens)")

# %% [markdown]
# The rule leaves out the cell whose tokens lower the entropy most. It is written as an expression
# over the columns of a token; expressions are parsed by a grammar of their own and never run as code.

# %%
sign, interval = cells.share.idxmin()
inside = f"{sign} and surprisal >= {interval.left}"
if np.isfinite(interval.right):
    inside += f" and surprisal < {interval.right}"
rule = f"mask:not ({inside})"
chosen = U[(U.sign == sign) & (U.bin == interval)]
assert funcprobe.rule(rule).text == rule
print(f"{rule}   leaves out {len(chosen)} of {len(U)} tokens")

# %% [markdown]
# ## 3. Three predictions
#
# What will the rule change? From the table alone there are two answers, without another pass through
# the model:
#
# - by *shares*, $-\eta \sum$ share over the tokens that leave: exact if the preconditioner stayed as
#   it is;
# - by *marginals*, $-\eta \sum$ marginal: the derivative of the prediction in a common weight of
#   those tokens, in which Adam's second moment follows the gradient.
#
# `whatif` gives the third: the whole step under the rule, second moment, momentum and clip included,
# and its first-order change. And it measures that step on E. Differences from the run's own rule are
# paired, on the same samples, hence far more certain than the changes themselves.

# %%
dial = {w: f"weight:where({inside}, {w}, 1)" for w in (0.5, 0.99, 1.01, 1.5, 2.0)}
papers = ("top_entropy:0.2", "clip_cov:0.02", "steer", "entropy_bonus:0.3", "random_tokens:0.05")
others = tuple(funcprobe.rule(name).text for name in papers)  # with their defaults written out
asked = (rule, *dial.values(), *others)
found, _ = whatif(read_config(Path("toy.toml")), Question(rules=asked), Narrator())
by_rule = {row.rule: row for row in found.rules}
own, masked = by_rule["own"], by_rule[rule]
assert np.isclose(own.entropy.predicted.value, eta * first.derivative.value, rtol=1e-6)
assert np.isclose(masked.touched.value, len(chosen) / results.counts.U_tokens, rtol=1e-6)


# %%
def against_own(row, own):
    """Predicted and measured change less the own rule's, with the interval of the latter."""
    interval = row.entropy.difference_interval
    return {
        "predicted": row.entropy.predicted.value - own.entropy.predicted.value,
        "measured": row.entropy.difference.value,
        "low": interval.low,
        "high": interval.high,
    }


exact = against_own(masked, own)
pd.Series(
    {
        "by shares": -eta * chosen.share.sum(),
        "by marginals": -eta * chosen.marginal.sum(),
        "the step under the rule": exact["predicted"],
        "measured": exact["measured"],
        "measured, 95 % low": exact["low"],
        "measured, 95 % high": exact["high"],
    }
).to_frame(f"entropy less that of the own rule, {unit}")

# %% [markdown]
# Prediction and measurement agree for this rule and for every other that was tried: the predicted
# change lies in the interval of the measured one.

# %%
assert all(row.entropy.agrees for row in found.rules)
assert exact["low"] <= exact["predicted"] <= exact["high"]

# %% [markdown]
# ## 4. A dial
#
# A mask is the weight 0 of a family: multiply the chosen tokens' coefficients by $w$. The slope of
# the prediction at $w = 1$ is what *marginal* means, and differences of two exact predictions confirm
# it. The curve is not straight, as the second moment and the clip depend on $w$, too.

# %%
slope = (
    by_rule[dial[1.01]].entropy.predicted.value - by_rule[dial[0.99]].entropy.predicted.value
) / 0.02
assert np.isclose(slope, eta * chosen.marginal.sum(), rtol=1e-2, atol=1e-9)
print(f"slope at w = 1: {slope:+.4e}, eta times the marginals: {eta * chosen.marginal.sum():+.4e}")

curve = pd.DataFrame(
    [{"w": w, **against_own(by_rule[name], own)} for w, name in {0.0: rule, **dial}.items()]
    + [{"w": 1.0, **against_own(own, own)}]
).sort_values("w")
shown = curve[~curve.w.isin([0.99, 1.01])]
axis = alt.Chart(shown, width=360, height=240).encode(x=alt.X("w", title="weight of the chosen tokens"))
change = alt.Y("predicted", title=f"entropy less that of the own rule, {unit}")
bars = axis.mark_rule(color="#999").encode(y="low", y2="high")
bars + axis.mark_line().encode(y=change) + axis.mark_point(color="black").encode(y="measured")

# %% [markdown]
# The line is predicted, the points are measured, with 95 % intervals of the paired difference.
#
# ## 5. On a batch that has not seen the rule
#
# The cell was the lowest of several by this E, and the lowest of noisy numbers is too low. An E of
# another seed, with the same U, is innocent of the choice. U comes from the run's own file.

# %%
FRESH = f"""{TOY.replace('"toy"', '"fresh"', 1)}
run.seed = 1
rollouts.update = "runs/toy/rollouts/update.parquet"
"""
Path("fresh.toml").write_text(FRESH)
fresh, _ = whatif(read_config(Path("fresh.toml")), Question(rules=(rule, *others)), Narrator())
by_fresh = {row.rule: row for row in fresh.rules}
own_fresh = by_fresh["own"]
assert all(row.entropy.agrees for row in fresh.rules)
assert np.isclose(by_fresh[rule].touched.value, masked.touched.value)

# %%
compared = pd.DataFrame(
    [
        {"rule": name, "E": which, **against_own(rows[name], rows["own"])}
        for name in (rule, *others)
        for which, rows in (("chosen on", by_rule), ("fresh", by_fresh))
    ]
).set_index(["rule", "E"])
compared["established"] = compared.low * compared.high > 0
compared

# %% [markdown]
# Both columns agree with their own predictions. Where `fresh` shows less than `chosen on`, that is
# the price of having chosen; what is left in the interval of `fresh` is what may be claimed of the
# rule, at this checkpoint, for one step, given this U.

# %%
kept = compared.loc[(rule, "fresh")]
outcome = "changes" if kept.established else "is not known to change"
bounds = f"{kept.low:+.2e} to {kept.high:+.2e}"
print(f"On the fresh E the rule {outcome} the entropy: {kept.measured:+.2e} ({bounds})")

# %% [markdown]
# ## 6. The price
#
# More entropy at what reward? The frontier holds the rules than which no other has more of both, as
# measured on the fresh E. Intervals are those of each change; the paired differences above are
# narrower.

# %%
points = pd.DataFrame([point.model_dump() for point in fresh.frontier.points])
assert set(points.rule) == set(by_fresh)
for axis, half in (("entropy", "entropy_half_width"), ("reward", "reward_half_width")):
    points[f"{axis}_low"], points[f"{axis}_high"] = (
        points[axis] - points[half],
        points[axis] + points[half],
    )
best = points[~points.dominated]
assert len(best) >= 1
for point in points.itertuples():  # dominated: another rule has more of both
    more = (points.entropy > point.entropy) & (points.reward > point.reward)
    assert point.dominated or not more.any()
base = alt.Chart(points, width=420, height=300).encode(
    x=alt.X("entropy", title=f"change of entropy, {fresh.frontier.entropy_unit}"),
    y=alt.Y("reward", title=f"change of reward, {fresh.frontier.reward_unit}"),
    color=alt.Color("rule", legend=alt.Legend(labelLimit=400)),
)
across = base.mark_rule(opacity=0.4).encode(x="entropy_low", x2="entropy_high")
up = base.mark_rule(opacity=0.4).encode(y="reward_low", y2="reward_high")
across + up + base.mark_point(filled=True, size=60)

# %%
fresh

# %% [markdown]
# From here: `funcprobe whatif mine.toml --mask "advantage < 0 and surprisal > 4"` does the same from
# the command line, `--solve entropy=0` looks for the coefficient of a bonus at which the entropy is
# predicted to stay, and docs/rules.md lists the rules of papers. What many steps of a rule do is not
# answered by any of them: train with it, and probe the checkpoints.
