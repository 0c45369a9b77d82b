"""Rules that change the policy term: loops over tokens, trainers' functions, the papers' losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe import InputError, LossInputs, TokenStats, TrlLoss, loss_update, trl_loss
from funcprobe.losses.verl import VerlLoss
from funcprobe.rules.registry import rule
from funcprobe.rules.rule import touched
from support import verl_loops
from support.rule_cases import case

# Sums of fewer than 100 terms in float64, of ratios that are exponentials of differences below 10.
RELATIVE = 1e-12


def loop(c, value):
    """[N, R] of value(i, k) at every token in the loss, else 0."""
    out = torch.zeros_like(c.inputs.unit_NR)
    for i, k in c.tokens:
        out[i, k] = value(i, k)
    return out


def lists(c):
    i = c.inputs
    return (x.tolist() for x in (i.stats.logp_NR, i.stats.entropy_NR, i.advantage_NR, i.unit_NR))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=1e-15)


def keeps(c, update):
    """Nothing but c differs from the run's own J."""
    own = c.inputs.update
    for name in update._fields:
        assert name == "coef_NR" or getattr(update, name) is getattr(own, name), name


seeds = pytest.mark.parametrize("seed", range(4))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sign_of_the_advantages(sign):
    c = case()
    name = "positive_only" if sign > 0 else "negative_only"
    found = rule(name).apply(c.inputs)
    own = c.inputs.update.coef_NR
    expected = loop(c, lambda i, k: float(own[i, k]) if sign * float(own[i, k]) > 0 else 0.0)
    same(found.coef_NR, expected)
    keeps(c, found)
    both = sum(rule(n).apply(c.inputs).coef_NR for n in ("positive_only", "negative_only"))
    same(both, own)
    found = rule("weighted_reinforce:0.3").apply(c.inputs)
    same(found.coef_NR, loop(c, lambda i, k: float(own[i, k]) * (0.3 if float(own[i, k]) > 0 else 1)))
    keeps(c, found)


@seeds
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.05, 0.0), (0.0, 0.4), (5.0, 50.0)])
def test_clip_is_a_loop(seed, low, high):
    c = case(seed=seed)
    logp, _, A, unit = lists(c)
    old = c.inputs.old_logp_NR.tolist()

    def value(i, k):
        r = math.exp(logp[i][k] - old[i][k])
        beyond = r > 1 + high if A[i][k] > 0 else r < 1 - low
        return 0.0 if beyond else A[i][k] * r * unit[i][k]

    found = rule(f"clip:{low},{high}").apply(c.inputs)
    same(found.coef_NR, loop(c, value))
    keeps(c, found)


@seeds
def test_clip_is_the_loss_of_trl(seed):
    c = case(seed=seed)
    i = c.inputs
    N = len(i.mask_NR)
    one_call = {"prompt_N": torch.arange(N), "microbatch_N": torch.zeros(N).long()}
    inputs = LossInputs(
        advantage_N=i.advantage_NR.sum(1) / i.mask_NR.sum(1),
        mask_NR=i.mask_NR,
        process_N=torch.zeros(N).long(),
        old_logp_NR=i.old_logp_NR,
        **one_call,
    )
    loss = trl_loss(TrlLoss("dapo", epsilon=0.2, epsilon_high=0.28))
    theirs, _ = loss_update(i.update.batch, i.stats, inputs, loss)
    unit_NR = i.mask_NR.double() / i.mask_NR.sum()
    found = rule("clip:0.2,0.28").apply(i._replace(unit_NR=unit_NR))
    same(found.coef_NR, theirs.coef_NR)


@seeds
def test_clip_has_the_gradient_of_ppos_objective(seed):
    c = case(seed=seed)
    i = c.inputs

    def objective(logp, h):
        r = (logp - i.old_logp_NR).exp()
        surrogate = torch.minimum(r * i.advantage_NR, r.clamp(0.8, 1.28) * i.advantage_NR)
        return (i.unit_NR * surrogate).sum() + (i.update.entropy_coef_NR * h).sum()

    same(c.gradient(rule("clip").apply(i)), c.ascent(objective))


@seeds
@pytest.mark.parametrize(("mode", "ratio"), [("clip_cov", 0.0002), ("clip_cov", 0.2), ("kl_cov", 0.15)])
@pytest.mark.parametrize("has_old", [True, False])
def test_covariance_rules_are_verls_loops(seed, mode, ratio, has_old):
    c = case(lengths=[9] * 8, prompts=[0] * 8, masked=[(0, 1), (3, 3)], seed=seed)
    # Advantages that put some covariances between verl's bounds of 1 and 5.
    c = c.with_(advantage_NR=3 * c.inputs.advantage_NR)
    if not has_old:
        c = c.with_(old_logp_NR=None)
        if mode == "kl_cov":
            with pytest.raises(InputError, match=r"kl_cov needs old_logp_NR, which is None: supply"):
                rule("kl_cov").apply(c.inputs)
            return
    logp, _, A, unit = lists(c)
    old = logp if not has_old else c.inputs.old_logp_NR.tolist()
    settings = VerlLoss(loss_mode=mode, clip_cov_ratio=ratio, kl_cov_ratio=ratio)
    rows = list(range(len(logp)))
    A_i = [a[0] or a[2] for a in A]
    _, slopes, log = verl_loops.token_losses(settings, rows, c.tokens, logp, old, A_i)
    found = rule(f"{mode}:{ratio}").apply(c.inputs)
    same(found.coef_NR, loop(c, lambda i, k: -slopes[i, k] * unit[i][k]))
    keeps(c, found)
    if mode == "clip_cov":
        assert log["pg_clipfrac"] > 0  # else no token is dropped


