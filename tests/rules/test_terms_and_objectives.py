"""Rules that add a term to J, or make its coefficients from rewards: gradients, loops, presets."""

import statistics as numbers

import pytest
import torch

from funcprobe import InputError, LossInputs, TrlLoss, loss_update, trl_loss, update_batch
from funcprobe.losses.verl import VerlLoss, verl_loss
from funcprobe.rules.registry import rule
from support.rule_cases import case, statistics

# Sums of fewer than 100 terms in float64.
RELATIVE = 1e-11
seeds = pytest.mark.parametrize("seed", range(3))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=1e-14)


@seeds
@pytest.mark.parametrize("coef", [0.3, -0.02])
@pytest.mark.parametrize("own_bonus", [True, False])
def test_entropy_bonus_has_the_gradient_of_the_entropy(seed, coef, own_bonus):
    c = case(seed=seed)
    i = c.inputs
    if not own_bonus:
        i = i._replace(update=i.update._replace(entropy_coef_NR=None, entropy_normaliser_N=None))
    found = rule(f"entropy_bonus:{coef}").apply(i)
    expected = c.gradient(i.update) + c.ascent(lambda _, h: coef * (i.unit_NR * h).sum())
    same(c.gradient(found), expected)
    assert found.coef_NR is i.update.coef_NR
    same(found.entropy_normaliser_N, i.update.normaliser_N)


def test_no_bonus_is_none():
    i = case().inputs
    bare = i._replace(update=i.update._replace(entropy_coef_NR=None, entropy_normaliser_N=None))
    assert rule("entropy_bonus:0").apply(bare) is bare.update


def test_entropy_bonus_is_trls():
    """Where J is the mean over all tokens, as TRL's bonus is."""
    c = case()
    i, coef = c.inputs, 0.05
    N = len(i.mask_NR)
    inputs = LossInputs(
        i.advantage_NR[:, 0],
        i.mask_NR,
        prompt_N=torch.arange(N),
        microbatch_N=torch.zeros(N).long(),
        process_N=torch.zeros(N).long(),
    )
    theirs, _ = loss_update(
        i.update.batch, i.stats, inputs, trl_loss(TrlLoss("dapo", entropy_coef=coef))
    )
    plain, _ = loss_update(i.update.batch, i.stats, inputs, trl_loss(TrlLoss("dapo")))
    unit_NR = i.mask_NR.double() / i.mask_NR.sum()
    found = rule(f"entropy_bonus:{coef}").apply(i._replace(update=plain, unit_NR=unit_NR))
    same(found.coef_NR, theirs.coef_NR)
    same(found.entropy_coef_NR, theirs.entropy_coef_NR)
    assert theirs.entropy_normaliser_N is not None
    same(found.entropy_normaliser_N, theirs.entropy_normaliser_N)


def test_a_bonus_of_another_divisor_is_refused():
    c = case()
    i = c.inputs
    ones_N = torch.ones(len(i.mask_NR)).double()
    update = i.update._replace(entropy_normaliser_N=3 * i.update.normaliser_N)
    found = rule("entropy_bonus").apply(i._replace(update=update))  # a common factor is no other
    assert found.entropy_normaliser_N is update.normaliser_N
    update = i.update._replace(entropy_normaliser_N=ones_N)
    with pytest.raises(InputError, match="has another divisor than its policy term"):
        rule("entropy_bonus").apply(i._replace(update=update))


@seeds
@pytest.mark.parametrize("name", ["kl_penalty", "kl_penalty_k2"])
def test_kl_penalty_has_the_gradient_of_its_estimate(seed, name):
    c = case(seed=seed)
    i = c.inputs

    def penalty(logp, _):
        x = logp - i.ref_logp_NR
        kl = x**2 / 2 if name == "kl_penalty_k2" else (-x).exp() - 1 + x
        return -0.3 * (i.unit_NR * kl).sum()

    found = rule(f"{name}:0.3").apply(i)
    same(c.gradient(found), c.gradient(i.update) + c.ascent(penalty))
    assert found.entropy_coef_NR is i.update.entropy_coef_NR


@seeds
def test_kl_penalty_is_verls(seed):
    c = case(seed=seed)
    i, N = c.inputs, len(c.inputs.mask_NR)
    inputs = LossInputs(
        torch.zeros(N).double(),
        i.mask_NR,
        prompt_N=torch.arange(N),
        microbatch_N=torch.zeros(N).long(),
        process_N=torch.zeros(N).long(),
        ref_logp_NR=i.ref_logp_NR,
    )
    unit_NR = i.mask_NR.double() / i.mask_NR.sum()
    nothing = i.update._replace(coef_NR=torch.zeros_like(unit_NR))
    for name, kind in (("kl_penalty", "k3"), ("kl_penalty_k2", "k2")):
        settings = VerlLoss(use_kl_loss=True, kl_loss_coef=0.04, kl_loss_type=kind)
        theirs, _ = loss_update(i.update.batch, i.stats, inputs, verl_loss(settings))
        found = rule(name).apply(i._replace(update=nothing, unit_NR=unit_NR))
        same(found.coef_NR, theirs.coef_NR)


