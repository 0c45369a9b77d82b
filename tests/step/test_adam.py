"""The update direction against torch.optim.AdamW's own next step, and its guards against a loop."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import AdamGroup, AdamState, InputError, Params, tree

# Unequal everywhere: a group's value used for another, or a beta for another, shows.
PLAIN = {"lr": 0.5, "betas": (0.85, 0.97), "eps": 1e-8, "weight_decay": 0.0}
DECAYED = PLAIN | {"weight_decay": 3.0}
OTHER = {"lr": 0.2, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 1.5}
SHAPES = {"a.lora_A": (3, 5), "a.lora_B": (4, 3), "b.lora_A": (2, 7), "b.lora_B": (6,), "bias": (4,)}
# Entries from far above eps to far below it: without the small ones eps could stand anywhere.
SIZES = {"a.lora_A": 2.0, "a.lora_B": 1e-3, "b.lora_A": 1e-4, "b.lora_B": 1e-8, "bias": 30.0}


def random_params(seed: int, dtype: torch.dtype = torch.float64, sizes: Any = None) -> Params:
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes or dict.fromkeys(SHAPES, 0.05)
    return {
        n: (sizes[n] * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for n, shape in SHAPES.items()
    }


def random_grads(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    # exp(normal): gradients of one tensor differ by orders of magnitude from step to step.
    generator = torch.Generator().manual_seed(10_000 + seed)
    size = math.exp(float(torch.randn((), generator=generator)))
    return random_params(seed, dtype, {n: s * size for n, s in SIZES.items()})


def group(names: Any, hyper: dict[str, Any]) -> AdamGroup:
    return AdamGroup(tuple(names), hyper["lr"], *hyper["betas"], hyper["eps"], hyper["weight_decay"])


def state_of(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> AdamState:
    states = {n: optimizer.state[p] for n, p in named.items()}
    name_of = {id(p): n for n, p in named.items()}
    return AdamState(
        {n: s["exp_avg"].clone() for n, s in states.items()},
        {n: s["exp_avg_sq"].clone() for n, s in states.items()},
        {n: int(s["step"]) for n, s in states.items()},
        tuple(group([name_of[id(p)] for p in g["params"]], g) for g in optimizer.param_groups),
    )


@pytest.mark.parametrize("backend", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("steps", [0, 99])
@pytest.mark.parametrize("clip", [None, 0.7, 1e6])
@pytest.mark.parametrize(
    "hypers", [[PLAIN], [DECAYED], [DECAYED, OTHER]], ids=["plain", "decay", "two"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adamw_is_the_next_step_of_torch(dtype, tolerance, hypers, clip, steps, backend):
    # The tolerances are the requirement, about 10 and 5,000 roundings: every number below is made
    # by some ten operations on entries of one tensor, so one wrong factor of 1 + 1e-5 fails.
    start = random_params(1, dtype)
    named = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
    names = (
        [list(named)]
        if len(hypers) == 1
        else [["b.lora_A", "a.lora_A"], ["bias", "a.lora_B", "b.lora_B"]]
    )
    groups = [{"params": [named[n] for n in ns]} | h for ns, h in zip(names, hypers, strict=True)]
    how = {} if backend == "loop" else {backend: True}
    optimizer = torch.optim.AdamW(groups, **({"foreach": False} | how))

    def take_step(Y: Params) -> None:
        for n, p in named.items():
            p.grad = -Y[n].clone()  # the optimizer descends the loss, -J
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), clip)
        optimizer.step()

    for seed in range(steps):
        take_step(random_grads(seed, dtype))
    # Adam's state does not depend on theta. Set back to about 0.05 and moved by about lr * 1 = 0.5,
    # theta loses one rounding of 0.5, so that (theta_new - theta) / lr resolves v to 1e-7 (1e-16);
    # where the walk had led (about 10), it would not.
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(start[n])
    adam_groups = tuple(group(ns, h) for ns, h in zip(names, hypers, strict=True))
    state = state_of(optimizer, named) if steps else funcprobe.fresh_adam_state(start, adam_groups)
    assert set(state.step.values()) == {steps}

    Y = random_grads(12345, dtype)
    v = funcprobe.update_direction(start, Y, state, rule="adamw", max_grad_norm=clip)
    take_step(Y)
    if clip is not None:
        assert (v.clip_coefficient < 1) == (clip < 1)
    for n, p in named.items():
        real = (p.detach().double() - start[n].double()) / hypers[0]["lr"]
        assert real.norm() > 1e-4  # something moves: else the comparison is empty
        error = (v.total[n].double() - real).norm() / real.norm()
        # Where decay is a small part of theta's change, theta's own rounding is 0.05 * 6e-8 / 0.5.
        assert error < tolerance, (n, float(error))
        assert v.total[n].dtype == dtype


@pytest.mark.parametrize("rule", ["adamw", "precondition", "sgd"])
def test_the_split_sums_to_the_whole(rule):
    theta, Y, state = random_params(1), random_grads(2), random_state()
    v = funcprobe.update_direction(theta, Y, state, rule=rule, max_grad_norm=0.3)
    for n in theta:
        whole = v.momentum[n] + v.decay[n] + v.scale[n] * Y[n]
        # three float64 operations
        torch.testing.assert_close(v.total[n], whole, rtol=1e-15, atol=1e-15 * float(whole.abs().max()))
        if rule != "adamw":
            assert not v.momentum[n].any()
            assert not v.decay[n].any()
            continue
        # The parts are what they are called: momentum alone is the step without gradient and decay.
        hyper = next(g for g in state.groups if n in g.names)
        ratio = hyper.lr / state.groups[0].lr
        torch.testing.assert_close(
            v.decay[n], -ratio * hyper.weight_decay * theta[n], rtol=1e-15, atol=0
        )
        # momentum and P share their denominator: their ratio is that of beta1 m to (1 - beta1) clip.
        expected = -hyper.beta1 * state.exp_avg[n] / ((1 - hyper.beta1) * v.clip_coefficient)
        torch.testing.assert_close(v.momentum[n] / v.scale[n], expected, rtol=1e-14, atol=0)


def random_state(seed: int = 7, dtype: torch.dtype = torch.float64) -> AdamState:
    moments = random_grads(seed, dtype)
    return AdamState(
        exp_avg=moments,
        exp_avg_sq={n: t.square() for n, t in random_grads(seed + 1, dtype).items()},
        step={n: 3 + 4 * i for i, n in enumerate(SHAPES)},
        groups=(
            group(["a.lora_B", "b.lora_A", "bias"], DECAYED),
            group(["a.lora_A", "b.lora_B"], OTHER),
        ),
    )


@pytest.mark.parametrize("max_update", [1000.0, 0.3, None])
def test_preconditioner_against_a_loop(max_update):
    Y, state = random_grads(3), random_state()
    state.exp_avg_sq["bias"][2] = 1e-30
    state.exp_avg_sq["a.lora_A"][0, 0] = 0.0
    expected, largest, smallest, bounded, tiny = {}, 0.0, math.inf, 0, 0
    for n, y in Y.items():
        g = next(g for g in state.groups if n in g.names)
        flat = []
        for entry, nu in zip(y.flatten().tolist(), state.exp_avg_sq[n].flatten().tolist(), strict=True):
            nu_hat = nu / (1 - g.beta2 ** state.step[n])
            denominator = math.sqrt(nu_hat) + g.eps
            largest, smallest = max(largest, 1 / denominator), min(smallest, denominator)
            tiny += 0 < math.sqrt(nu_hat) < g.eps
            update = entry / denominator
            if max_update is not None and abs(update) > max_update:
                update = math.copysign(max_update, update)
                bounded += 1
            flat.append(update)
        expected[n] = torch.tensor(flat, dtype=torch.float64).reshape(y.shape)
    P, info = funcprobe.preconditioner(Y, state)
    found = funcprobe.precondition(Y, state, max_update)
    ratio = {n: next(g.lr for g in state.groups if n in g.names) / 0.5 for n in Y}
    v = funcprobe.update_direction(
        random_params(1), Y, state, rule="precondition", max_update=max_update, max_grad_norm=0.01
    )
    for n in Y:  # the same float64 operations up to the order of a square root and a power
        torch.testing.assert_close(found[n], expected[n], rtol=1e-13, atol=0)
        if max_update is None:
            torch.testing.assert_close(P[n] * Y[n], expected[n], rtol=1e-13, atol=0)
        torch.testing.assert_close(v.scale[n] * Y[n], v.total[n], rtol=1e-13, atol=0)
        torch.testing.assert_close(v.total[n], ratio[n] * expected[n], rtol=1e-13, atol=0)
    assert v.clip_coefficient == 1  # clipping is of "adamw" alone
    assert info.coverage == 1
    assert info.identity == ()
    assert info.without_step == ()
    assert info.max_scale == pytest.approx(largest, rel=1e-13)
    assert info.min_denominator == pytest.approx(smallest, rel=1e-13)
    assert (info.zero_second_moments, info.tiny_second_moments) == (1, tiny)
    assert tiny > 0
    assert max_update is None or bounded > 1


def test_the_scale_of_a_constant_gradient_is_one_over_it():
    """nu_hat is g^2 after any number of torch's own steps with one g: P g = g / (|g| + eps)."""
    grads = random_grads(1)
    named = {n: torch.nn.Parameter(t) for n, t in random_params(0).items()}
    optimizer = torch.optim.AdamW(named.values(), **PLAIN)
    for _ in range(4):
        for name, p in named.items():
            p.grad = grads[name].clone()
        optimizer.step()
        state = state_of(optimizer, named)
        scale, _ = funcprobe.preconditioner(random_params(0), state)
        for name, g in grads.items():
            expected = g / (g.abs() + PLAIN["eps"])
            torch.testing.assert_close(scale[name] * g, expected, rtol=1e-10, atol=0)


