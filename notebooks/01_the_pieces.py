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
# # The pieces
#
# How will the next optimizer step change the entropy of a policy? This notebook answers the question
# from its pieces: the parameters as a dictionary, the log-probabilities, two gradients, Adam's step,
# and one contraction. Each piece is one call of funcprobe, and each is compared with an oracle that
# shares no code with it: a plain loop, `torch.optim`, or a finite difference in float64. Every
# comparison is an `assert`, so that the notebook, executed, is its own test.
#
# The policy is the built-in toy, a transformer of a third of a million parameters that adds two
# numbers, with a LoRA adapter in the middle of a training run. It is trained at first use (15
# seconds) and needs no network.

# %%
import itertools
import json
import math
import random
import re
import warnings

import pandas as pd
import torch

import funcprobe
from funcprobe import tree
from funcprobe.adapters.checkpoint.toy import ensure_toy
from funcprobe.adapters.optimizer import find_state, read_adam_state

toy = ensure_toy()
print(f"{toy.checkpoint.name}, {len(toy.prompts.read_text(encoding='utf-8').splitlines())} prompts")

# %%
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from transformers.utils import logging

warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers has changed
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(toy.checkpoint)
model = AutoPeftModelForCausalLM.from_pretrained(toy.checkpoint, is_trainable=True, dtype=torch.float64)
model = model.eval()

# %% [markdown]
# ## 1. The registry
#
# `bind` takes the trainable parameters out of a model. They become a dictionary from name to tensor,
# $\theta$, and every function receives them as an argument: evaluating the policy at $\theta + \eta
# v$ is a matter of passing another dictionary. The model is read and never changed.
#
# A *baseline* lowers the variance of the estimator below and changes neither its expectation nor the
# method. It is off here, so that the formulas are short, and on in the last section.

# %%
probe = funcprobe.bind(model, temperature=1.0, entropy=funcprobe.Entropy(baseline="none"))
theta = probe.params

trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
assert list(theta) == sorted(trainable)
assert all(theta[name].data_ptr() == trainable[name].data_ptr() for name in theta)  # shared, not copied
print(f"{len(theta)} tensors, {sum(t.numel() for t in theta.values()):,} parameters, among them")
print("\n".join(itertools.islice(theta, 3)))

# %% [markdown]
# ## 2. Two batches
#
# E, the evaluation batch, estimates the entropy: prompts drawn with replacement, one response $y_i$
# of $T_i$ tokens each. U, the update batch, makes the step: distinct prompts with $G$ responses each,
# whose rewards become advantages. Both are sampled from the policy itself. The reward is 1 where the
# last number of the response is the sum.

# %%
rows = [json.loads(line) for line in toy.prompts.read_text(encoding="utf-8").splitlines()]
rng, _ = random.Random(0), torch.manual_seed(0)


def sample(chosen, G):
    """G responses to each prompt: ids of prompts and of responses up to the first EOS, rewards."""
    chosen = [row for row in chosen for _ in range(G)]
    texts = [row["prompt"] for row in chosen]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 16}
    generated = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    responses, rewards = [], []
    for row, ids in zip(chosen, generated, strict=True):
        length = [*ids, tokenizer.eos_token_id].index(tokenizer.eos_token_id) + 1
        responses.append(ids[:length])
        numbers = re.findall(r"\d+", tokenizer.decode(ids[:length]))
        rewards.append(float(numbers[-1:] == [row["answer"]]))
    return [tokenizer(text).input_ids for text in texts], responses, rewards


