"""Errors of shares from blocks of E, against tangents of E along every part of v."""

import pytest
import torch
from attribution.test_attribute import (
    CLIPPED,
    ENTROPIES,
    PLAIN,
    STEPS,
    E,
    U,
    adam_state,
    each_step,
)

import funcprobe
from funcprobe import Entropy, tree
from funcprobe.attribution.module_errors import block_error
from funcprobe.attribution.module_shares import factor_of, layer_of
from funcprobe.statistics import estimators, evaluation
from funcprobe.statistics.blocks import BLOCKS, block_influence, random_blocks
from funcprobe.step import masked
from support.policies import random_batch

SAMPLED = random_batch([(i % 7, 2 + i % 7 % 4, 1 + i % 6) for i in range(23)], seed=4)
DEFAULT = Entropy()
OWN = torch.arange(23)  # every sequence a unit, and a block
each_entropy = pytest.mark.parametrize("entropy", ENTROPIES, ids=lambda e: "-".join(e[:3]))


def passes_of(probe, step=PLAIN, entropy=DEFAULT, block_N=OWN, batch=SAMPLED, **given):
    state = adam_state(probe.params)
    return funcprobe.first_order_passes(
        *(probe.params, batch, U, state, probe.forward),
        **{"step": step, "entropy": entropy, "block_N": block_N, **given},
    )


def left_out(at: funcprobe.Evaluation, tangent: funcprobe.TokenStats) -> torch.Tensor:
    """(D' / D) (n - R d) / D of every sequence, D' along the tangent."""
    cells = estimators.first_order_cells(at.stats, tangent, at.mask_NR, at.entropy, at.log_ratio_NR)
    n_Ng, d_Ng, _, dd_Ng = cells
    N, D, dD = n_Ng.sum(0), d_Ng.sum(0), dd_Ng.sum(0)
    return (dD / D * (n_Ng - N / D * d_Ng) / D).sum(1)


@each_entropy
@pytest.mark.parametrize("step", [PLAIN, CLIPPED], ids=["plain", "clipped"])
def test_influence_is_that_of_the_tangents_along_every_part(probe64, step, entropy):
    """Of every sequence, on every part of v, by its own forward-mode pass; what is left out, added."""
    passes = passes_of(probe64, step, entropy)
    state = adam_state(probe64.params)
    at = funcprobe.evaluate(SAMPLED, passes.stats, entropy, baseline_NR=passes.baseline_NR)
    found_KTd = block_influence(at, passes.blocks.dot_KTd, OWN)
    parts = masked.parts(probe64.params, passes.Y, state, step)
    for i, part in enumerate(parts):
        _, tangent = probe64.tangents(probe64.params, SAMPLED, part)
        expected_N = evaluation.derivative(at, tangent, OWN).influence_N
        found_N = found_KTd[:, :, i].sum(1)
        torch.testing.assert_close(
            found_N - left_out(at, tangent),
            expected_N,
            rtol=1e-9,
            atol=1e-9 * float(expected_N.abs().max()),
        )
        assert abs(float(found_N.sum())) < 1e-9 * float(found_N.abs().sum())


def test_influence_on_a_tensor_is_that_of_the_tangents_along_it(probe64):
    passes = passes_of(probe64)
    at = funcprobe.evaluate(SAMPLED, passes.stats, baseline_NR=passes.baseline_NR)
    found_KTd = block_influence(at, passes.blocks.dot_KTd, OWN)
    update = masked.parts(probe64.params, passes.Y, adam_state(probe64.params), PLAIN).update
    for index in (0, 9, 27):
        name = sorted(update)[index]
        _, tangent = probe64.tangents(
            probe64.params, SAMPLED, tree.zeros(update) | {name: update[name]}
        )
        expected_N = evaluation.derivative(at, tangent, OWN).influence_N
        torch.testing.assert_close(
            found_KTd[:, index, 2] - left_out(at, tangent),
            expected_N,
            rtol=1e-8,
            atol=1e-9 * float(expected_N.abs().max()),
        )


def test_with_a_sampler_the_divisor_has_its_weights(probe64):
    logp_NR = probe64.token_stats(probe64.params, SAMPLED).logp_NR
    sampler_NR = logp_NR + 0.3 * torch.sin(torch.arange(logp_NR.numel()).double()).view(logp_NR.shape)
    for entropy in (Entropy(), Entropy(clip=1.2)):
        passes = passes_of(probe64, entropy=entropy, sampler_logp_NR=sampler_NR)
        at = funcprobe.evaluate(SAMPLED, passes.stats, entropy, sampler_NR, passes.baseline_NR)
        found_N = block_influence(at, passes.blocks.dot_KTd[:, :, :3].sum((1, 2)), OWN)
        expected_N = evaluation.derivative(at, passes.tangent, OWN).influence_N
        torch.testing.assert_close(
            found_N - left_out(at, passes.tangent), expected_N, rtol=1e-8, atol=1e-12
        )