def test_a_parameter_in_two_groups_is_refused():
    state = random_state()
    twice = state._replace(groups=(*state.groups, state.groups[0]))
    with pytest.raises(ValueError, match="in two optimizer groups"):
        funcprobe.update_direction(random_params(1), random_grads(3), twice)


def test_preconditioner_counts_each_guard():
    Y, state = random_grads(3), random_state()
    nu = dict(state.exp_avg_sq)
    del nu["a.lora_A"]  # missing
    nu["a.lora_B"] = torch.zeros(4, 3, dtype=torch.float64)
    nu["b.lora_A"] = nu["b.lora_A"].clone()
    nu["b.lora_A"][1, 2] = math.nan
    nu["b.lora_B"] = torch.tensor([1e-20, 0.0, 4.0, 1.0, 0.25, 9.0], dtype=torch.float64)
    state = state._replace(exp_avg_sq=nu, step={"bias": 5})
    P, info = funcprobe.preconditioner(Y, state)
    assert info.identity == ("a.lora_A", "a.lora_B", "b.lora_A")
    assert info.coverage == pytest.approx(2 / 5)
    for n in info.identity:
        assert bool((P[n] == 1).all())
        assert torch.equal(funcprobe.precondition(Y, state)[n], Y[n])
    assert info.without_step == ("b.lora_B",)
    eps = OTHER["eps"]
    expected = torch.tensor(
        [1 / (1e-10 + eps), 1 / eps, 1 / (2 + eps), 1 / (1 + eps), 1 / (0.5 + eps), 1 / (3 + eps)]
    ).double()
    # written out as decimals: one rounding of 1 + eps in float32 above
    torch.testing.assert_close(P["b.lora_B"], expected, rtol=1e-6, atol=0)
    assert (info.zero_second_moments, info.tiny_second_moments) == (1, 1)
    assert info.max_scale == pytest.approx(1 / eps)
    assert info.min_denominator == pytest.approx(eps)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -1e-12])
