"""The composed prediction against itself by other routes, and every check on a policy it must fail."""

import math
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe import AdamGroup, AdamState, Entropy, InputError, Step, UpdateBatch, checks, tree
from funcprobe.along import require_gradients
from funcprobe.policy.forward import Forward
from funcprobe.statistics import intervals
from support.policies import random_batch, random_like, tiny_policy

# Prompt 1 is drawn three times into E; lengths, group sizes and coefficients are all unequal.
E = random_batch([(0, 3, 5), (1, 4, 2), (1, 4, 7), (2, 2, 1), (3, 5, 4), (1, 4, 3)], seed=1)
U_BATCH = random_batch([(0, 2, 3), (0, 2, 6), (1, 5, 1), (1, 5, 4), (1, 5, 2), (2, 3, 5)], seed=2)
U = UpdateBatch(
    U_BATCH,
    0.1
    * random_like({"c": torch.zeros(6, 6).double()}, seed=3)["c"]
    * funcprobe.response_mask(U_BATCH),
    U_BATCH.response_length_N.double(),
)
RULES = [
    Step("adamw", max_grad_norm=None),
    Step("adamw", max_grad_norm=0.05),
    Step("precondition"),
    Step("precondition", max_update=0.01),
    Step("sgd"),
]
ENTROPIES = [
    Entropy(per, integrand, weights)
    for per in ("token", "sequence")
    for integrand in ("rao_blackwell", "sampled")
    for weights in ("per_decision", "sequence")
]
# Every rule and every estimator, but not every pair of them.
PAIRS = [(step, ENTROPIES[0]) for step in RULES] + [(RULES[1], entropy) for entropy in ENTROPIES[1:]]


def name_of(choice: Any) -> str:
    return "-".join(str(x) for x in choice if x is not None)


def adam_state(params: funcprobe.Params) -> AdamState:
    names = list(params)
    first, second = names[::2], names[1::2]
    nu = {n: 0.3 + t.square() for n, t in random_like(params, seed=5).items()}
    return AdamState(
        random_like(params, seed=4),
        nu,
        {n: 2 + i for i, n in enumerate(names)},
        (
            AdamGroup(tuple(first), 2e-4, 0.8, 0.95, 1e-8, 0.3),
            AdamGroup(tuple(second), 5e-4, 0.9, 0.99, 1e-6, 0.0),
        ),
    )


def predicted(probe: Any, E=E, U=U, **choices: Any) -> funcprobe.Prediction:
    return probe.predict(probe.params, E, U, adam_state(probe.params), **choices)


def close(found: float, expected: float, rel: float, size: float) -> bool:
    """Equal up to rel, of a number or of the sizes it was summed from."""
    return abs(found - expected) <= rel * max(abs(expected), size)


@pytest.mark.parametrize(("step", "entropy"), PAIRS, ids=name_of)
def test_the_parts_sum_to_the_whole(probe64, step, entropy):
    found = predicted(probe64, step=step, entropy=entropy)
    # Rounding is relative to what was summed, sum |X v|: some 1e3 float64 operations of it.
    size = sum(float((found.X[n] * found.direction.total[n]).abs().sum()) for n in found.X)
    assert abs(found.derivative) > 1e-3 * size  # not a number that cancels: a sign would show
    assert close(found.bars_dot, found.derivative, 1e-9, 0)
    parts = found.from_momentum + found.from_decay + found.from_update
    assert close(parts, found.bars_dot, 1e-12, size)
    assert close(float(found.t_N.sum()), found.from_update, 1e-10, size)
    assert close(float(found.first_order.per_sequence_N.sum()), found.derivative, 1e-10, size)
    assert found.bars_dot_identity == tree.dot(found.X, found.Y)
    assert found.se_total == pytest.approx(math.hypot(found.first_order.se, found.se_over_u))
    assert found.se_over_u > 0
    if step.rule == "adamw":
        assert abs(found.from_momentum) > 1e-3 * size
        assert abs(found.from_decay) > 1e-5 * size
    else:
        assert found.from_momentum == found.from_decay == 0
    if step.rule == "sgd":  # the second group's learning rate is 2.5 times the first's
        expected = sum(
            (2.5 if i % 2 else 1.0) * tree.dot_by_name(found.X, found.Y)[n]
            for i, n in enumerate(found.X)
        )
        assert close(found.bars_dot, expected, 1e-12, size)