def test_k2s_mean_gradient_is_that_of_the_kl_divergence():
    """Enumerated over one next token; that of k3 is another."""
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(1, 1, 6, generator=draw).double().requires_grad_()
    p_ref = torch.randn(6, generator=draw).double().log_softmax(-1)
    p = z.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - p_ref)).sum(), z)
    means = {}
    for name in ("kl_penalty", "kl_penalty_k2"):
        total = torch.zeros_like(z)
        for token in range(6):
            c = case(lengths=[1], prompts=[0], masked=[])
            stats = statistics(z.detach(), torch.tensor([[token]]))
            i = c.inputs._replace(
                stats=stats,
                unit_NR=torch.ones(1, 1).double(),
                ref_logp_NR=p_ref[None, token : token + 1],
            )
            i = i._replace(update=i.update._replace(coef_NR=torch.zeros(1, 1).double()))
            coef = rule(f"{name}:1").apply(i).coef_NR
            (slope,) = torch.autograd.grad(statistics(z, torch.tensor([[token]])).logp_NR.sum(), z)
            total = total - p.detach().exp()[0, 0, token] * coef * slope
        means[name] = total
    same(means["kl_penalty_k2"], exact)
    assert float((means["kl_penalty"] - exact).abs().max()) > 0.01


def test_k3_that_overflows_is_refused():
    c = case()
    ref_NR = torch.where(c.inputs.mask_NR, c.inputs.stats.logp_NR + 800, 0.0)
    with pytest.raises(InputError, match=r"l - l_ref = -800 nats: k3 overflows, use the estimate"):
        rule("kl_penalty").apply(c.inputs._replace(ref_logp_NR=ref_NR))


def by_loop(c, mode):
    """Advantages in plain Python."""
    reward, prompt = c.inputs.reward_N.tolist(), c.inputs.update.batch.prompt_N.tolist()
    found = []
    for r, m in zip(reward, prompt, strict=True):
        group = [x for x, n in zip(reward, prompt, strict=True) if n == m]
        centred = r - sum(group) / len(group)
        if mode == "mean_std":
            centred /= numbers.stdev(group) + 1e-4
        if mode == "leave_one_out":
            centred *= len(group) / (len(group) - 1)
        found.append(centred)
    return found


@pytest.mark.parametrize("mode", ["mean", "mean_std", "leave_one_out"])
def test_advantages_from_rewards(mode):
    c = case()
    found = rule(f"advantage:{mode}").apply(c.inputs)
    A_N = torch.tensor(by_loop(c, mode), dtype=torch.float64)
    same(found.coef_NR, A_N[:, None] * c.inputs.unit_NR)
    assert found.normaliser_N is c.inputs.update.normaliser_N
    with pytest.raises(
        InputError, match="advantage needs reward_N, which is None: supply rewards of U"
    ):
        rule(f"advantage:{mode}").apply(c.inputs._replace(reward_N=None))


PRESET_MODES = {"grpo": "mean_std", "dapo": "mean_std", "dr_grpo": "mean", "rloo": "leave_one_out"}


@pytest.mark.parametrize("name", PRESET_MODES)
@pytest.mark.parametrize("empty", [False, True])  # a response with no token in the loss
def test_presets_are_loops(name, empty):
    masked = [(0, 1), (4, 3), *([(3, 0), (3, 1)] if empty else [])]
    c = case(lengths=(5, 3, 6, 2, 4, 1), masked=masked)
    tokens = [0] * 6
    for i, _ in c.tokens:
        tokens[i] += 1
    assert (0 in tokens) == empty
    z = {
        "grpo": lambda i: 1 / (6 * tokens[i]),
        "dapo": lambda i: 1 / sum(tokens),
        "dr_grpo": lambda i: 1 / (6 * 6),
        "rloo": lambda i: 1 / 6,
    }[name]
    A = by_loop(c, PRESET_MODES[name])
    expected = torch.zeros_like(c.inputs.unit_NR)
    for i, k in c.tokens:
        expected[i, k] = A[i] * z(i)
    found = rule(name).apply(c.inputs)
    same(found.coef_NR, expected)
    adds = [float(t) for t in tokens] if name == "dapo" else [1.0] * 6
    assert found.normaliser_N.tolist() == adds
    assert found.entropy_coef_NR is c.inputs.update.entropy_coef_NR
    if name == "dr_grpo":
        same(rule("dr_grpo:128").apply(c.inputs).coef_NR, expected * 6 / 128)


def test_a_preset_is_the_objective_of_a_run():
    c = case(masked=[])
    batch = c.inputs.update.batch
    A_N = torch.tensor(by_loop(c, "mean_std"), dtype=torch.float64)
    theirs = update_batch(batch, A_N, "token_mean")
    found = rule("dapo").apply(c.inputs)
    same(found.coef_NR, theirs.coef_NR)
    same(found.normaliser_N, theirs.normaliser_N)


def test_a_reward_that_is_not_finite_is_named():
    c = case()
    reward_N = c.inputs.reward_N.clone()
    reward_N[2] = float("nan")
    with pytest.raises(InputError, match=r"grpo needs reward_N, which is nan at \[2\]"):
        rule("grpo").apply(c.inputs._replace(reward_N=reward_N))