def test_preconditioner_leaves_a_damaged_tensor_alone(bad):
    state = random_state()
    state.exp_avg_sq["b.lora_B"][3] = bad
    P, info = funcprobe.preconditioner(random_params(1), state)
    assert info.identity == ("b.lora_B",)
    assert bool((P["b.lora_B"] == 1).all())
    assert all(bool(p.isfinite().all()) for p in P.values())


@pytest.mark.parametrize("nu", [4.0, [0.0, 4.0]])
def test_step_zero_with_second_moments_is_counted_as_without_step(nu):
    # 1 - beta2^0 = 0: nu_hat would be inf (P = 0) or NaN. Some trainers save a step counter that
    # was reset; nu is then used as it is, and said so.
    params = {"w": torch.ones(torch.tensor(nu).shape).double()}
    state = AdamState({}, {"w": torch.tensor(nu).double()}, {"w": 0}, (group(["w"], PLAIN),))
    P, info = funcprobe.preconditioner(params, state)
    assert info.without_step == ("w",)
    # 2 + 1e-8 in float64
    assert float(P["w"].flatten()[-1]) == pytest.approx(1 / (2 + 1e-8), rel=1e-15)
    assert P["w"].isfinite().all()


@pytest.mark.parametrize("learning_rates", [(0.5, 0.5), (0.5, 0.2), (0.4, 0.0), (0.0, 0.0)])
def test_sgd_is_the_gradient_by_learning_rate(learning_rates):
    Y, theta = random_grads(4), random_params(1)
    first, second = (
        g._replace(lr=lr) for g, lr in zip(random_state().groups, learning_rates, strict=True)
    )
    state = AdamState({}, {}, {}, (first, second))  # "sgd" needs no moments
    v = funcprobe.update_direction(theta, Y, state, rule="sgd", max_grad_norm=1e-3)
    ratio = learning_rates[1] / learning_rates[0] if learning_rates[0] else 1.0
    for n in first.names:
        assert torch.equal(v.total[n], Y[n])
    for n in second.names:
        assert torch.equal(v.total[n], ratio * Y[n])