@pytest.mark.parametrize("step", RULES[::2], ids=name_of)
def test_shares_of_the_update_are_those_of_its_gradients(probe64, step):
    """t_n = <P X, Y_n> with Y_n made one sequence at a time, and its error over prompts."""
    found = predicted(probe64, step=step)
    t_N = []
    for i in range(6):
        alone = torch.zeros_like(U.coef_NR)
        alone[i] = U.coef_NR[i]
        Y_i = probe64.weighted_grad(probe64.params, U.batch, alone, torch.zeros_like(alone))
        t_N.append(tree.dot(tree.multiply(found.direction.scale, found.X), Y_i))
    torch.testing.assert_close(found.t_N, torch.tensor(t_N, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    # Without a prompt, J is divided by the tokens of the others: 9, 7 and 5 of 21.
    whole, t_M = sum(t_N), [t_N[0] + t_N[1], t_N[2] + t_N[3] + t_N[4], t_N[5]]
    left_out = [(whole - t) * 21 / (21 - n) for t, n in zip(t_M, (9, 7, 5), strict=True)]
    mean = sum(left_out) / 3
    expected = math.sqrt(2 / 3 * sum((x - mean) ** 2 for x in left_out))
    assert found.se_over_u == pytest.approx(expected, rel=1e-9)


def test_the_error_over_U_follows_the_clip(probe64):
    """<P X, Y> with the clip of Y(w), w the prompts' weights in J and its divisor: central differences.

    Their error is 1e-10 times the third derivative, of the order of the first.
    """
    found = predicted(probe64, step=RULES[1])
    clip, tokens = found.direction.clip_coefficient, torch.tensor([9.0, 7.0, 5.0]).double()
    assert clip < 0.5
    zero, parts = torch.zeros_like(U.coef_NR), []
    for m in range(3):
        own = torch.where((U.batch.prompt_N == m)[:, None], U.coef_NR, zero)
        parts.append(probe64.weighted_grad(probe64.params, U.batch, own, zero))

    def update_part(w_M: torch.Tensor) -> float:
        Y = {n: sum(w * Y_m[n] for w, Y_m in zip(w_M.tolist(), parts, strict=True)) for n in parts[0]}
        Y = {n: t * 21 / float((w_M * tokens).sum()) for n, t in Y.items()}
        scale = min(1.0, 0.05 / (tree.norm(Y) + 1e-6)) / clip
        return scale * tree.dot(tree.multiply(found.direction.scale, found.X), Y)

    unit = 1e-5 * torch.eye(3).double()
    influence_M = torch.tensor([(update_part(1 + e) - update_part(1 - e)) / 2e-5 for e in unit])
    expected = intervals.jackknife_error(influence_M.double() / (1 - tokens / 21))
    assert found.over_u == pytest.approx(expected, rel=1e-5)
    fixed = intervals.update_error([(found.t_N, U.normaliser_N)], U.batch.prompt_N)
    assert found.over_u.se != pytest.approx(fixed.se, rel=0.05)


def test_an_update_whose_normaliser_is_not_known_has_no_error(probe64):
    """Before the passes, and never the error of another normaliser."""
    params, state, ones = probe64.params, adam_state(probe64.params), torch.ones(6)
    wrong = {
        "normaliser_N is not set": None,
        "1 entries that are negative": ones.index_fill(0, torch.tensor([2]), -1.0),
        "sum 0": 0 * ones,
        "shape \\(5,\\)": ones[:5],
        "6 entries that are": torch.nan * ones,
    }
    for match, normaliser_N in wrong.items():
        update = U._replace(normaliser_N=normaliser_N)
        with pytest.raises(InputError, match=match):
            funcprobe.predict(params, E, update, state, no_model, step=RULES[0])
    passes = funcprobe.first_order_passes(params, E, U, state, probe64.forward)
    with pytest.raises(InputError, match="update_batch"):
        funcprobe.summarise(params, passes, E, U._replace(normaliser_N=None), state)


def no_model(*_: Any) -> None:
    raise AssertionError("a pass was made")


@pytest.mark.parametrize("entropy", ENTROPIES, ids=name_of)
def test_measured_over_predicted_tends_to_one(probe64, entropy):
    found = predicted(probe64, entropy=entropy)

    def error(eta: float) -> float:
        seen = probe64.measure(
            probe64.params, E, found.direction.total, eta, found.stats, entropy=entropy
        )
        return seen.delta / (eta * found.derivative) - 1

    # What is left is curvature, proportional to eta; rounding is 1e-16 / (1e-6 * 1e-1) = 1e-9.
    assert abs(error(1e-6)) < 1e-3
    assert error(1e-5) / error(1e-6) == pytest.approx(10, rel=0.05)
    # Both signs of eta: an even error would be no derivative.
    assert error(-1e-5) / error(1e-5) == pytest.approx(-1, rel=0.05)


@pytest.mark.parametrize("entropy", ENTROPIES, ids=name_of)
def test_no_step_changes_nothing(probe64, entropy):
    stats = probe64.token_stats(probe64.params, E)
    v = random_like(probe64.params)
    still = probe64.measure(probe64.params, E, v, 0.0, stats, entropy=entropy)
    assert still.delta == 0
    assert still.ess == len(E.prompt_N)
    assert still.max_weight == 1
    moved = probe64.measure(probe64.params, E, v, 1e-2, stats, entropy=entropy)
    assert moved.delta != 0
    assert moved.ess < len(E.prompt_N)


def test_a_sampler_of_its_own_changes_both_routes_alike(probe64):
    stats = probe64.token_stats(probe64.params, E)
    noise_NR = 0.2 * random_like({"n": stats.logp_NR}, seed=8)["n"]
    sampler_logp_NR = stats.logp_NR + noise_NR
    plain = predicted(probe64)
    for entropy in ENTROPIES:
        given = {"entropy": entropy, "sampler_logp_NR": sampler_logp_NR}
        found = predicted(probe64, **given)
        assert close(found.bars_dot, found.derivative, 1e-9, 0)
        assert abs(found.derivative / plain.derivative - 1) > 1e-3
        v = found.direction.total
        seen = probe64.measure(probe64.params, E, v, 1e-7, found.stats, **given)
        assert seen.delta / (1e-7 * found.derivative) == pytest.approx(1, abs=1e-3)
        assert probe64.measure(probe64.params, E, v, 0.0, found.stats, **given).delta == 0


def test_a_sampler_of_its_own_is_the_denominator_of_the_weights(probe64):
    """w_i = p_theta(y_i) / p_sampler(y_i): responses the sampler overdid count less."""
    stats = probe64.token_stats(probe64.params, E)
    excess_NR = random_like({"n": stats.logp_NR}, seed=8)["n"] * funcprobe.response_mask(E)
    found = predicted(
        probe64,
        entropy=Entropy("sequence", "rao_blackwell", "sequence"),
        sampler_logp_NR=stats.logp_NR + excess_NR,
    )
    w = [math.exp(-x) for x in excess_NR.sum(1).tolist()]
    h = stats.entropy_NR.sum(1).tolist()
    expected = sum(a * b for a, b in zip(w, h, strict=True)) / sum(w)
    assert found.entropy == pytest.approx(expected, rel=1e-12)  # six float64 terms
    assert found.entropy != pytest.approx(sum(h) / 6, rel=1e-2)


def permuted_update(order: list[int]) -> UpdateBatch:
    index = torch.tensor(order)
    return UpdateBatch(funcprobe.select(U.batch, index), U.coef_NR[index], U.normaliser_N[index])


def padded(batch: funcprobe.Batch, columns: int) -> funcprobe.Batch:
    # Real token ids: a pad that is read gives another number, not an error.
    return batch._replace(tokens_NL=torch.nn.functional.pad(batch.tokens_NL, (0, columns), value=7))


@pytest.mark.parametrize(
    ("step", "entropy"),
    [(RULES[1], ENTROPIES[0]), (RULES[3], ENTROPIES[7]), (RULES[4], ENTROPIES[2])],
    ids=name_of,
)
def test_layout_does_not_matter(policy64, probe64, step, entropy):
    expected = predicted(probe64, step=step, entropy=entropy)
    order_E, order_U = [4, 0, 5, 2, 1, 3], [5, 3, 0, 1, 4, 2]
    small = funcprobe.bind(policy64, max_tokens=11)  # the longest sequence: no two share a microbatch
    identity = list(range(6))
    cases = {
        "microbatches": (small, E, U, identity, identity),
        "order": (
            probe64,
            funcprobe.select(E, torch.tensor(order_E)),
            permuted_update(order_U),
            order_E,
            order_U,
        ),
        "padding": (probe64, padded(E, 5), U._replace(batch=padded(U.batch, 3)), identity, identity),
    }
    for name, (probe, eval_batch, update, by_E, by_U) in cases.items():
        found = predicted(probe, eval_batch, update, step=step, entropy=entropy)
        # Other sizes of matrix products, other orders of sums, in float64.
        for field in (
            "derivative",
            "bars_dot",
            "bars_dot_identity",
            "from_momentum",
            "from_decay",
            "from_update",
            "entropy",
            "se_over_u",
            "se_total",
        ):
            a, b = getattr(found, field), getattr(expected, field)
            assert a == pytest.approx(b, rel=1e-10, abs=1e-13), (name, field)
        torch.testing.assert_close(found.t_N, expected.t_N[by_U], rtol=1e-9, atol=1e-12)
        first, first_before = found.first_order, expected.first_order
        torch.testing.assert_close(
            first.per_sequence_N, first_before.per_sequence_N[by_E], rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            first.influence_N, first_before.influence_N[by_E], rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            found.stats.logp_NR, expected.stats.logp_NR[by_E], rtol=1e-10, atol=1e-12
        )
        for which in ("X", "Y"):
            for n, t in getattr(expected, which).items():
                torch.testing.assert_close(getattr(found, which)[n], t, rtol=1e-9, atol=1e-12)


def tensors_in(part: Any) -> list[torch.Tensor]:
    if torch.is_tensor(part):
        return [part]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, tuple) else ()
    return [t for p in parts for t in tensors_in(p)]


def test_predict_and_measure_leave_their_arguments_alone(probe64):
    state = adam_state(probe64.params)
    sampler = probe64.token_stats(probe64.params, E).logp_NR - 0.1
    given = (probe64.params, E, U, state, sampler)
    before = [(t, t.clone(), t._version, t.requires_grad) for t in tensors_in(given)]
    assert len(before) > 40
    for step in RULES[1::2]:
        found = probe64.predict(probe64.params, E, U, state, step=step, sampler_logp_NR=sampler)
        v = found.direction.total
        held = [(t, t.clone(), t._version, t.requires_grad) for t in tensors_in((v, found.stats))]
        probe64.measure(probe64.params, E, v, 0.1, found.stats, sampler_logp_NR=sampler)
        for tensor, copy, version, requires_grad in before + held:
            assert torch.equal(tensor, copy)
            assert (tensor._version, tensor.requires_grad) == (version, requires_grad)


def test_predict_is_first_order_passes_and_summarise(probe64):
    fixed = {"entropy": ENTROPIES[3], "step": RULES[1]}
    state, params = adam_state(probe64.params), probe64.params
    passes = funcprobe.first_order_passes(params, E, U, state, probe64.forward, max_tokens=64, **fixed)
    found = funcprobe.summarise(params, passes, E, U, state, **fixed)
    expected = predicted(probe64, **fixed)
    assert found.derivative == expected.derivative
    assert found.bars_dot == expected.bars_dot
    assert torch.equal(found.t_N, expected.t_N)


def test_an_entropy_of_one_prompt_is_refused(probe64):
    one_prompt = funcprobe.select(E, torch.tensor([1, 2, 5]))
    with pytest.raises(InputError, match="at least two prompts"):
        predicted(probe64, E=one_prompt)


@pytest.mark.parametrize(
    ("lora", "head", "says"),
    [
        (0.0, 0.0, r"zero on every tensor \(2\)"),
        (0.0, 1.0, r"zero on every LoRA tensor \(1\)"),
        (math.nan, 1.0, r"not finite in 1 of 2 tensors, first a\.lora_A"),
        (1.0, math.inf, r"not finite in 1 of 2 tensors, first head"),
    ],
)
def test_gradients_that_say_nothing_are_refused(lora, head, says):
    grads = {"a.lora_A": torch.tensor([0.0, lora]), "head": torch.tensor([[head]])}
    with pytest.raises(InputError, match=says):
        require_gradients("Y", grads)


def test_gradients_that_reach_one_lora_tensor_will_do():
    require_gradients("Y", {"a.lora_A": torch.zeros(2), "a.lora_B": torch.tensor([0.0, 1e-30])})
    require_gradients("Y", {"head": torch.ones(2)})


@pytest.fixture(scope="module")
def policy32():
    return tiny_policy(dtype=torch.float32)


@pytest.mark.parametrize("step", RULES, ids=name_of)
def test_float32_routes_agree(policy32, probe64, step):
    probe = funcprobe.bind(policy32, max_tokens=64)
    found = predicted(probe, step=step)
    # A two-layer network: some 1e3 roundings of 6e-8, with little cancellation in the sum.
    assert found.bars_dot == pytest.approx(found.derivative, rel=1e-3)
    assert found.derivative == pytest.approx(predicted(probe64, step=step).derivative, rel=1e-3)
    assert checks.routes_agree(found, probe.forward).passed


# Checks: each passes on a healthy policy, and fails on one with its fault.


def lora_B_zero(params: funcprobe.Params) -> funcprobe.Params:
    return {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in params.items()}


def noisy(forward: Forward, size: float = 1e-9) -> Forward:
    def hidden(params, rows):
        hidden_TD = forward.hidden(params, rows)
        return hidden_TD + size * torch.randn_like(hidden_TD)

    return forward._replace(hidden=hidden)


class WrongSecondDerivative(torch.autograd.Function):
    """The identity; its gradient is right, and half of it is a constant in the eyes of the next."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad + 0.5 * grad.detach()


def wrongly_differentiated(forward: Forward) -> Forward:
    return forward._replace(hidden=lambda p, rows: WrongSecondDerivative.apply(forward.hidden(p, rows)))


@pytest.fixture(scope="module")
def healthy(probe64):
    return predicted(probe64)


def test_check_adapter_changes_logits(probe64):
    params, forward = probe64.params, probe64.forward
    stats = probe64.token_stats(params, E)
    assert checks.adapter_changes_logits(params, E, stats, forward, 64).passed
    untrained = lora_B_zero(params)
    stats = probe64.token_stats(untrained, E)
    found = checks.adapter_changes_logits(untrained, E, stats, forward, 64)
    assert not found.passed
    assert "never trained" in found.failure_means
    nan = stats._replace(logp_NR=stats.logp_NR * math.nan)
    assert not checks.adapter_changes_logits(params, E, nan, forward, 64).passed


def test_check_gradients_reach(healthy):
    found = checks.gradients_reach("X", healthy.X)
    assert found.passed
    assert f"{len(healthy.X)} of {len(healthy.X)} tensors" in found.saw
    name = next(iter(healthy.X))
    assert not checks.gradients_reach("X", tree.zeros(healthy.X)).passed
    for bad in (math.nan, math.inf):
        damaged = healthy.X | {name: torch.full_like(healthy.X[name], bad)}
        assert not checks.gradients_reach("X", damaged).passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_check_alpha_cases(policy64, policy32, dtype):
    probe = funcprobe.bind(policy64 if dtype == torch.float64 else policy32)
    mu = random_like(probe.params)
    assert checks.alpha_cases(probe.params, E, mu, probe.forward, 64).passed
    broken = wrongly_differentiated(probe.forward)
    found = checks.alpha_cases(probe.params, E, mu, broken, 64)
    assert not found.passed
    assert "second derivative" in found.failure_means
    # the fault is not one of the gradient, which the other checks would see
    p_NR = funcprobe.response_mask(E).to(torch.float64)
    for n, g in probe.weighted_grad(probe.params, E, p_NR, 0 * p_NR).items():
        other = funcprobe.weighted_grad(probe.params, E, p_NR, 0 * p_NR, broken, 64)[n]
        torch.testing.assert_close(g, other, rtol=1e-4, atol=1e-5)
    # at 0 there is nothing to compare: not a pass, and no ZeroDivisionError
    assert not checks.alpha_cases(probe.params, E, tree.zeros(mu), probe.forward, 64).passed


def test_check_alpha_cases_of_a_nearly_orthogonal_direction(policy32, monkeypatch):
    """There rounding exceeds 1e-4 of s_i = <g_i, mu>, and is no fault; twice s_i is one."""
    probe = funcprobe.bind(policy32)
    mu = random_like(probe.params)
    basis: list[funcprobe.Params] = []
    for i in range(4):  # the gradients that are compared
        p_NR = funcprobe.response_mask(E).double() * (torch.arange(6) == i)[:, None]
        g = probe.weighted_grad(probe.params, E, p_NR, 0 * p_NR)
        for other in basis:
            g = tree.axpy(-tree.dot(g, other), other, g)
        basis.append({n: t / tree.norm(g) for n, t in g.items()})
    for unit in basis:
        mu = tree.axpy(-(1 - 1e-3) * tree.dot(mu, unit), unit, mu)
    assert checks.alpha_cases(probe.params, E, mu, probe.forward, 64).passed
    real = funcprobe.alpha_vjp
    monkeypatch.setattr(checks, "alpha_vjp", lambda *a, **k: 2 * real(*a, **k))
    assert not checks.alpha_cases(probe.params, E, mu, probe.forward, 64).passed


def test_check_alpha_cases_sees_one_bad_sequence(probe64, monkeypatch):
    """Also where the fault is a NaN that only some alphas give."""
    real = funcprobe.alpha_vjp

    def spoilt(*args, alpha_N, **kwargs):
        s_N = real(*args, alpha_N=alpha_N, **kwargs)
        return s_N * (1 if bool((alpha_N == 1).all()) else math.nan)

    monkeypatch.setattr(checks, "alpha_vjp", spoilt)
    mu = random_like(probe64.params)
    assert not checks.alpha_cases(probe64.params, E, mu, probe64.forward, 64).passed


def test_check_routes_agree(healthy, probe64):
    forward = probe64.forward
    assert checks.routes_agree(healthy, forward).passed
    for bars_dot in (healthy.bars_dot * (1 + 1e-7), -healthy.bars_dot, math.nan, 0.0):
        assert not checks.routes_agree(healthy._replace(bars_dot=bars_dot), forward).passed
    assert not checks.routes_agree(healthy._replace(derivative=math.nan), forward).passed
    # U's tangents along P X must sum to the update's part, of which they are the prompts' shares.
    off = healthy._replace(t_N=healthy.t_N + 1e-7 * healthy.t_N.abs())
    assert not checks.routes_agree(off, forward).passed
    without = healthy._replace(t_N=torch.zeros_like(healthy.t_N))
    assert "on U" in checks.routes_agree(healthy, forward).saw
    assert "on U" not in checks.routes_agree(without, forward).saw
    # Numbers are held to the coarsest precision they passed through.
    for coarsest, passes, fails in ((torch.float32, 1e-5, 1e-2), (torch.bfloat16, 1e-2, 0.1)):
        held = forward._replace(coarsest=coarsest)
        off = [healthy._replace(bars_dot=healthy.bars_dot * (1 + x)) for x in (passes, fails)]
        assert checks.routes_agree(off[0], held).passed
        assert not checks.routes_agree(off[1], held).passed


def test_check_gradient_in_proportion():
    fine = funcprobe.GradientScale({"a": 0.5, "b": 2.0, "c": 1.0}, 1.0, 0.01, 0.0)
    assert checks.gradient_in_proportion(fine).passed
    assert "0.5 to 2" in checks.gradient_in_proportion(fine).saw
    for other in ({"median": 40.0}, {"median": 0.02}, {"median": None}, {"beyond_ten": 0.2}):
        assert not checks.gradient_in_proportion(fine._replace(**other)).passed


def test_check_state_fits():
    fields = {"alike": 4, "home": 3, "margin": {}, "assigned": {}, "over_random": 23.0}
    for verdict in ("confirmed", "undecided", "contradicted"):
        found = funcprobe.Evidence(
            verdict, **fields, over={"o": 9.2}, over_assigned=0.0, likeliest=None
        )
        check = checks.state_fits(found)
        assert check.passed == (verdict != "contradicted")
        assert f"{verdict}: 3 of 4 " in check.saw
        assert "odds 1e+10 over a random order, 1e+4 over the nearest of 1" in check.saw
        assert check.advisory


def test_check_eta_zero(probe64, healthy):
    v, params, forward = healthy.direction.total, probe64.params, probe64.forward
    fixed = {"entropy": Entropy(), "max_tokens": 64}
    assert checks.eta_zero(params, E, v, healthy.stats, forward, **fixed).passed
    found = checks.eta_zero(params, E, v, healthy.stats, noisy(forward), **fixed)
    assert not found.passed
    assert "not deterministic" in found.failure_means
    # a shift of every log-probability alike leaves the entropy: the weights tell
    shifted = healthy.stats._replace(logp_NR=healthy.stats.logp_NR + 1e-3)
    assert not checks.eta_zero(params, E, v, shifted, forward, **fixed).passed
    other = tree.axpy(1e-6, v, params)
    assert not checks.eta_zero(other, E, v, healthy.stats, forward, **fixed).passed
    # Responses of one token: their entropy needs no weights, so that ESS alone sees other ratios.
    short = random_batch([(i, 2, 1) for i in range(4)], seed=6)
    stats = probe64.token_stats(params, short)
    assert checks.eta_zero(params, short, v, stats, forward, **fixed).passed
    one_off = torch.tensor([[0.0], [0.1], [0.0], [0.0]], dtype=torch.float64)
    found = checks.eta_zero(
        params, short, v, stats._replace(logp_NR=stats.logp_NR + one_off), forward, **fixed
    )
    assert found.saw.startswith("change 0,")
    assert not found.passed
    # with a sampler of its own the weights may vary; the change may not
    sampler = {"sampler_logp_NR": healthy.stats.logp_NR - 0.1}
    assert checks.eta_zero(params, E, v, healthy.stats, forward, **fixed, **sampler).passed
    assert not checks.eta_zero(params, E, v, healthy.stats, noisy(forward), **fixed, **sampler).passed


def test_check_repeat_is_identical(probe64, healthy):
    params, forward, stats = probe64.params, probe64.forward, healthy.stats
    assert checks.repeat_is_identical(params, E, stats, forward, 64).passed
    assert not checks.repeat_is_identical(params, E, stats, noisy(forward), 64).passed
    last = torch.zeros_like(stats.logp_NR)
    last[2, 6] = 1e-15 + 2**-50  # one bit of one token
    for shifted in (
        stats._replace(logp_NR=stats.logp_NR + last),
        stats._replace(entropy_NR=stats.entropy_NR - last),
        stats._replace(entropy_NR=stats.entropy_NR * math.nan),  # a logit of -inf does this
    ):
        assert not checks.repeat_is_identical(params, E, shifted, forward, 64).passed


def test_check_float64_throughout(policy32) -> None:
    model = tiny_policy()
    found = checks.float64_throughout(model, E)
    assert found.passed
    assert not found.advisory
    up = "base_model.model.model.layers.1.mlp.up_proj"
    model.get_submodule(up).register_forward_hook(lambda _, __, y: y.bfloat16().double())
    found = checks.float64_throughout(model, E)
    assert not found.passed
    assert f"{up} (" in found.saw
    unknown = checks.float64_throughout(policy32, E)
    assert (unknown.passed, unknown.advisory) == (False, True)
    assert "float64 is expected" in unknown.saw


def test_every_check_is_tested():
    public = {n for n, f in vars(checks).items() if callable(f) and f.__module__ == checks.__name__}
    public = {n for n in public if not n.startswith("_")} - {"Check"}
    assert {f"test_check_{n}" for n in public} <= globals().keys()


def test_bind_applies_its_choices(policy64, probe64):
    """Temperature and entropy given once are those of every function."""
    hot = funcprobe.bind(policy64, temperature=1.7, entropy=ENTROPIES[5], max_tokens=64)
    found = predicted(hot)
    assert found.derivative != predicted(probe64, entropy=ENTROPIES[5]).derivative
    stats = hot.token_stats(hot.params, E)
    assert found.entropy == funcprobe.entropy_value(stats, funcprobe.response_mask(E), ENTROPIES[5])
    X = hot.grad_X(hot.params, E)
    Y = hot.grad_Y(hot.params, U)
    assert all(torch.equal(X[n], found.X[n]) and torch.equal(Y[n], found.Y[n]) for n in X)
    seen = hot.measure(hot.params, E, found.direction.total, 1e-6, found.stats)
    assert seen.delta / (1e-6 * found.derivative) == pytest.approx(1, abs=1e-3)
    assert torch.equal(hot.seq_logprobs(hot.params, E), stats.logp_NR.sum(1))