@seeds
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_top_entropy_keeps_what_trl_keeps(seed, share):
    from support.trl_step import Accelerator, Ranks, trainer

    c = case(seed=seed)
    i = c.inputs
    found = rule(f"top_entropy:{share}").apply(i)
    kept = found.coef_NR != 0
    self = trainer(TrlLoss(top_entropy_quantile=share), Accelerator(Ranks(1), 0), 1)
    h32_NR = i.stats.entropy_NR.float()  # as a model has them
    theirs = self.get_high_entropy_mask(h32_NR, i.mask_NR, 1 - share)
    same(found.coef_NR, i.update.coef_NR * theirs)
    keeps(c, found)
    has_c = i.update.coef_NR != 0
    assert torch.equal(kept, theirs & has_c)
    if share == 0.2:
        h = i.stats.entropy_NR
        left, out = h[theirs], h[i.mask_NR & ~theirs]
        assert len(left) == math.ceil(0.2 * (len(c.tokens) - 1))
        assert float(left.min()) > float(out.max())


def omega(c):
    """|A / p_old p (1 - p) (log p + h)| by token."""
    logp, h, A, _ = lists(c)
    old = logp if c.inputs.old_logp_NR is None else c.inputs.old_logp_NR.tolist()
    found = {}
    for i, k in c.tokens:
        p = math.exp(logp[i][k])
        found[i, k] = abs(A[i][k] / math.exp(old[i][k]) * p * (1 - p) * (logp[i][k] + h[i][k]))
    return found


@seeds
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # of A: the largest |Omega| above 0.02 and below
def test_steer_is_a_loop(seed, has_old, scale):
    c = case(seed=seed)
    c = c.with_(advantage_NR=scale * c.inputs.advantage_NR)
    c = c if has_old else c.with_(old_logp_NR=None)
    each = omega(c)
    own = c.inputs.update.coef_NR
    k_ = -math.log(0.7) / max(*each.values(), 0.02)
    found = rule("steer:0.7").apply(c.inputs)
    same(found.coef_NR, loop(c, lambda i, k: float(own[i, k]) * math.exp(-k_ * each[i, k])))
    keeps(c, found)
    least, most = min(each.values()), max(each.values())
    linear = rule("steer_linear:0.7,1.4").apply(c.inputs)
    w = {at: 1.4 - 0.7 * (x - least) / (most - least) for at, x in each.items()}
    same(linear.coef_NR, loop(c, lambda i, k: float(own[i, k]) * w[i, k]))


def test_steer_bounds_probabilities():
    """p and p_old at least 1e-8, and p at most 1 - 1e-8, as in STEER's code."""
    c = case(masked=[])
    l_NR, old_NR = c.inputs.stats.logp_NR.clone(), c.inputs.old_logp_NR.clone()
    l_NR[0, 0], l_NR[1, 0], old_NR[2, 0] = 0.0, -30.0, -19.0
    c = c.with_(stats=TokenStats(l_NR, c.inputs.stats.entropy_NR), old_logp_NR=old_NR)
    logp, h, A, _ = lists(c)

    def metric(i, k):
        p = min(max(math.exp(logp[i][k]), 1e-8), 1 - 1e-8)
        p_old = max(math.exp(float(old_NR[i, k])), 1e-8)
        return abs(A[i][k] / p_old * p * (1 - p) * (math.log(p) + h[i][k]))

    each = {at: metric(*at) for at in c.tokens}
    k_ = -math.log(0.8) / max(*each.values(), 0.02)
    own = c.inputs.update.coef_NR
    found = rule("steer").apply(c.inputs)
    same(found.coef_NR, loop(c, lambda i, k: float(own[i, k]) * math.exp(-k_ * each[i, k])))
    assert max(each, key=each.__getitem__) == (2, 0)  # by its bounded p_old
    # The largest less than p_old = 1e-8: the bounds of p matter to the last bit alone.
    each = {at: x for at, x in each.items() if at != (2, 0)}
    old_NR[2, 0] = l_NR[2, 0]
    old_NR[1, 0] = -30.0
    found = rule("steer").apply(c.with_(old_logp_NR=old_NR).inputs)
    each |= {(2, 0): metric(2, 0), (1, 0): metric(1, 0)}
    k_ = -math.log(0.8) / max(*each.values(), 0.02)
    same(found.coef_NR, loop(c, lambda i, k: float(own[i, k]) * math.exp(-k_ * each[i, k])))
    assert each[1, 0] == max(each.values())  # A (log p + h), with p / p_old = 1