@pytest.mark.parametrize("step", [0, 8])
def test_zero_learning_rate_everywhere_is_the_same_direction(step):
    # The end of a linear schedule leaves lr 0 in the file; v is per unit of lr and still exists.
    state = random_state()._replace(step=dict.fromkeys(SHAPES, step))
    alike = tuple(g._replace(lr=0.3) for g in state.groups)
    off = tuple(g._replace(lr=0.0) for g in state.groups)
    found, expected = (
        funcprobe.update_direction(random_params(1), random_grads(2), state._replace(groups=groups))
        for groups in (off, alike)
    )
    assert all(torch.equal(found.total[n], expected.total[n]) for n in SHAPES)


def without(what: str, name: str = "b.lora_A"):
    def damage(state: AdamState) -> AdamState:
        field = {n: t for n, t in getattr(state, what).items() if n != name}
        return state._replace(**{what: field})

    return damage


def holding(what: str, value: float):
    def damage(state: AdamState) -> AdamState:
        tensor = getattr(state, what)["b.lora_A"].clone()
        tensor[1, 3] = value
        return state._replace(**{what: getattr(state, what) | {"b.lora_A": tensor}})

    return damage


def regrouped(*changes: dict[str, Any]):
    def damage(state: AdamState) -> AdamState:
        pairs = zip(state.groups, changes, strict=True)
        return state._replace(groups=tuple(g._replace(**c) for g, c in pairs))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("exp_avg"), r"needs exp_avg of every parameter, 1 of 5 .*b\.lora_A"),
        (without("exp_avg_sq"), r"needs exp_avg_sq of every parameter, 1 of 5 .*b\.lora_A"),
        (without("step"), r"needs step of every parameter, 1 of 5 .*b\.lora_A"),
        (holding("exp_avg", math.nan), r"exp_avg of b\.lora_A contains a negative or non-finite"),
        (holding("exp_avg", math.inf), r"exp_avg of b\.lora_A"),
        (holding("exp_avg_sq", math.nan), r"exp_avg_sq of b\.lora_A"),
        (holding("exp_avg_sq", math.inf), r"exp_avg_sq of b\.lora_A"),
        (holding("exp_avg_sq", -1e-12), r"exp_avg_sq of b\.lora_A"),
        (regrouped({}, {"names": ("a.lora_A",)}), r"b\.lora_B is in no optimizer group"),
        (regrouped({"lr": 0.0}, {}), r"first optimizer group has learning rate 0"),
    ],
)
def test_a_state_adamw_cannot_use_is_refused(damage, says):
    state = damage(random_state())
    with pytest.raises(InputError, match=says):
        funcprobe.update_direction(random_params(1), random_grads(2), state)


@pytest.mark.parametrize("rule", ["adamw", "precondition"])
def test_a_second_moment_of_another_shape_is_refused(rule):
    state = random_state()
    # As many entries, and one that would broadcast: neither may pass.
    for shape in [(5, 3), (1, 5)]:
        other = state.exp_avg_sq | {"a.lora_A": torch.ones(shape).double()}
        with pytest.raises(ValueError, match=r"exp_avg_sq.*a\.lora_A.*has shape"):
            funcprobe.update_direction(
                random_params(1), random_grads(2), state._replace(exp_avg_sq=other), rule=rule
            )


@pytest.mark.parametrize("rule", ["adamw", "precondition", "sgd"])
def test_gradients_of_other_names_or_shapes_are_refused(rule):
    theta, Y, state = random_params(1), random_grads(2), random_state()
    renamed = {("c" if n == "bias" else n): t for n, t in Y.items()}
    transposed = Y | {"a.lora_A": Y["a.lora_A"].T}
    for bad in (renamed, transposed, {n: Y[n] for n in list(Y)[1:]}, Y | {"more": Y["bias"]}):
        with pytest.raises(ValueError, match="grads"):
            funcprobe.update_direction(theta, bad, state, rule=rule)


