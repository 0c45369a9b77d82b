"""The mean step over dropout masks and its spread, against loops and against PyTorch's own dropout."""

import math
from itertools import pairwise
from statistics import fmean, median, stdev

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

import funcprobe
from funcprobe import AdamGroup, Step, UpdateBatch, masked_forwards, tree
from funcprobe.statistics.intervals import Error, jackknife_error, student
from funcprobe.step.masked import mean_direction, over_masks
from support.policies import random_batch, random_like, tiny_policy

E = random_batch([(0, 3, 4), (1, 5, 2), (2, 1, 6), (3, 2, 5)])
U = random_batch([(0, 3, 4), (0, 3, 2), (1, 4, 3), (1, 4, 3)], seed=1)
COEF = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()
COEF = COEF * funcprobe.response_mask(U)
J = UpdateBatch(U, COEF, U.response_length_N.double())
CLIP = Step(max_grad_norm=0.5)


@pytest.fixture(scope="module")
def policy():
    """LoRA with dropout on all linears, and a state after some steps of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, target_modules="all-linear")
        model = get_peft_model(tiny_policy().unload().float(), lora)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model.double().eval()


@pytest.fixture(scope="module")
def probe(policy):
    return funcprobe.bind(policy)


@pytest.fixture(scope="module")
def state(probe):
    names, small = tuple(probe.params), {n: 0.3 * g for n, g in random_like(probe.params).items()}
    # Some entries of nu are far below this gradient's squares: there v is far from linear in Y.
    squares = {n: g.square() for n, g in random_like(probe.params, 2).items()}
    groups = (AdamGroup(names, 1e-3, 0.9, 0.99, 1e-8, 0.1),)
    return funcprobe.AdamState(small, squares, dict.fromkeys(names, 30), groups)


def gradients(probe, policy, count: int, seed: int = 0) -> list[funcprobe.Params]:
    masks = masked_forwards(policy, probe.params, probe.forward, count, seed)
    return [funcprobe.grad_Y(probe.params, J, forward) for forward in masks]


def test_the_mean_of_the_steps_is_a_loops(probe, policy, state) -> None:
    Y = gradients(probe, policy, 3)
    found = mean_direction(probe.params, Y, state, CLIP)
    each = [funcprobe.update_direction(probe.params, y, state, max_grad_norm=0.5) for y in Y]
    for part in ("total", "momentum", "decay", "scale"):
        for name in probe.params:
            loop = torch.stack([getattr(one, part)[name] for one in each]).mean(0)
            torch.testing.assert_close(getattr(found, part)[name], loop, rtol=1e-12, atol=1e-14)
    assert found.clip_coefficient == pytest.approx(fmean(one.clip_coefficient for one in each))
    assert len({one.clip_coefficient for one in each}) == 3
    # v is not linear: the step of the mean gradient is another.
    of_mean = funcprobe.update_direction(probe.params, tree.mean(Y), state, max_grad_norm=0.5)
    assert tree.norm(tree.axpy(-1.0, of_mean.total, found.total)) > 1e-3 * tree.norm(found.total)
    one = mean_direction(probe.params, Y[:1], state, CLIP)
    assert all(torch.equal(one.total[n], each[0].total[n]) for n in probe.params)


def test_prediction_is_along_the_mean_and_has_the_spread(probe, policy, state) -> None:
    masks = masked_forwards(policy, probe.params, probe.forward, 5, 0)
    found = probe.predict(probe.params, E, J, state, step=CLIP, masks=masks)
    Y = gradients(probe, policy, 5)
    v = mean_direction(probe.params, Y, state, CLIP)
    along, update = [], []
    for y in Y:
        one = funcprobe.update_direction(probe.params, y, state, max_grad_norm=0.5)
        along.append(tree.dot(found.X, one.total))
        update.append(tree.dot(found.X, tree.multiply(one.scale, y)))
    # Products of 1e3 entries in float64.
    assert found.bars_dot == pytest.approx(tree.dot(found.X, v.total), rel=1e-10)
    assert found.bars_dot == pytest.approx(found.derivative, rel=1e-9)
    assert found.bars_dot == pytest.approx(fmean(along), rel=1e-9)
    assert found.from_update == pytest.approx(fmean(update), rel=1e-9)
    parts = found.from_momentum + found.from_decay + found.from_update
    assert parts == pytest.approx(found.bars_dot, rel=1e-9)
    assert found.masks is not None
    assert found.masks.derivative == pytest.approx(along, rel=1e-9)
    assert found.masks.spread == pytest.approx(stdev(along), rel=1e-9)
    assert found.masks.se == pytest.approx(stdev(along) * math.sqrt(6 / 5), rel=1e-9)
    squares = found.first_order.se**2 + found.se_over_u**2 + found.masks.se**2
    assert found.se_total == pytest.approx(math.sqrt(squares))
    plain = probe.predict(probe.params, E, J, state, step=CLIP)
    assert plain.masks is None
    assert torch.equal(
        plain.tangent.logp_NR, probe.tangents(probe.params, E, plain.direction.total)[1][0]
    )
    # Of the part without masks: P of the mean step, tangents of the policy without dropout.
    scaled = tree.multiply(v.scale, found.X)
    t_N = (COEF * probe.tangents(probe.params, U, scaled)[1].logp_NR).sum(1)
    torch.testing.assert_close(found.t_N, t_N, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clipped", [0, 1, 2, 3])
def test_the_error_over_U_follows_the_clip_of_each_mask(probe, policy, state, clipped) -> None:
    """Central differences in the prompts' weights w, of which every Y_k has the same change D(w)."""
    masks, Y = masked_forwards(policy, probe.params, probe.forward, 3, 0), gradients(probe, policy, 3)
    norms = sorted((tree.norm(y) for y in Y), reverse=True)
    bounds = [2 * norms[0], *((a + b) / 2 for a, b in pairwise(norms)), norms[-1] / 2]
    step = Step(max_grad_norm=bounds[clipped])
    found = probe.predict(probe.params, E, J, state, step=step, masks=masks)
    each = [funcprobe.update_direction(probe.params, y, state, **step._asdict()) for y in Y]
    assert sum(one.clip_coefficient < 1 for one in each) == clipped
    zero, parts = torch.zeros_like(COEF), []
    for m in range(2):
        own = torch.where((U.prompt_N == m)[:, None], COEF, zero)
        parts.append(funcprobe.weighted_grad(probe.params, U, own, zero, probe.forward, 64))
    share_M = torch.tensor([6.0, 6.0]).double() / 12
    PX = tree.multiply(found.direction.scale, found.X)

    def update_part(w_M: torch.Tensor) -> float:
        weights = (w_M / (w_M * share_M).sum() - 1).tolist()
        D = {n: sum(w * Y_m[n] for w, Y_m in zip(weights, parts, strict=True)) for n in parts[0]}
        clips = 0.0
        for one, y in zip(each, Y, strict=True):
            # The mean of the masks' gradients stands for each where D changes the norm.
            norm = tree.norm(y) + tree.dot(tree.mean(Y), D) / tree.norm(y) + 1e-6
            ratio = min(1.0, bounds[clipped] / norm) / one.clip_coefficient
            clips += ratio * tree.dot(found.X, tree.multiply(one.scale, y)) / 3
        return tree.dot(PX, D) + clips

    unit = 1e-5 * torch.eye(2).double()
    influence_M = [(update_part(1 + e) - update_part(1 - e)) / 2e-5 for e in unit]
    left_out = -torch.tensor(influence_M).double() / (1 - share_M)
    assert found.se_over_u == pytest.approx(jackknife_error(left_out).se, rel=1e-5)


