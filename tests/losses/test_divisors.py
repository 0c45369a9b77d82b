"""Divisors found by leaving out each prompt, against the closed forms and a jackknife made anew."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import InputError, Loss, LossInputs, LossValue, TokenStats
from funcprobe.losses.divisors import leave_one_out
from funcprobe.policy.layout import collate, response_mask
from funcprobe.statistics.intervals import update_error
from funcprobe.statistics.weights import by_unit

NORMALISATIONS = ("sequence", "token_mean", "sequence_mean", "longest", "constant")
# Sums of up to a hundred terms, divided twice: a few roundings of 1e-16 each.
EXACT = 1e-12


def drawn(lengths, prompt_of, seed=0):
    U = collate([[1]] * len(lengths), [[2] * T for T in lengths], prompt_of)
    real_NR = response_mask(U)
    generator = torch.Generator().manual_seed(seed)
    x_NR = torch.rand(real_NR.shape, generator=generator, dtype=torch.float64)
    advantage_N = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    nothing_N = torch.zeros(len(lengths), dtype=torch.long)
    inputs = LossInputs(advantage_N, real_NR, U.prompt_N, nothing_N, nothing_N)
    return U, TokenStats((x_NR - 1.1) * real_NR, (1.1 - x_NR) * real_NR), inputs


def by_objective(normalisation):
    """-J of `update_batch`, with h in place of l as well: as a loss whose divisor is not stated."""

    def loss(l_NR, h_NR, inputs):
        given = (inputs.advantage_N, inputs.mask_NR.sum(1), inputs.prompt_N, normalisation, 7.0)
        c_NR = funcprobe.coefficients(*given)
        c_NR = torch.nn.functional.pad(c_NR, (0, l_NR.shape[1] - c_NR.shape[1]))
        return LossValue(-(c_NR * l_NR).sum() - (c_NR * h_NR.square()).sum())

    return loss


def shares(normaliser_N, prompt_N):
    return by_unit(normaliser_N, prompt_N) / normaliser_N.sum()


def found(loss, U, stats, inputs):
    """The update with derived divisors, and the residual."""
    update, report = funcprobe.loss_update(U, stats, inputs, Loss(loss, None, None))
    return update, report.divisor_residual


@given(
    groups=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=2, max_size=6),
    normalisation=st.sampled_from(NORMALISATIONS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_divisors_are_those_of_the_closed_forms(groups, normalisation, seed):
    lengths = [T for group in groups for T in group]
    prompt_of = [m for m, group in enumerate(groups) for _ in group]
    U, stats, inputs = drawn(lengths, prompt_of, seed)
    update, residual = found(by_objective(normalisation), U, stats, inputs)
    closed = funcprobe.update_batch(U, inputs.advantage_N, normalisation, 7.0)
    assert torch.allclose(update.coef_NR, closed.coef_NR, rtol=EXACT, atol=0)
    expected_M = shares(closed.normaliser_N, U.prompt_N)
    for normaliser_N in (update.normaliser_N, update.entropy_normaliser_N):
        assert torch.allclose(shares(normaliser_N, U.prompt_N), expected_M, rtol=EXACT, atol=EXACT)
        assert float(normaliser_N.sum()) == pytest.approx(1, abs=EXACT)
    assert residual < EXACT


def by_microbatch(mean, l_NR, h_NR, inputs):
    """Mean over processes of the sum over micro-batches, `mean` of each call's sums and counts."""
    total = torch.zeros((), dtype=torch.float64)
    calls = {*zip(inputs.process_N.tolist(), inputs.microbatch_N.tolist(), strict=True)}
    accumulated = 1 + int(inputs.microbatch_N.max())
    processes = 1 + int(inputs.process_N.max())
    for process, microbatch in sorted(calls):
        rows_N = (inputs.process_N == process) & (inputs.microbatch_N == microbatch)
        x_NR = (l_NR * inputs.advantage_N[:, None] * inputs.mask_NR)[rows_N]
        mask_NR, tokens_N = inputs.mask_NR[rows_N], inputs.generated_tokens_N[rows_N]
        total = total - mean(x_NR, mask_NR, tokens_N / processes, accumulated) / processes
    return LossValue(total)


def of_the_generation(x_NR, mask_NR, tokens_N, accumulated):
    """Every call divides by the tokens of its generation batch."""
    return x_NR.sum() / tokens_N[0]


def of_the_call(x_NR, mask_NR, tokens_N, accumulated):
    """Every call divides by its own tokens; accumulation by the number of calls."""
    return x_NR.sum() / mask_NR.sum() / accumulated


SPLIT = ([3, 1, 4, 2, 5, 2, 1, 6], [0, 0, 1, 1, 2, 2, 3, 3])


def split(microbatch_of, process_of=(0,) * 8, generated=(30.0,) * 8):
    """U has 24 tokens: the generation batch is larger."""
    U, stats, inputs = drawn(*SPLIT)
    rows = {"microbatch_N": torch.tensor(microbatch_of), "process_N": torch.tensor(process_of)}
    return U, stats, inputs._replace(**rows, generated_tokens_N=torch.tensor(generated).double())