def test_steer_with_equal_metrics():
    c = case()
    c = c.with_(advantage_NR=torch.zeros_like(c.inputs.advantage_NR))
    own = c.inputs.update.coef_NR
    same(rule("steer").apply(c.inputs).coef_NR, own)  # exp(0)
    same(rule("steer_linear:0.5,2.5").apply(c.inputs).coef_NR, 1.5 * own)


@seeds
@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 1.0])
def test_stare_is_a_loop(seed, share):
    c = case(lengths=(5, 6, 6, 7, 9, 6), seed=seed)
    logp, _, A, _ = lists(c)
    own = c.inputs.update.coef_NR

    def top(sign):
        of_sign = [at for at in c.tokens if sign * A[at[0]][at[1]] > 0]
        number = math.ceil(share * len(of_sign) - 1e-6)
        return set(sorted(of_sign, key=lambda at: logp[at[0]][at[1]])[:number])

    high, low = top(1), top(-1)
    assert (share == 0) == (not high)

    def weight(i, k, lowered):
        return 1.3 if (i, k) in high else lowered if (i, k) in low else 1.0

    found = rule(f"stare:1.3,{share}").apply(c.inputs)
    same(found.coef_NR, loop(c, lambda i, k: float(own[i, k]) * weight(i, k, 1.0)))
    keeps(c, found)
    found = rule(f"stare_two_sided:1.3,0.6,{share}").apply(c.inputs)
    same(found.coef_NR, loop(c, lambda i, k: float(own[i, k]) * weight(i, k, 0.6)))
    assert touched(found, c.inputs.update, c.inputs.mask_NR) == pytest.approx(
        len(high | low) / len(c.tokens)
    )


IDENTITIES = [
    "own",
    "weighted_reinforce:1",
    "temperature:0.5",
    "clip:5,1e9",
    "steer:1",
    "steer_linear:1,1",
    "stare:1",
    "stare_two_sided:1,1,0.5",
    "top_entropy:1",
    "entropy_bonus:0",
    "kl_penalty:0",
    "kl_penalty_k2:0",
    "kl_cov:0.5,0",
    "mask:entropy >= 0",
    "weight:1",
]


@given(st.integers(0, 2**31), st.sampled_from(IDENTITIES))
def test_rules_that_change_nothing(seed, text):
    c = case(seed=seed)
    # At the policy that sampled, where every ratio is 1.
    c = c.with_(old_logp_NR=c.inputs.stats.logp_NR)
    found, own = rule(text).apply(c.inputs), c.inputs.update
    same(found.coef_NR, own.coef_NR)
    same(found.entropy_coef_NR, own.entropy_coef_NR)
    assert touched(found, own, c.inputs.mask_NR) == 0
    same(found.normaliser_N, own.normaliser_N)


def test_touched_counts_what_differs():
    c = case()
    own, mask = c.inputs.update, c.inputs.mask_NR
    coef = own.coef_NR.clone()
    coef[0, 0] *= 1 + 1e-9
    coef[1, 0] *= 1 + 1e-15  # rounding
    d = own.entropy_coef_NR.clone()
    d[2, 0] += 1
    changed = own._replace(coef_NR=coef, entropy_coef_NR=d)
    assert touched(changed, own, mask) == pytest.approx(2 / len(c.tokens))
    assert touched(own._replace(entropy_coef_NR=None), own, mask) == 1


@pytest.mark.parametrize(
    "text",
    ["clip", "clip_cov:0.3", "kl_cov:0.3", "steer", "steer_linear", "stare:2,0.3", "top_entropy"],
)
def test_values_off_the_mask_do_not_matter(text):
    """Not even where they are not numbers, as past the end of a response."""
    c = case()
    i = c.inputs

    def spoilt(x):
        return torch.where(i.mask_NR, x, math.nan)

    other = i._replace(
        stats=TokenStats(*map(spoilt, i.stats)),
        old_logp_NR=spoilt(i.old_logp_NR),
        advantage_NR=spoilt(i.advantage_NR),
        unit_NR=spoilt(i.unit_NR),
    )
    same(rule(text).apply(other).coef_NR, rule(text).apply(i).coef_NR)


def test_a_step_without_tokens():
    c = case()
    nothing = torch.zeros_like(c.inputs.mask_NR)
    zero = torch.zeros_like(c.inputs.unit_NR)
    c = c.with_(mask_NR=nothing, update=c.inputs.update._replace(coef_NR=zero))
    for text in ("steer", "steer_linear", "stare", "top_entropy", "clip", "clip_cov", "kl_cov"):
        assert not rule(text).apply(c.inputs).coef_NR.any()
