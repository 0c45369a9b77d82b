"""Rules that leave tokens out, or weight them, against loops; the error over U with fixed divisors."""

import pytest
import torch

from funcprobe import InputError, TokenStats
from funcprobe.along import error_over_u
from funcprobe.rules.registry import rule
from funcprobe.rules.rule import touched
from support.rule_cases import case


def same(found, expected):
    assert torch.equal(found, expected)


def left(update):
    """The tokens that J still counts: d is not 0 at any of the run's own."""
    return set(map(tuple, (update.entropy_coef_NR != 0).nonzero().tolist()))


def weights_are_one_or_zero(c, update):
    own = c.inputs.update
    kept_NR = (update.entropy_coef_NR != 0).double()
    same(update.coef_NR, own.coef_NR * kept_NR)
    same(update.entropy_coef_NR, own.entropy_coef_NR * kept_NR)
    assert update.normaliser_N is own.normaliser_N
    assert update.entropy_normaliser_N is own.entropy_normaliser_N


@pytest.mark.parametrize("prompt", [3, 8])
def test_drop_prompt(prompt):
    c = case()
    found = rule(f"drop_prompt:{prompt}").apply(c.inputs)
    of_row = c.inputs.update.batch.prompt_N.tolist()
    assert left(found) == {at for at in c.tokens if of_row[at[0]] != prompt}
    weights_are_one_or_zero(c, found)


def test_a_prompt_that_is_not_in_u():
    c = case()
    with pytest.raises(
        InputError, match=r"U has no prompt 5, expected one of its 2, of indices 3 to 8"
    ):
        rule("drop_prompt:5").apply(c.inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("amount", "number"), [("0.24", 6), ("0.27", 6), ("1", 1), ("5", 5), ("1e-9", 1), ("999", 99)]
)
def test_drop_tokens_takes_the_lowest_shares(seed, amount, number):
    c = case(seed=seed)
    assert len(c.tokens) == 24
    share = {at: float(c.inputs.share_NR[at]) for at in c.tokens}
    lowest = [at for at in sorted(share, key=share.__getitem__) if share[at] < 0][:number]
    found = rule(f"drop_tokens:{amount}").apply(c.inputs)
    assert left(found) == set(c.tokens) - set(lowest)
    weights_are_one_or_zero(c, found)
    had_c = [at for at in lowest if float(c.inputs.update.entropy_coef_NR[at]) != 0]
    assert touched(found, c.inputs.update, c.inputs.mask_NR) == pytest.approx(len(had_c) / 24)


def test_no_token_that_raises_the_entropy_is_dropped():
    c = case()
    c = c.with_(share_NR=c.inputs.share_NR.abs())
    found = rule("drop_tokens:0.5").apply(c.inputs)
    assert touched(found, c.inputs.update, c.inputs.mask_NR) == 0


def test_random_tokens_are_as_many():
    c = case()
    found = {seed: rule(f"random_tokens:0.25,{seed}").apply(c.inputs) for seed in range(40)}
    for update in found.values():
        assert len(left(update)) == 24 - 6
        assert left(update) < set(c.tokens)
        weights_are_one_or_zero(c, update)
    same(rule("random_tokens:0.25,7").apply(c.inputs).coef_NR, found[7].coef_NR)
    # Every token is left out by some of 40 seeds, 10 on average: a miss has probability 24 * 0.75**40.
    assert not set.intersection(*(left(update) for update in found.values()))
    assert len(left(rule("random_tokens:3").apply(c.inputs))) == 21


@pytest.mark.parametrize("name", ["drop_tokens", "random_tokens"])
@pytest.mark.parametrize("amount", ["1.5", "2.25"])
def test_no_part_of_a_token(name, amount):
    with pytest.raises(InputError, match=r"expected a share below 1 or a whole number of tokens"):
        rule(f"{name}:{amount}")


def test_mask_and_weight():
    c = case()
    i = c.inputs
    found = rule("mask:advantage < 0 and surprisal > 1").apply(i)
    logp, A = i.stats.logp_NR.tolist(), i.advantage_NR.tolist()
    kept = {(n, k) for n, k in c.tokens if A[n][k] < 0 and -logp[n][k] > 1}
    assert kept
    assert left(found) == kept
    weights_are_one_or_zero(c, found)
    found = rule("weight:1 + entropy / 2").apply(i)
    w = 1 + i.stats.entropy_NR / 2
    same(found.coef_NR, i.update.coef_NR * w)
    same(found.entropy_coef_NR, i.update.entropy_coef_NR * w)


def test_the_error_over_u_counts_what_was_left_out_as_zero():
    """Left out with J's divisors as they are: the delete-one jackknife over prompts, by definition."""
    c = case(prompts=(0, 0, 1, 1, 2, 3))
    found = rule("drop_prompt:1").apply(c.inputs)._replace(entropy_coef_NR=None)
    draw = torch.Generator().manual_seed(1)
    slope_NR = torch.randn(c.inputs.mask_NR.shape, generator=draw).double()
    along = TokenStats(slope_NR, slope_NR)
    error = error_over_u(found, along, along, 0.0)
    t, z = [0.0] * 4, [0.0] * 4
    for n, m in enumerate(found.batch.prompt_N.tolist()):
        t[m] += float((found.coef_NR[n] * slope_NR[n]).sum())
        z[m] += float(found.normaliser_N[n])
    # Without prompt m the coefficients of the others are divided by less.
    without = [(sum(t) - a) * sum(z) / (sum(z) - b) for a, b in zip(t, z, strict=True)]
    mean = sum(without) / 4
    variance = 3 / 4 * sum((x - mean) ** 2 for x in without)
    assert t[1] == 0
    assert z[1] > 0
    # Four terms in float64.
    assert error.se == pytest.approx(variance**0.5, rel=1e-12)