@pytest.mark.parametrize("process_of", [(0,) * 8, (0, 0, 0, 0, 1, 1, 1, 1)])
def test_microbatches_that_share_one_divisor(process_of):
    U, stats, inputs = split([0, 1, 0, 1, 1, 0, 1, 0], process_of)
    update, residual = found(functools.partial(by_microbatch, of_the_generation), U, stats, inputs)
    tokens_M = torch.tensor([4, 6, 7, 7]) / 24.0
    assert torch.allclose(shares(update.normaliser_N, U.prompt_N), tokens_M.double(), atol=EXACT)
    assert residual < EXACT


def test_one_prompt_for_each_microbatch():
    """Leaving a prompt out leaves its call out: the divisor is the number of calls."""
    U, stats, inputs = split([0, 0, 1, 1, 2, 2, 3, 3])
    update, residual = found(functools.partial(by_microbatch, of_the_call), U, stats, inputs)
    assert torch.allclose(update.normaliser_N, torch.full((8,), 1 / 8).double(), atol=EXACT)
    assert residual < EXACT


@pytest.mark.parametrize("mean", [of_the_call, of_the_generation])
def test_microbatches_with_divisors_of_their_own_have_no_common_one(mean):
    """Prompts 0 and 1 in one call, 2 and 3 in the other: without 0, c of 1 alone is multiplied, by
    10 / 6, and the residual is that of (10 / 6, 1, 1) against its projection."""
    U, stats, inputs = split([0, 0, 0, 0, 1, 1, 1, 1], generated=(30.0,) * 4 + (50.0,) * 4)
    update, residual = found(functools.partial(by_microbatch, mean), U, stats, inputs)
    square_N = update.coef_NR.square().sum(1)
    square_M = by_unit(square_N, U.prompt_N)
    worst = 0.0
    tokens = [4, 6, 7, 7]
    for m, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        s_M = torch.ones(4, dtype=torch.float64)
        s_M[m], s_M[other] = 0, (tokens[m] + tokens[other]) / tokens[other]
        weight_M = square_M * (s_M > 0)
        s = float((weight_M * s_M).sum() / weight_M.sum())
        off = float((weight_M * (s_M - s).square()).sum())
        worst = max(worst, math.sqrt(off / float(weight_M.sum())) / s)
    assert residual == pytest.approx(worst, rel=1e-9)
    assert residual > 0.1


def test_a_generation_that_is_left_without_tokens_in_the_loss():
    """Prompt 2 has all of its generation's: without it the call has nothing to divide, and is 0."""
    U, stats, inputs = split([0, 0, 0, 0, 1, 1, 1, 1], generated=(30.0,) * 4 + (50.0,) * 4)
    inputs = inputs._replace(mask_NR=inputs.mask_NR & (U.prompt_N < 3)[:, None])
    update, _ = found(functools.partial(by_microbatch, of_the_generation), U, stats, inputs)
    assert bool(update.coef_NR[U.prompt_N == 2].any())
    assert bool(update.normaliser_N.isfinite().all())


def test_the_error_over_u_is_a_jackknife_of_the_loss():
    """Slopes l' given, sum c l' of the loss made anew without each prompt: no divisor in sight."""
    U, stats, inputs = drawn(*SPLIT)
    loss = by_objective("token_mean")
    update, _ = found(loss, U, stats, inputs)
    slope_NR = torch.randn(update.coef_NR.shape, generator=torch.Generator().manual_seed(5)).double()
    without = []
    for m in range(4):
        kept_N = U.prompt_N != m
        advantage_N, T_N = inputs.advantage_N[kept_N], U.response_length_N[kept_N]
        c_NR = funcprobe.coefficients(advantage_N, T_N, U.prompt_N[kept_N], "token_mean")
        without.append(float((c_NR * slope_NR[kept_N, : c_NR.shape[1]]).sum()))
    centred_M = torch.tensor(without).double() - sum(without) / 4
    expected = math.sqrt(3 / 4 * float(centred_M.square().sum()))
    t_N = (update.coef_NR * slope_NR).sum(1)
    error = update_error([(t_N, update.normaliser_N)], U.prompt_N)
    assert error.se == pytest.approx(expected, rel=1e-6)  # `without` was rounded to float32


def test_a_constant_divisor_is_the_number_of_prompts():
    U, stats, inputs = drawn([3, 1, 4, 2, 5], [0, 0, 1, 1, 2])

    def summed(l_NR, h_NR, inputs):
        return LossValue((l_NR * inputs.mask_NR).sum() / 7)

    update, residual = found(summed, U, stats, inputs)
    expected_N = torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 3]).double()
    assert torch.allclose(update.normaliser_N, expected_N, atol=EXACT)
    assert residual < EXACT


def test_parts_with_divisors_of_their_own_are_seen():
    """By tokens, and by sequences and their lengths: the parts have other ratios in every sequence."""
    U, stats, inputs = drawn(*SPLIT)
    parts = [by_objective("token_mean"), by_objective("sequence_mean")]

    def both(l_NR, h_NR, inputs):
        return LossValue(sum(part(l_NR, h_NR, inputs).loss for part in parts))

    assert found(both, U, stats, inputs)[1] > 0.01