def test_no_gradient_has_no_masks(probe, policy, state) -> None:
    masks = masked_forwards(policy, probe.params, probe.forward, 2, 0)
    still = J._replace(coef_NR=torch.zeros_like(COEF))
    found = probe.predict(probe.params, E, still, state, masks=masks)
    assert found.masks is None
    assert found.from_update == 0


def trained(policy, probe) -> funcprobe.Params:
    """Y as a trainer takes it: autograd in training mode, rows padded, PyTorch's own dropout."""
    policy.train()
    try:
        logits = policy(input_ids=U.tokens_NL[:, :-1], use_cache=False).logits
    finally:
        policy.eval()
    logp_NL = functional.log_softmax(logits, -1).gather(-1, U.tokens_NL[:, 1:, None])[..., 0]
    total = logits.new_zeros(())
    for i, (start, count) in enumerate(zip(U.prompt_length_N, U.response_length_N, strict=True)):
        total = total + (logp_NL[i, start - 1 : start - 1 + count] * COEF[i, :count]).sum()
    named = dict(policy.named_parameters())
    return dict(
        zip(probe.params, torch.autograd.grad(total, [named[n] for n in probe.params]), strict=True)
    )


def test_steps_in_training_mode_lie_in_the_interval(probe, policy, state) -> None:
    """Mean, spread and interval of <X, v_k> against gradients of PyTorch with dropout of its own."""
    count = 80
    X = probe.grad_X(probe.params, E)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        taken = [trained(policy, probe) for _ in range(count)]
    real = over_masks(X, probe.params, taken, state, CLIP)
    ours = over_masks(X, probe.params, gradients(probe, policy, count), state, CLIP)
    se = math.hypot(real.spread, ours.spread) / math.sqrt(count)
    assert abs(fmean(ours.derivative) - fmean(real.derivative)) < 4 * se
    # Mean absolute deviations: the kurtosis is 9, so that 80 leave 20 % of error in a spread. That of
    # either is 1 / sqrt(80) here, 0.16 of their ratio; a factor of 1.8 is 3.7 of these.
    deviation = [fmean(abs(x - median(one.derivative)) for x in one.derivative) for one in (ours, real)]
    assert abs(math.log(deviation[0] / deviation[1])) < math.log(1.8)
    # Without masks the derivative is another than their mean: seen at this number of masks.
    none = funcprobe.grad_Y(probe.params, J, probe.forward)
    v = funcprobe.update_direction(probe.params, none, state, max_grad_norm=0.5)
    assert abs(tree.dot(X, v.total) - fmean(real.derivative)) > 4 * se
    inside = 0
    for first in range(0, count, 8):  # an interval from 8 masks, all steps against it
        few = ours.derivative[first : first + 8]
        low, high = student(fmean(few), Error(stdev(few) * math.sqrt(1 + 1 / 8), 7))
        inside += sum(low <= one <= high for one in real.derivative)
    # About 93 %, by these tails; that of one interval has a standard deviation of 0.08, of ten 0.025.
    assert 0.85 < inside / count**2 * 8 < 0.99
