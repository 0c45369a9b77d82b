"""Coefficients of a loss, and the update that they make, against finite differences and loops."""

import math

import pytest
import torch

import funcprobe
from funcprobe import InputError, Loss, LossInputs, LossValue, TokenStats
from funcprobe.policy.layout import collate, response_mask

BATCH = collate([[1, 2], [1, 2], [3], [3]], [[4, 5, 6], [4], [5, 6, 4, 5], [6, 6]], [0, 0, 1, 1])
MASK = response_mask(BATCH)


def drawn(seed: int = 0) -> tuple[TokenStats, LossInputs]:
    """Statistics and inputs of BATCH, the fourth sequence's second token not of the policy."""
    generator = torch.Generator().manual_seed(seed)

    def table(low: float, high: float) -> torch.Tensor:
        x_NR = low + (high - low) * torch.rand(MASK.shape, generator=generator, dtype=torch.float64)
        return x_NR * MASK

    stats = TokenStats(table(-4, -0.1), table(0.1, 2))
    mask_NR = MASK.clone()
    mask_NR[3, 1] = False
    inputs = LossInputs(
        advantage_N=torch.tensor([1.0, -0.5, 0.25, -2.0]).double(),
        mask_NR=mask_NR,
        prompt_N=BATCH.prompt_N,
        microbatch_N=torch.tensor([0, 0, 1, 1]),
        process_N=torch.zeros(4, dtype=torch.long),
        old_logp_NR=stats.logp_NR + 0.1 * table(-1, 1),
        ref_logp_NR=stats.logp_NR + table(-1, 1),
    )
    return stats, inputs


def smooth(l_NR, h_NR, inputs):
    """A loss in which every array plays a part, differentiable everywhere."""
    ratio_NR = (l_NR - inputs.old_logp_NR).exp()
    gap_NR = inputs.ref_logp_NR - l_NR
    token_NR = -ratio_NR * inputs.advantage_N[:, None] + 0.3 * (gap_NR.exp() - gap_NR - 1)
    mask_NR = inputs.mask_NR
    entropy = (h_NR.square() * mask_NR).sum() / mask_NR.sum()
    return LossValue((token_NR * mask_NR).sum() / 7 - 0.2 * entropy, {"entropy": entropy})


def test_coefficients_are_minus_the_finite_differences():
    """Central differences, step 1e-5: their error is 1e-10 of a third derivative of order 1."""
    stats, inputs = drawn()
    update, report = funcprobe.loss_update(BATCH, stats, inputs, Loss(smooth, "tokens"))
    assert report.loss == float(smooth(*stats, inputs).loss)
    for field, found_NR in (("logp_NR", update.coef_NR), ("entropy_NR", update.entropy_coef_NR)):
        for i, k in [(0, 0), (1, 0), (2, 3), (3, 0), (3, 1), (0, 3)]:
            unit = torch.zeros(MASK.shape, dtype=torch.float64)
            unit[i, k] = 1e-5
            low, high = (
                float(smooth(*stats._replace(**{field: getattr(stats, field) + s * unit}), inputs).loss)
                for s in (-1, 1)
            )
            assert float(found_NR[i, k]) == pytest.approx(-(high - low) / 2e-5, abs=1e-8)
    assert float(update.coef_NR[3, 1]) == float(update.coef_NR[0, 3]) == 0


def test_divisors_are_the_tokens_and_sequences_in_the_loss():
    stats, inputs = drawn()
    tokens = funcprobe.loss_update(BATCH, stats, inputs, Loss(smooth, "tokens", "sequences"))[0]
    assert tokens.normaliser_N.tolist() == [3, 1, 4, 1]
    assert tokens.entropy_normaliser_N.tolist() == [1, 1, 1, 1]
    inputs = inputs._replace(mask_NR=inputs.mask_NR & torch.tensor([True, False, True, True])[:, None])
    found = funcprobe.loss_update(BATCH, stats, inputs, Loss(smooth, "sequences"))[0]
    assert found.normaliser_N.tolist() == [1, 1, 1, 1]  # as trainers count them
    assert found.entropy_normaliser_N.tolist() == [3, 0, 4, 1]


def test_a_loss_without_entropies_has_no_coefficients_of_them():
    stats, inputs = drawn()

    def plain(l_NR, h_NR, inputs):
        return LossValue(-(l_NR * inputs.mask_NR * inputs.advantage_N[:, None]).sum())

    update, report = funcprobe.loss_update(BATCH, stats, inputs, Loss(plain, "sequences"))
    assert update.entropy_coef_NR is None is update.entropy_normaliser_N
    assert torch.equal(update.coef_NR, inputs.advantage_N[:, None] * inputs.mask_NR)
    assert report.metrics == {}


def test_subgradients_at_a_ratio_of_one_and_at_a_bound_are_those_of_autograd():
    """min(r, clip(r)) A: at r = 1 the two surrogates are equal, and their gradients; at r = 1 + epsilon
    exactly, clamp passes the gradient, as torch does for a bound that is met."""
    stats, inputs = drawn()
    bound = 1.25  # a ratio that exp(log(.)) gives exactly here

    def clipped(l_NR, h_NR, inputs):
        ratio_NR = (l_NR - l_NR.detach()).exp() * at_NR
        both = ratio_NR, ratio_NR.clamp(1 / bound, bound)
        A_NR = inputs.advantage_N[:, None] * inputs.mask_NR
        return LossValue(-torch.min(*(x * A_NR for x in both)).sum())

    for value, slope_up, slope_down in ((1.0, 1, 1), (bound, 1, 1), (1.5, 0, 1), (0.5, 1, 0)):
        at_NR = torch.full(MASK.shape, value, dtype=torch.float64)
        found_NR = funcprobe.loss_update(BATCH, stats, inputs, Loss(clipped, "tokens"))[0].coef_NR
        A_NR = inputs.advantage_N[:, None] * inputs.mask_NR
        slope_NR = torch.where(A_NR > 0, slope_up, slope_down) * value
        assert torch.allclose(found_NR, A_NR * slope_NR, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"advantage_N": torch.ones(3)}, r"advantage_N has shape \(3,\)"),
        ({"old_logp_NR": torch.ones(4, 3)}, r"old_logp_NR has shape \(4, 3\)"),
        ({"ref_logp_NR": torch.full(MASK.shape, math.nan)}, r"ref_logp_NR is nan at \[0, 0\]"),
        ({"advantage_N": torch.tensor([1.0, math.inf, 0, 0])}, r"advantage_N is inf at \[1\]"),
        ({"mask_NR": torch.ones_like(MASK)}, "past the end"),
    ],
)
def test_inputs_that_do_not_fit_are_rejected(change, match):
    stats, inputs = drawn()
    with pytest.raises(InputError, match=match):
        funcprobe.loss_update(BATCH, stats, inputs._replace(**change), Loss(smooth, "tokens"))


def test_a_loss_that_is_not_finite_is_rejected():
    stats, inputs = drawn()

    def overflowing(l_NR, h_NR, inputs):
        return LossValue((l_NR * 1e6).exp().sum() + (-l_NR * 1e6).exp().sum())

    with pytest.raises(InputError, match="loss of U at theta is inf"):
        funcprobe.loss_update(BATCH, stats, inputs, Loss(overflowing, "tokens"))