@each_step
def test_blocks_leave_the_gradient_and_sum_to_its_products(probe64, step):
    block_N = random_blocks(SAMPLED.prompt_N, torch.Generator().manual_seed(1), 3)
    whole, split = passes_of(probe64, step, block_N=None), passes_of(probe64, step, block_N=block_N)
    assert whole.blocks is None
    for name, X in whole.X.items():
        torch.testing.assert_close(split.X[name], X, rtol=1e-10, atol=1e-14)
    parts = masked.parts(probe64.params, whole.Y, adam_state(probe64.params), step)
    assert split.blocks.dot_KTd.shape == (3, 28, 4)
    for i, part in enumerate(parts):
        by_name = list(tree.dot_by_name(whole.X, part).values())
        expected_T = torch.tensor(by_name, dtype=torch.float64)
        torch.testing.assert_close(
            split.blocks.dot_KTd[:, :, i].sum(0), expected_T, rtol=1e-8, atol=1e-12
        )
    direction = masked.mean_direction(probe64.params, whole.Y, adam_state(probe64.params), step)
    sum_of_parts = tree.add(tree.add(parts.momentum, parts.decay), parts.update)
    for name, v in direction.total.items():
        torch.testing.assert_close(sum_of_parts[name], v, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: "-".join(str(x) for x in s if x is not None))
def test_the_marginals_sum_to_the_response_to_a_common_weight(probe64, step):
    passes = passes_of(probe64, step, batch=E, block_N=torch.arange(6))
    state, params = adam_state(probe64.params), probe64.params
    along = funcprobe.marginal_tangents(params, passes, U, state, probe64.forward, step=step)
    found = funcprobe.attribute(params, passes, along, E, U, state, step=step)
    common = float(passes.blocks.dot_KTd[:, :, 3].sum())
    assert found.marginal.total == pytest.approx(common, rel=1e-9, abs=1e-11 * abs(found.derivative))


def attributed(probe, step=PLAIN, **given):
    passes = passes_of(probe, step, **given)
    state, params = adam_state(probe.params), probe.params
    along = funcprobe.marginal_tangents(params, passes, U, state, probe.forward, step=step)
    return passes, funcprobe.attribute(params, passes, along, SAMPLED, U, state, step=step, unit_N=OWN)


def test_errors_of_groups_are_those_of_their_sums(probe64):
    passes, found = attributed(probe64)
    errors, names = found.errors, sorted(probe64.params)
    at = funcprobe.evaluate(SAMPLED, passes.stats, baseline_NR=passes.baseline_NR)
    value_KTd = block_influence(at, passes.blocks.dot_KTd, OWN)
    assert tuple(names) == errors.influence.names
    for group_of, by_name, shares in (
        (layer_of, errors.layer, found.modules.layer),
        (factor_of, errors.factor, found.modules.factor),
        (str, errors.tensor, found.modules.tensor),
    ):
        assert by_name.keys() == shares.keys()
        group = group_of(names[-1])
        inside = [i for i, name in enumerate(names) if group_of(name) == group]
        expected_Kd = value_KTd[:, inside].sum(1)
        for i in range(3):
            assert by_name[group][i] == block_error(expected_Kd[:, i])
        total = by_name[group].total.se
        variance = float(expected_Kd[:, :3].sum(1).square().sum()) * 23 / 22
        assert total == pytest.approx(variance**0.5, rel=1e-12)
    each = [e.se for e in errors.layer.values() for e in e]
    assert all(se > 0 for se in each)
    # Shares of tensors are correlated: the errors of tensors do not add up in squares.
    assert errors.total.total.se != pytest.approx(
        sum(e.total.se**2 for e in errors.tensor.values()) ** 0.5, rel=0.1
    )


def test_the_error_of_the_difference_is_paired(probe64):
    _, found = attributed(probe64)
    difference_K = (
        found.errors.influence.value_KTd.sum(1)[:, 3] - found.errors.influence.value_KTd.sum(1)[:, 2]
    )
    assert found.errors.difference == block_error(difference_K)
    _, linear = attributed(probe64, funcprobe.Step("sgd"))
    assert linear.errors.difference.se < 1e-9 * linear.errors.marginal.se


def test_without_blocks_there_are_no_errors(probe64):
    assert attributed(probe64, block_N=None)[1].errors is None


def test_blocks_are_of_whole_units_and_of_equal_size():
    unit_N = torch.arange(100).repeat_interleave(2) % 97
    block_N = random_blocks(unit_N, torch.Generator().manual_seed(3))
    for unit in unit_N.unique():
        assert len(block_N[unit_N == unit].unique()) == 1
    first_M = torch.stack([block_N[unit_N == unit][0] for unit in unit_N.unique()])
    assert sorted(first_M.bincount().tolist()) == [6] * 15 + [7]
    assert len(block_N.unique()) == BLOCKS
    again = random_blocks(unit_N, torch.Generator().manual_seed(3))
    other = random_blocks(unit_N, torch.Generator().manual_seed(4))
    assert torch.equal(again, block_N)
    assert not torch.equal(other, block_N)
    few = random_blocks(torch.tensor([5, 9, 5]), torch.Generator())
    assert sorted(few.unique().tolist()) == [0, 1]
    with pytest.raises(funcprobe.InputError, match="at least two"):
        random_blocks(torch.tensor([5, 5]), torch.Generator())


def test_a_block_without_sequences_is_rejected(probe64):
    with pytest.raises(ValueError, match="block_N"):
        passes_of(probe64, block_N=OWN * 2)