B_E, B_U, G = 64, 8, 8
x, y, _ = sample(rng.choices(rows, k=B_E), 1)
E = funcprobe.collate(x, y, range(B_E))
x, y, rewards = sample(rng.sample(rows, B_U), G)
U = funcprobe.collate(x, y, [i // G for i in range(B_U * G)])
print(f"{B_E} responses of E, {B_U} x {G} of U; reward {sum(rewards) / len(rewards):.2f}")
print([tokenizer.decode(x[0]) + tokenizer.decode(ids) for ids in y[:3]])

# %% [markdown]
# ## 3. Log-probabilities
#
# $l_{ik} = \log p_\theta(y_{ik} \mid x_i, y_{i,<k})$ is the log-probability of token $k$ of response
# $i$, and $S_i = \sum_k l_{ik}$ that of the response. The oracle is a loop over sequences through the
# model itself. Model code converts to float32 inside its norms even where the model is float64;
# funcprobe does not, so the two agree to float32's precision.

# %%
S = probe.seq_logprobs(theta, E)

for i in range(8):
    prompt, end = int(E.prompt_length_N[i]), int(E.prompt_length_N[i] + E.response_length_N[i])
    tokens = E.tokens_NL[i, :end]
    with torch.no_grad():
        logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    plain = logp.gather(-1, tokens[1:, None]).squeeze(-1)[prompt - 1 :].sum()
    assert math.isclose(S[i], plain, rel_tol=1e-5)

# %% [markdown]
# ## 4. The entropy, and the same samples at other parameters
#
# With $h_{ik}$ the entropy of the whole next-token distribution at that position, the entropy per
# token is a ratio of two means,
#
# $$H = \frac{\sum_{ik} h_{ik}}{\sum_i T_i} .$$
#
# At other parameters $\theta'$ the responses sampled at $\theta$ are reweighted (self-normalised
# importance sampling). A prefix needs the weight of the tokens before it alone:
#
# $$H(\theta') = \frac{\sum_{ik} w_{ik}\, h_{ik}(\theta')}{\sum_{ik} w_{ik}}, \qquad
#   w_{ik} = \exp \sum_{j<k} \bigl( l_{ij}(\theta') - l_{ij}(\theta) \bigr).$$

# %%
stats = probe.token_stats(theta, E)
mask = funcprobe.response_mask(E).double()  # 1 at the tokens of responses, 0 in the padding


def entropy_at(params):
    """H at other parameters, from E's samples at theta."""
    there = probe.token_stats(params, E)
    ratio = there.logp_NR - stats.logp_NR
    weight = (ratio.cumsum(1) - ratio).exp() * mask
    return ((weight * there.entropy_NR).sum() / weight.sum()).item()


H = entropy_at(theta)
assert math.isclose(H, (stats.entropy_NR.sum() / E.response_length_N.sum()).item())
print(f"H = {H:.4f} nats per token")

# %% [markdown]
# ## 5. The gradient Y of the objective
#
# The rewards of a prompt's responses become advantages $A$, here $(r - \bar r) / (\mathrm{std} +
# 10^{-4})$ within the group. The objective of a policy-gradient step taken where the samples were
# drawn is linear in the log-probabilities,
#
# $$J(\theta) = \sum_{mk} c_{mk}\, l_{mk}(\theta), \qquad c_{mk} = A_m / \textstyle\sum_j T_j , \qquad
#   Y = \nabla J .$$
#
# Its oracle is a central difference along a random direction $d$, $\langle Y, d \rangle =
# \frac{d}{d\epsilon} J(\theta + \epsilon d)$.

# %%
advantage = funcprobe.advantages(torch.tensor(rewards).double(), U.prompt_N, "mean_std")
update = funcprobe.update_batch(U, advantage, "token_mean")
Y = probe.grad_Y(theta, update)


def J(params):
    return (update.coef_NR * probe.token_stats(params, U).logp_NR).sum().item()


def difference(f, direction, eps=1e-6):
    """d/d eps f(theta + eps direction) at 0, by a central difference; its error is of order eps^2."""
    ahead, behind = (f(tree.axpy(sign * eps, direction, theta)) for sign in (1, -1))
    return (ahead - behind) / (2 * eps)


d = {name: torch.randn_like(tensor) for name, tensor in theta.items()}
print(f"<Y, d> = {tree.dot(Y, d):.8f}, by differences {difference(J, d):.8f}")
assert math.isclose(tree.dot(Y, d), difference(J, d), rel_tol=1e-6)

# %% [markdown]
# ## 6. From the gradient to the step
#
# The optimizer's state is read by parameter name. `precondition` is the simplest step with it, $PY$
# with $P = 1 / (\sqrt{\hat\nu} + \varepsilon)$ and $\hat\nu$ the bias-corrected second moment as
# saved.

# %%
adam_state, _ = read_adam_state(find_state(toy.checkpoint), model, theta)
PY = funcprobe.precondition(Y, adam_state)

group = adam_state.groups[0]
for name in theta:
    nu_hat = adam_state.exp_avg_sq[name].double() / (1 - group.beta2 ** adam_state.step[name])
    torch.testing.assert_close(PY[name], Y[name] / (nu_hat.sqrt() + group.eps))

# %% [markdown]
# What the trainer will do is more than that: AdamW clips the gradient, updates both moments with it,
# and decays the weights. The direction per unit of learning rate, with $\theta_{\text{next}} = \theta
# + \eta v$, splits into three parts,
#
# $$v = v_{\text{momentum}} + v_{\text{decay}} + P\,Y ,$$
#
# where $P$ now holds this step's second moment and $1 - \beta_1$. The oracle is `torch.optim.AdamW`
# itself: it gets copies of the parameters and of the saved state, and takes the step.

# %%
step = funcprobe.Step(max_grad_norm=1.0)  # as the training run clips
direction = funcprobe.update_direction(theta, Y, adam_state, max_grad_norm=step.max_grad_norm)
v = direction.total

copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
optimizer = torch.optim.AdamW(
    copies.values(),
    lr=1.0,
    betas=(group.beta1, group.beta2),
    eps=group.eps,
    weight_decay=group.weight_decay,
)
for name, tensor in copies.items():
    tensor.grad = -Y[name]  # the trainer descends the loss -J
    optimizer.state[tensor] = {
        "step": torch.tensor(float(adam_state.step[name])),
        "exp_avg": adam_state.exp_avg[name].double().clone(),
        "exp_avg_sq": adam_state.exp_avg_sq[name].double().clone(),
    }
torch.nn.utils.clip_grad_norm_(copies.values(), step.max_grad_norm)
optimizer.step()
for name in theta:
    torch.testing.assert_close(v[name], copies[name].detach() - theta[name])

# %% [markdown]
# ## 7. The gradient X of the entropy
#
# The prediction is the derivative of *the estimator that measures*, the reweighted $H(\theta + \eta
# v)$ of section 4, and not of another expression with the same limit. Prediction and measurement then
# share their sampling noise. As a gradient it is
#
# $$\frac{d}{d\eta} H(\theta + \eta v) \Big|_0 = \langle X, v \rangle, \qquad
#   X = \nabla \sum_{ik} \bigl( p_{ik}\, l_{ik} + q_{ik}\, h_{ik} \bigr),$$
#
# with coefficients held fixed: $q_{ik} = 1/D$ is the direct effect on the entropies, and $p_{ij} =
# \sum_{k>j} (h_{ik} - H) / D$ the effect through which prefixes are visited; $D = \sum_i T_i$.

# %%
X = probe.grad_X(theta, E)

D = mask.sum()
to_come = (stats.entropy_NR - H) * mask
p = (to_come.flip(1).cumsum(1).flip(1) - to_come) / D * mask
again = probe.weighted_grad(theta, E, p, mask / D)
for name in theta:
    torch.testing.assert_close(X[name], again[name])

by_differences = difference(entropy_at, v)
print(f"<X, v> = {tree.dot(X, v):.8f}, by differences {by_differences:.8f}")
assert math.isclose(tree.dot(X, v), by_differences, rel_tol=1e-6)

# %% [markdown]
# The same number by forward mode: one pass gives the slopes $l'$ and $h'$ of every token along $v$,
# and with $a_{ik} = \sum_{j<k} l'_{ij}$
#
# $$\frac{d}{d\eta} H = \frac{N' - H D'}{D}, \qquad N' = \sum_{ik} (h'_{ik} + h_{ik} a_{ik}), \qquad
#   D' = \sum_{ik} a_{ik} .$$
#
# Two routes through different parts of automatic differentiation agree to rounding; every run of
# funcprobe checks that they do.

# %%
_, along = probe.tangents(theta, E, v)
a = (along.logp_NR.cumsum(1) - along.logp_NR) * mask
N_i = (along.entropy_NR + stats.entropy_NR * a).sum(1)  # what response i adds to N'
D_i = a.sum(1)
forward_route = ((N_i.sum() - H * D_i.sum()) / D).item()
assert math.isclose(forward_route, tree.dot(X, v), rel_tol=1e-9)

# %% [markdown]
# ## 8. Every sequence at once
#
# How much does each sequence's log-probability move along a direction $\mu$? That takes $s_i =
# \langle \nabla S_i, \mu \rangle$ for every $i$, without a gradient per sequence. The function
# $g(\alpha) = \langle \nabla_\theta \sum_i \alpha_i S_i, \mu \rangle$ is linear in $\alpha$, so that
# $s = \partial g / \partial \alpha$ comes from one backward pass through a backward pass. It is
# compared with differences of all $S_i$, with the tangents of section 7, and for a few sequences with
# their own gradients.

# %%
s = probe.alpha_vjp(theta, E, v)

eps = 1e-6
ahead, behind = (probe.seq_logprobs(tree.axpy(e, v, theta), E) for e in (eps, -eps))
torch.testing.assert_close(s, (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-6)
torch.testing.assert_close(s, along.logp_NR.sum(1))
for i in range(4):
    one = funcprobe.select(E, torch.tensor([i]))
    ones = funcprobe.response_mask(one).double()
    own = probe.weighted_grad(theta, one, ones, torch.zeros_like(ones))
    assert math.isclose(tree.dot(own, v), s[i], rel_tol=1e-8, abs_tol=1e-10)

# %% [markdown]
# With coefficients in place of ones the same contraction says who makes the change. Since $\langle X,
# PY \rangle = \langle PX, Y \rangle$, response $m$ of U contributes $t_m = \langle PX, \nabla \sum_k
# c_{mk} l_{mk} \rangle$, and with momentum and decay the shares sum to the whole.

# %%
PX = tree.multiply(direction.scale, X)
t = probe.alpha_vjp(theta, U, PX, p_NR=update.coef_NR)
from_momentum, from_decay = tree.dot(X, direction.momentum), tree.dot(X, direction.decay)

assert math.isclose(t.sum().item() + from_momentum + from_decay, tree.dot(X, v), rel_tol=1e-8)
print(f"momentum {from_momentum:+.3f}, decay {from_decay:+.3f}, this batch {t.sum():+.3f}")
print("by prompt of U:", [f"{share:+.3f}" for share in t.view(B_U, G).sum(1).tolist()])

# %% [markdown]
# ## 9. Predicted and measured
#
# The predicted change at learning rate $\eta$ is $\eta \langle X, v \rangle$; the measured one is
# $H(\theta + \eta v) - H(\theta)$ by the reweighted estimator. Because one is the derivative of the
# other, their ratio tends to 1 on this very batch, and what is missing of 1 is the quadratic term,
# proportional to $\eta$.

# %%
etas = [1e-6, 1e-5, 1e-4, 5e-4]
table = pd.DataFrame({"eta": etas})
table["predicted"] = table.eta * tree.dot(X, v)
table["measured"] = [entropy_at(tree.axpy(eta, v, theta)) - H for eta in etas]
table["ratio"] = table.measured / table.predicted

assert abs(table.ratio[0] - 1) < 1e-3
excess = (table.ratio - 1) / table.eta  # the quadratic term: the same at all small eta
assert math.isclose(excess[1], excess[2], rel_tol=0.1, abs_tol=2)
for eta, measured in zip(etas, table.measured, strict=True):
    assert math.isclose(probe.measure(theta, E, v, eta, stats).delta, measured, rel_tol=1e-6)
table

# %% [markdown]
# ## 10. How certain
#
# Another E would have given another number. Given U, response $i$ of E has the influence value
# $\psi_i = (N'_i - H D'_i - \frac{d H}{d\eta} T_i - \frac{D'}{D} (n_i - H T_i)) / D$ on the
# derivative, $n_i = \sum_k h_{ik}$, and the standard error is the root of $\frac{B}{B-1} \sum_i
# \psi_i^2$ (the delta method). Deleting one response at a time, the jackknife, is its oracle: the two
# agree to order $1/B$.

# %%
n_i, T_i = stats.entropy_NR.sum(1), E.response_length_N.double()
psi = (N_i - H * D_i - forward_route * T_i - D_i.sum() / D * (n_i - H * T_i)) / D
se = math.sqrt(B_E / (B_E - 1) * psi.square().sum().item())

n, T, N1, D1 = (part.sum() - part for part in (n_i, T_i, N_i, D_i))  # without response i
left_out = (N1 - n / T * D1) / T
jackknife = math.sqrt((B_E - 1) / B_E * (left_out - left_out.mean()).square().sum().item())

prediction = probe.predict(theta, E, update, adam_state, step=step)
assert math.isclose(prediction.derivative, forward_route, rel_tol=1e-9)
assert math.isclose(prediction.first_order.se, se, rel_tol=1e-9)
assert math.isclose(jackknife, se, rel_tol=0.2)
print(f"derivative {prediction.derivative:.3f}, standard error {se:.3f}, by jackknife {jackknife:.3f}")

# %% [markdown]
# The error over U is that of the $t_m$, summed by prompt, and `predict` adds the squares of the two.
# With the default estimator the score term has a baseline, a regression on what is known before each
# token: the expectation stays, the variance falls.

# %%
default = funcprobe.bind(model).predict(theta, E, update, adam_state, step=step)
print(f"without baseline {prediction.derivative:.3f}, standard error {prediction.se_total:.3f}")
print(f"with it          {default.derivative:.3f}, standard error {default.se_total:.3f}")
default

# %% [markdown]
# That is the whole method: `predict` is sections 5 to 8 in four passes, `measure` is section 9, and a
# run of `funcprobe run` adds sampling, checks, a sweep over learning rates and a report. The next
# notebook, `02_read_a_run`, reads one.
