"""The evidence of a gradient on the order of a state, by enumeration, and on states made to fit."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe.step import evidence as module
from funcprobe.step.orders import other_orders
from funcprobe.types import AdamGroup, AdamState, Params

NAMES = tuple(
    f"layers.{layer}.{m}.lora_{f}.weight" for layer in range(11) for m in ("q", "k", "v") for f in "AB"
)
SHAPES = {n: (3, 8) if "lora_A" in n else (8, 3) for n in NAMES}
GROUPS = (AdamGroup(NAMES, 1e-3, 0.9, 0.99, 1e-8, 0.0),)


def made(seed: int, *, contrast: float = 1.0, names=NAMES) -> tuple[Params, AdamState]:
    """Second moments of log-normal entries, and a gradient with them as variances, up to a scale.

    Without contrast all entries of a moment are alike, as are the gradients: nothing tells them apart.
    """
    g = torch.Generator().manual_seed(seed)
    Y, nu = {}, {}
    for name in names:
        shape = SHAPES[name]
        nu[name] = (contrast * torch.randn(shape, generator=g).double()).exp()
        scale = (2 * torch.randn((), generator=g).double()).exp()
        Y[name] = scale * nu[name].sqrt() * torch.randn(shape, generator=g).double()
    return Y, AdamState({}, nu, dict.fromkeys(names, 2), (GROUPS[0]._replace(names=tuple(names)),))


def filed(state: AdamState, pairing: dict[str, str]) -> AdamState:
    """The state with the second moment of i under the name pairing[i]."""
    moments = {pairing.get(n, n): nu for n, nu in state.exp_avg_sq.items()}
    return state._replace(exp_avg_sq=moments)


def shuffle(rng: torch.Generator) -> dict[str, str]:
    pairing = {}
    for factor in "AB":
        alike = [n for n in NAMES if f"lora_{factor}" in n]
        order = torch.randperm(len(alike), generator=rng).tolist()
        pairing |= {n: alike[j] for n, j in zip(alike, order, strict=True)}
    return pairing


def test_the_fit_is_the_likelihood_at_its_maximum_over_the_scale() -> None:
    Y, state = made(0)
    A = [n for n in NAMES if "lora_A" in n][:3]
    Y_MK = torch.stack([Y[n].flatten() for n in A])
    nu_MK = torch.stack([state.exp_avg_sq[n].flatten() for n in A])
    found_MM = module.fit_MM(Y_MK, nu_MK)
    grid = torch.logspace(-8, 8, 400_001, dtype=torch.float64)  # of c, a ratio of 1.0001 apart
    for i in range(3):
        for j in range(3):
            mean = (Y_MK[i].square() / nu_MK[j]).mean()
            best = (
                -(math.log(2 * math.pi) + grid.log() + nu_MK[j].log().mean() + mean / grid) / 2
            ).max()
            constant = -(math.log(2 * math.pi) + 1) / 2
            # The grid misses the maximum by 1e-9; nu is raised by 1e-6 of its mean, which is in the
            # order of 1e-4 of its smallest entries.
            assert float(found_MM[i, j]) == pytest.approx(float(best) - constant, abs=1e-4)


def test_chunks_change_nothing(monkeypatch) -> None:
    Y_MK, nu_MK = torch.randn(4, 1000).double(), torch.rand(4, 1000).double() + 0.1
    whole = module.fit_MM(Y_MK, nu_MK)
    monkeypatch.setattr(module, "_CHUNK", 300)
    torch.testing.assert_close(module.fit_MM(Y_MK, nu_MK), whole, rtol=1e-12, atol=1e-13)


def test_the_odds_by_enumeration_of_a_small_state() -> None:
    """Four parameters, 24 orders: the bound is the probability itself where scaling has converged."""
    names = [n for n in NAMES if "lora_A" in n and ".q." in n][:4]
    Y, state = made(3, contrast=0.3, names=names)
    L = [[0.0] * 4 for _ in names]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            nu = state.exp_avg_sq[b] + 1e-6 * state.exp_avg_sq[b].mean()
            L[i][j] = float(-(nu.log().mean() + (Y[a].square() / nu).mean().log()) / 2)
    orders = list(permutations(range(4)))
    fit = [sum(L[i][j] for i, j in enumerate(order)) for order in orders]
    (alike,) = module.compare(Y, state)
    for b, log_p_MM in zip(module._TEMPERING_T.tolist(), alike.log_p_TMM, strict=True):
        total = math.fsum(math.exp(b * 24 * (x - fit[0])) for x in fit)
        bound = [float(log_p_MM[range(4), order].sum()) for order in orders]
        for x, log_p in zip(fit, bound, strict=True):
            exact = b * 24 * (x - fit[0]) - math.log(total)
            assert log_p <= exact + 1e-12  # rounding
            # Ratios are exact, as scaling cancels; a permanent is 3/32 to 1 if sums are 1.
            assert log_p - exact == pytest.approx(bound[0] + math.log(total), abs=1e-9)
            assert log_p >= exact + math.log(3 / 32) - 1e-3  # 20 scalings
        torch.testing.assert_close(log_p_MM.exp().sum(1), torch.ones(4).double(), rtol=0, atol=1e-12)

    def evidence(order) -> float:
        p_T = alike.log_p_TMM[:, range(4), order].sum(1).exp()
        return float(p_T.mean())

    found, own = funcprobe.state_evidence(Y, state), evidence(orders[0])
    assert found.over_random == pytest.approx(math.log(own * 24), rel=1e-9)
    best = orders[fit.index(max(fit))]
    assert [found.assigned[n] for n in names] == [names[j] for j in best]
    p_T = torch.stack([alike.log_p_TMM[:, range(4), o].sum(1) for o in (orders[0], best)])
    at = int(p_T[1].argmax())
    assert found.over_assigned == pytest.approx(float(p_T[0, at] - p_T[1, at]), rel=1e-9)
    what = "layers 0 and 1 exchanged"
    assert found.over[what] == pytest.approx(math.log(own / evidence((1, 0, 2, 3))), rel=1e-9)
    for i, name in enumerate(names):
        assert found.margin[name] == pytest.approx(L[i][i] - max(L[i][:i] + L[i][i + 1 :]), rel=1e-9)


def test_the_expected_odds_of_a_random_order_are_at_most_one() -> None:
    """So that at most one shuffle in 1000 has odds over 1000 over a random order."""
    names = [n for n in NAMES if "lora_B" in n and ".k." in n][:5]
    for seed in range(5):
        Y, state = made(seed, names=names)
        odds = [
            math.exp(
                funcprobe.state_evidence(
                    Y, filed(state, {n: names[j] for n, j in zip(names, order, strict=True)})
                ).over_random
            )
            for order in permutations(range(5))
        ]
        assert math.fsum(odds) / 120 <= 1 + 1e-9


def test_a_state_in_order_is_confirmed() -> None:
    found = funcprobe.state_evidence(*made(1))
    assert found.verdict == "confirmed"
    assert (found.alike, found.likeliest) == (66, None)
    assert found.home >= 60  # 24 entries do not always suffice
    assert min(found.over_random, *found.over.values()) > math.log(1000)


def test_every_usual_order_contradicts_by_its_name() -> None:
    Y, state = made(2)
    for what, pairing in other_orders([NAMES], SHAPES).items():
        found = funcprobe.state_evidence(Y, filed(state, pairing))
        assert found.verdict == "contradicted", what
        assert found.likeliest == what
        right = sum(found.assigned[n] == pairing[n] for n in NAMES)
        assert right >= 50, what  # 24 entries do not always suffice


def test_no_shuffle_is_confirmed() -> None:
    rng = torch.Generator().manual_seed(0)
    for seed in range(16):
        Y, state = made(seed, contrast=(0.5, 2.0)[seed % 2])
        found = funcprobe.state_evidence(Y, filed(state, shuffle(rng)))
        assert found.verdict == "undecided"  # it is none of the usual orders
        assert found.home < 10


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_an_order_that_misfiles_a_few_is_not_confirmed(count: int) -> None:
    """Which is none of the usual ones, and leaves most parameters where they belong."""
    alike = [n for n in NAMES if "lora_A" in n]
    for seed in range(5):
        Y, state = made(seed, contrast=2.0)
        assert funcprobe.state_evidence(Y, state).verdict == "confirmed"
        order = torch.randperm(len(alike), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [alike[i] for i in order[:count]]
        pairing = dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))
        found = funcprobe.state_evidence(Y, filed(state, pairing))
        assert found.verdict != "confirmed"
        assert found.over_random > math.log(1000)  # a random order is far less likely, and yet


def test_a_gradient_without_evidence_decides_nothing() -> None:
    for seed in range(8):
        assert funcprobe.state_evidence(*made(seed, contrast=0.0)).verdict == "undecided"
        Y, _ = made(seed)
        _, unrelated = made(seed + 100)
        assert funcprobe.state_evidence(Y, unrelated).verdict == "undecided"


def test_parameters_without_gradient_or_moment_are_no_evidence() -> None:
    Y, state = made(4)
    whole = funcprobe.state_evidence(Y, state)
    first, second, third = NAMES[0], NAMES[2], NAMES[4]
    moments = dict(state.exp_avg_sq)
    del moments[second]
    moments[third] = torch.zeros_like(moments[third])
    less = {**Y, first: torch.zeros_like(Y[first])}
    found = funcprobe.state_evidence(less, state._replace(exp_avg_sq=moments))
    assert found.alike == whole.alike == 66
    assert not {first, second, third} & found.margin.keys()
    # Orders that move only those three are neither likelier nor less likely: nothing is confirmed
    # where exchanging q, k and v of one layer alone is among the orders, as it is not here.
    assert found.verdict == "confirmed"
    half = {n: torch.zeros_like(y) if n in NAMES[:40] else y for n, y in Y.items()}
    assert funcprobe.state_evidence(half, state).verdict == "undecided"  # most have no evidence


def test_shapes_of_their_own_need_none() -> None:
    Y = {"a": torch.ones(2), "b": torch.ones(3)}
    group = AdamGroup(("a", "b"), 1e-3, 0.9, 0.99, 1e-8, 0.0)
    found = funcprobe.state_evidence(Y, AdamState({}, dict(Y), {}, (group,)))
    assert (found.verdict, found.alike, found.over_random) == ("undecided", 0, 0.0)


def test_a_moment_of_another_shape_is_refused() -> None:
    Y, state = made(5)
    moments = state.exp_avg_sq | {NAMES[1]: torch.ones(3, 8)}
    with pytest.raises(ValueError, match="has shape"):
        funcprobe.state_evidence(Y, state._replace(exp_avg_sq=moments))


@given(st.permutations(NAMES), st.floats(-6, 6), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=10)
def test_neither_scale_nor_order_of_keys_counts(order, power, dtype) -> None:
    Y, state = made(6)
    expected = funcprobe.state_evidence(Y, state)
    # float32 holds numbers to 6e-8, and 24 entries of b n L have a sum in the order of 100.
    other = {n: (Y[n] * 10**power).to(dtype) for n in order}
    found = funcprobe.state_evidence(other, state)
    assert found.over_random == pytest.approx(expected.over_random, rel=1e-5)
    assert found.assigned == expected.assigned