def test_a_prompt_that_has_all_coefficients():
    """Without it nothing is left, and its share is the mean of the others'."""
    U, stats, inputs = drawn(*SPLIT)
    inputs = inputs._replace(advantage_N=torch.tensor([0, 0, 1.0, -2, 0, 0, 0, 0]).double())
    update, residual = found(by_objective("sequence"), U, stats, inputs)
    assert torch.allclose(update.normaliser_N, torch.full((8,), 1 / 8).double(), atol=EXACT)
    tokens = found(by_objective("token_mean"), U, stats, inputs)[0]
    seen_M = torch.tensor([4, math.nan, 7, 7]).double() / 24
    seen_M[1] = 18 / 24 / 3
    expected_M = seen_M + (1 - seen_M.sum()) / 4
    assert torch.allclose(shares(tokens.normaliser_N, U.prompt_N), expected_M, atol=EXACT)
    assert residual < EXACT


@pytest.mark.parametrize("prompt_of", [[0, 0, 0], [0, 1, 2]])
def test_nothing_is_divided_by_zero(prompt_of):
    """One prompt alone; advantages that are all 0; sequences without a token in the loss."""
    U, stats, inputs = drawn([2, 3, 1], prompt_of)
    expected_N = torch.full((3,), 1 / 3).double()
    assert torch.equal(
        found(by_objective("token_mean"), U, stats, inputs)[0].normaliser_N.isfinite(), expected_N > 0
    )
    for loss in map(by_objective, NORMALISATIONS):
        equal = inputs._replace(advantage_N=torch.zeros(3).double())
        update, residual = found(loss, U, stats, equal)
        assert torch.allclose(update.normaliser_N, expected_N, atol=EXACT)
        assert residual == 0

    def masked(l_NR, h_NR, inputs):
        return LossValue((l_NR * inputs.mask_NR).sum() / inputs.mask_NR.sum())

    mask_NR = inputs.mask_NR & torch.tensor([True, True, False])[:, None]
    update, _ = found(masked, U, stats, inputs._replace(mask_NR=mask_NR))
    if prompt_of == [0, 1, 2]:
        expected_N = torch.tensor([2, 3, 0]).double() / 5
    assert torch.allclose(update.normaliser_N, expected_N, atol=EXACT)


def test_a_divisor_that_shrinks_or_grows_too_fast_is_in_the_residual():
    """c times D^2 has negative shares, c / D^3 some that are; both are bounded by 0, and stated."""
    U, stats, inputs = drawn([1, 9, 9, 9], [0, 1, 2, 3])

    def power(exponent, l_NR, h_NR, inputs):
        scale = inputs.mask_NR.sum().double() ** exponent
        return LossValue(-(l_NR * inputs.mask_NR).sum() * scale)

    for exponent, least in ((2, 0.5), (-3, 0.5)):
        update, residual = found(functools.partial(power, exponent), U, stats, inputs)
        assert bool((update.normaliser_N >= 0).all())
        assert residual > least


def test_a_loss_that_cannot_do_without_a_prompt_is_rejected():
    U, stats, inputs = drawn([3, 1, 4, 2], [5, 5, 8, 8])

    def fails(l_NR, h_NR, inputs):
        if len(l_NR) < 4:
            raise InputError("too few")
        return LossValue(l_NR.sum())

    def not_finite(l_NR, h_NR, inputs):
        return LossValue((l_NR * (1 if len(l_NR) == 4 else math.nan)).sum())

    for loss, match in (
        (fails, "too few .on U without the responses to prompt 5"),
        (not_finite, "is nan"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            found(loss, U, stats, inputs)
        assert "without the responses to prompt 5" in str(caught.value)


def test_only_what_is_not_stated_is_found():
    U, stats, inputs = drawn(*SPLIT)
    loss = Loss(by_objective("token_mean"), "sequences", None)
    update, report = funcprobe.loss_update(U, stats, inputs, loss)
    assert update.normaliser_N.tolist() == [1] * 8
    expected_M = torch.tensor([4, 6, 7, 7]).double() / 24
    assert torch.allclose(shares(update.entropy_normaliser_N, U.prompt_N), expected_M, atol=EXACT)
    assert report.divisor_residual < EXACT


def test_sequences_of_a_prompt_need_not_be_neighbours():
    c_NR = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]]).double()
    prompt_N = torch.tensor([4, 2, 4])

    def without(kept_N):
        weight_N = torch.tensor([2.0, 6.0, 2.0])[kept_N]
        return c_NR[kept_N] * 10 / weight_N.sum(), 0 * c_NR[kept_N]

    found = leave_one_out((c_NR, 0 * c_NR), prompt_N, without)
    assert found.normaliser_N.tolist() == pytest.approx([0.2, 0.6, 0.2], abs=EXACT)
    assert found.entropy_normaliser_N.tolist() == pytest.approx([0.25, 0.5, 0.25], abs=EXACT)
    assert found.residual < EXACT