def tensors_in(*trees: Any) -> Iterator[torch.Tensor]:
    for part in trees:
        if torch.is_tensor(part):
            yield part
        elif isinstance(part, dict):
            yield from tensors_in(*part.values())
        elif isinstance(part, tuple | list):
            yield from tensors_in(*part)


@pytest.mark.parametrize("rule", ["adamw", "precondition", "sgd"])
def test_no_argument_is_mutated_or_handed_back(rule):
    given = (random_params(1), random_grads(2), random_state())
    before = [(t, t.clone(), t._version) for t in tensors_in(*given)]
    orders = [list(given[0]), list(given[1]), list(given[2].exp_avg), dict(given[2].step)]
    v = funcprobe.update_direction(*given, rule=rule, max_grad_norm=0.1, max_update=0.2)
    funcprobe.precondition(given[1], given[2], 0.2)
    for tensor, copy, version in before:
        assert torch.equal(tensor, copy)
        assert tensor._version == version
    assert orders == [list(given[0]), list(given[1]), list(given[2].exp_avg), dict(given[2].step)]
    storages = {t.untyped_storage().data_ptr() for t in tensors_in(*given)}
    assert not storages & {t.untyped_storage().data_ptr() for t in tensors_in(*v)}


def shuffled(x: dict[str, Any], order: list[str]) -> dict[str, Any]:
    return {n: x[n] for n in order}


orders = st.permutations(list(SHAPES))


@given(orders, orders, orders, orders, orders, st.sampled_from(["adamw", "precondition", "sgd"]))
@settings(max_examples=30)
def test_the_order_of_keys_changes_nothing(a, b, c, d, e, rule):
    theta, Y, s = random_params(1), random_grads(2), random_state()
    other = AdamState(
        shuffled(s.exp_avg, c),
        shuffled(s.exp_avg_sq, d),
        shuffled(s.step, e),
        tuple(g._replace(names=tuple(sorted(g.names, key=a.index))) for g in s.groups),
    )
    step = {"rule": rule, "max_grad_norm": 0.2, "max_update": 0.5}
    expected = funcprobe.update_direction(theta, Y, s, **step)
    found = funcprobe.update_direction(shuffled(theta, a), shuffled(Y, b), other, **step)
    for x, y in zip(expected[:4], found[:4], strict=True):
        assert all(torch.equal(x[n], y[n]) for n in SHAPES)
    assert expected.clip_coefficient == found.clip_coefficient


@given(
    st.lists(st.integers(0, 2), min_size=5, max_size=5).filter(lambda g: set(g) == {0, 1, 2}),
    st.permutations([0, 1, 2]),
    st.lists(st.sampled_from([1e-6, 3e-5, 0.2, 7.0]), min_size=3, max_size=3),
)
@settings(max_examples=30)
def test_the_order_of_groups_changes_the_reference_lr_alone(member, order, lrs):
    hypers = [PLAIN, DECAYED, OTHER]
    groups = [
        group([n for n, m in zip(SHAPES, member, strict=True) if m == i], hypers[i] | {"lr": lrs[i]})
        for i in range(3)
    ]
    state = random_state()._replace(groups=tuple(groups))
    other = state._replace(groups=tuple(groups[i] for i in order))
    theta, Y = random_params(1), random_grads(2)
    a, b = (funcprobe.update_direction(theta, Y, s, max_grad_norm=0.2) for s in (state, other))
    for n in SHAPES:
        # lr v is the step. Its three parts may cancel; each has a few roundings of its own size.
        size = lrs[0] * (a.momentum[n].abs() + a.decay[n].abs() + (a.scale[n] * Y[n]).abs())
        difference = lrs[0] * a.total[n] - lrs[order[0]] * b.total[n]
        assert bool((difference.abs() <= 2e-15 * size).all())


def test_a_fresh_state_is_zero_moments_at_step_zero():
    theta = random_params(1, torch.float32)
    state = funcprobe.fresh_adam_state(theta, (group(SHAPES, PLAIN),))
    for moments in (state.exp_avg, state.exp_avg_sq):
        tree.require_same(theta, moments)
        assert not any(bool(t.any()) for t in moments.values())
    assert state.step == dict.fromkeys(SHAPES, 0)
