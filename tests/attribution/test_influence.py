"""The matrix E x U against gradients of single sequences, by both routes; and its errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import funcprobe
from funcprobe import Entropy, InputError, Params, Step, tree
from funcprobe.statistics import evaluation
from support.attribution import (
    BOUNDED,
    CLIPPED,
    ENTROPIES,
    PLAIN,
    STEPS,
    E,
    U,
    adam_state,
    attributed,
    no_model,
    update_of,
)
from support.policies import random_batch, tiny_policy

ROUTES = ("columns", "rows")
PROMPTS_E, PROMPTS_U = [0, 1, 2, 3], [0, 1, 2, 4]


def influence(probe: Any, passes: Any, E: Any = E, update: Any = U, **given: Any) -> Any:
    given = {"forward": probe.forward, **given}
    state = given.pop("state", None) or adam_state(probe.params)
    return funcprobe.influence(probe.params, passes, E, update, state, **given)


def exactly(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def single_gradients(probe: Any, passes: Any, entropy: Entropy) -> tuple[list[Params], list[Params]]:
    """X_n of every sequence of E and Y_n of every sequence of U, a reverse pass for each."""
    at = funcprobe.evaluate(E, passes.stats, entropy, baseline_NR=passes.baseline_NR)
    p_NR, q_NR = evaluation.gradient_coefficients(at)
    found = []
    for batch, p, q in ((E, p_NR, q_NR), (U.batch, U.coef_NR, U.entropy_coef_NR)):
        rows = torch.eye(len(p), dtype=torch.float64)
        found.append(
            [probe.weighted_grad(probe.params, batch, r[:, None] * p, r[:, None] * q) for r in rows]
        )
    return found[0], found[1]


def test_both_routes_are_inner_products_of_single_gradients(probe64):
    step, entropy = CLIPPED, Entropy("sequence", "rao_blackwell", "sequence")
    passes, _ = attributed(probe64, step=step, entropy=entropy)
    scale = funcprobe.update_direction(
        probe64.params, passes.Y[0], adam_state(probe64.params), **step._asdict()
    ).scale
    X_N, Y_N = single_gradients(probe64, passes, entropy)
    K = exactly([[tree.dot(tree.multiply(scale, X), Y) for Y in Y_N] for X in X_N])
    prompt_of_E = exactly([[n == m for n in E.prompt_N.tolist()] for m in PROMPTS_E])
    prompt_of_U = exactly([[n == m for n in U.batch.prompt_N.tolist()] for m in PROMPTS_U])
    each = torch.eye(6, dtype=torch.float64)
    for route, (row_unit, left), (column_unit, right) in (
        ("columns", ("sequence", each), ("prompt", prompt_of_U)),
        ("columns", ("prompt", prompt_of_E), ("sequence", each)),
        ("rows", ("sequence", each), ("sequence", each)),
        ("rows", ("prompt", prompt_of_E), ("prompt", prompt_of_U)),
    ):
        found = influence(
            probe64, passes, entropy=entropy, step=step,
            row_unit=row_unit, column_unit=column_unit, route=route,
        )  # fmt: skip
        # Each of both is a sum over some 1e3 entries, with 1e-16 of the largest of them.
        torch.testing.assert_close(
            found.pair_NM, left @ K @ right.T, rtol=1e-9, atol=1e-12 * float(K.abs().max())
        )
    assert found.row_N.tolist() == PROMPTS_E
    assert found.column_M.tolist() == PROMPTS_U


@pytest.mark.parametrize("step", [CLIPPED, BOUNDED, Step("sgd")], ids=lambda s: s.rule)
def test_columns_sum_to_shares_and_rows_to_what_the_update_does_to_E(probe64, step):
    passes, shares = attributed(probe64, step=step)
    found = influence(probe64, passes, step=step, route="columns")
    torch.testing.assert_close(found.pair_NM.sum(0), shares.update.prompt_M, rtol=1e-9, atol=1e-13)
    direction = funcprobe.update_direction(
        probe64.params, passes.Y[0], adam_state(probe64.params), **step._asdict()
    )
    _, tangent = probe64.tangents(probe64.params, E, tree.multiply(direction.scale, passes.Y[0]))
    at = funcprobe.evaluate(E, passes.stats, baseline_NR=passes.baseline_NR)
    along = funcprobe.evaluation_shares(at, tangent, E, E.prompt_N)
    torch.testing.assert_close(found.pair_NM.sum(1), along.tokens.prompt_M, rtol=1e-9, atol=1e-13)
    for share, tensor, expected in zip(
        found.share_M, found.tensor_M, shares.update.prompt_M.tolist(), strict=True
    ):
        assert share.derivative == pytest.approx(expected, rel=1e-9)
        assert sum(tensor.values()) == pytest.approx(expected, rel=1e-9)
    for name, parts in shares.modules.tensor.items():
        total = sum(tensor[name] for tensor in found.tensor_M)
        assert total == pytest.approx(parts.update, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("unit_N", [None, torch.arange(6)], ids=["prompts", "draws"])
def test_the_errors_of_shares_are_those_of_the_prediction_where_it_is_their_sum(probe64, unit_N):
    """Rule "sgd", v = sum_m P Y_m: influence values add up; and a jackknife over E of one share."""
    passes, _ = attributed(probe64, step=Step("sgd"))
    params, state = probe64.params, adam_state(probe64.params)
    found = influence(probe64, passes, step=Step("sgd"), unit_N=unit_N, route="columns")
    first = funcprobe.summarise(
        params, passes, E, U, state, step=Step("sgd"), unit_N=unit_N
    ).first_order
    total_N = torch.stack([share.influence_N for share in found.share_M]).sum(0)
    torch.testing.assert_close(total_N, first.influence_N, rtol=1e-8, atol=1e-10)
    per_N = torch.stack([share.per_sequence_N for share in found.share_M]).sum(0)
    torch.testing.assert_close(per_N, first.per_sequence_N, rtol=1e-8, atol=1e-10)
    # One prompt's step alone is a prediction of its own, whose error is the share's.
    alone = funcprobe.subset(U, prompts=[1])._replace(normaliser_N=torch.ones(6).double())
    of_it = funcprobe.predict(params, E, alone, state, probe64.forward, step=Step("sgd"), unit_N=unit_N)
    share = found.share_M[1]
    assert share.se == pytest.approx(of_it.first_order.se, rel=1e-9)
    assert share.se_jackknife == pytest.approx(of_it.first_order.se_jackknife, rel=1e-9)
    assert len({round(s.se, 12) for s in found.share_M}) == 4


def test_chosen_rows_and_columns_come_in_the_order_of_their_names(probe64):
    passes, _ = attributed(probe64)
    whole = influence(probe64, passes, route="columns")
    for route in ROUTES:
        some = influence(probe64, passes, rows=[3, 1], columns=[4, 0, 2], route=route)
        assert (some.row_N.tolist(), some.column_M.tolist()) == ([3, 1], [4, 0, 2])
        expected = whole.pair_NM[[3, 1]][:, [3, 0, 2]]
        torch.testing.assert_close(some.pair_NM, expected, rtol=1e-9, atol=1e-12)
        assert some.share_M == ()  # the error of a share needs all of E
    in_order = influence(probe64, passes, rows=[2, 0, 3, 1], columns=[1])
    assert in_order.share_M[0].se == whole.share_M[1].se
    torch.testing.assert_close(in_order.pair_NM[:, 0], whole.pair_NM[[2, 0, 3, 1], 1])


def test_the_cheaper_route_is_taken_and_only_named_sequences_are_passed(probe64):
    def counting(params, rows):
        passed.extend(rows.sequence_T.unique().tolist())
        return probe64.forward.hidden(params, rows)

    passes, _ = attributed(probe64)
    forward = probe64.forward._replace(hidden=counting)
    cases = [
        # Prompt 1 of U has rows 2 and 4: their gradient, then the tangents of all six of E.
        ({"columns": [1]}, 2 + 6, True),
        # Row 2 of E is one sequence: its gradient, then the tangents of all six of U.
        ({"rows": [2]}, 1 + 6, False),
        ({"rows": [2], "columns": [1]}, 2 + 1, True),
        ({"rows": [2], "columns": [1], "route": "rows"}, 1 + 2, False),
        # 2.4 * 22 + 3 * 2 * 27 tokens by columns, 2.4 * 27 + 3 * 2 * 22 by rows.
        ({"rows": [1, 2], "columns": [1, 4]}, 3 + 3 + 1 + 3, False),
    ]
    for chosen, sequences, by_columns in cases:
        passed: list[int] = []
        found = influence(probe64, passes, forward=forward, **chosen)
        assert len(passed) == sequences
        assert bool(found.tensor_M) == by_columns


def test_a_prompt_without_coefficients_needs_no_pass(probe64):
    still = U._replace(
        coef_NR=U.coef_NR * (U.batch.prompt_N != 1)[:, None],
        entropy_coef_NR=U.entropy_coef_NR * (U.batch.prompt_N != 1)[:, None],
    )
    passes, _ = attributed(probe64, still)
    nothing = probe64.forward._replace(hidden=no_model)
    for route in ROUTES:
        whole = influence(probe64, passes, update=still, route=route)
        assert not whole.pair_NM[:, 1].any()
        assert whole.pair_NM[:, [0, 2, 3]].all()
        alone = influence(probe64, passes, update=still, columns=[1], route=route, forward=nothing)
        assert not alone.pair_NM.any()
        for share in alone.share_M:
            assert share.derivative == share.se == 0


@settings(max_examples=3)
@given(
    rows_E=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=2, max_size=4),
    rows_U=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    step=st.sampled_from(STEPS),
    entropy=st.sampled_from(ENTROPIES),
    units=st.tuples(*[st.sampled_from(["prompt", "sequence"])] * 2),
)
def test_routes_agree_for_any_shapes(probe64, rows_E, rows_U, seed, step, entropy, units):
    batch = random_batch([(0, 2, 2), *((m + 1, m + 1, t) for m, t in rows_E)], seed=seed)
    update = update_of([(m, m + 1, t) for m, t in rows_U], seed, entropy=seed % 2 == 0)
    passes, shares = attributed(probe64, update, batch, step=step, entropy=entropy)
    given = {"step": step, "entropy": entropy, "row_unit": units[0], "column_unit": units[1]}
    columns, rows = (
        influence(probe64, passes, batch, update, route=route, **given) for route in ROUTES
    )
    size = 1e-11 * float(rows.pair_NM.abs().max())
    torch.testing.assert_close(columns.pair_NM, rows.pair_NM, rtol=1e-9, atol=size)
    expected = shares.update.prompt_M if units[1] == "prompt" else shares.update.sequence_N
    torch.testing.assert_close(columns.pair_NM.sum(0), expected, rtol=1e-9, atol=size)


def test_float32_sums_within_rounding():
    """1e-4 of the sum of absolute values: float32 has 6e-8, times some 1e3 operations a number."""
    probe = funcprobe.bind(tiny_policy(dtype=torch.float32), max_tokens=64)
    passes, shares = attributed(probe, step=CLIPPED)
    by_route = [influence(probe, passes, step=CLIPPED, route=route).pair_NM for route in ROUTES]
    size = 1e-4 * float(by_route[0].abs().sum())
    torch.testing.assert_close(*by_route, rtol=0, atol=size)
    torch.testing.assert_close(by_route[0].sum(0), shares.update.prompt_M, rtol=0, atol=size)


def test_with_masks_of_dropout_columns_are_the_shares_without_them(policy64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_policy().unload(), config).double().eval()
    probe = funcprobe.bind(model, max_tokens=64)
    masks = funcprobe.masked_forwards(model, probe.params, probe.forward, 3, seed=1)
    passes, shares = attributed(probe, step=CLIPPED, masks=masks)
    found = influence(probe, passes, step=CLIPPED)
    torch.testing.assert_close(found.pair_NM.sum(0), shares.update.prompt_M, rtol=1e-9, atol=1e-13)
    assert abs(shares.dropout) > 1e-3 * abs(shares.parts.update)


def test_pairs_come_by_size_with_their_names(probe64):
    passes, _ = attributed(probe64)
    found = influence(probe64, passes)
    pairs = funcprobe.top_pairs(found, 5)
    entries = [
        (abs(float(found.pair_NM[i, j])), n, m)
        for i, n in enumerate(PROMPTS_E)
        for j, m in enumerate(PROMPTS_U)
    ]
    assert [(abs(p.influence), p.row, p.column) for p in pairs] == sorted(entries, reverse=True)[:5]
    assert len({p.influence > 0 for p in funcprobe.top_pairs(found, 16)}) == 2
    assert len(funcprobe.top_pairs(found, 100)) == 16
    with pytest.raises(InputError, match="0 pairs: at least 1"):
        funcprobe.top_pairs(found, 0)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"columns": [3]}, r"prompt 3 is not in U: one of its 4 is expected \(0, 1, 2, 4\)"),
        ({"rows": [7]}, "prompt 7 is not in E"),
        ({"rows": [6], "row_unit": "sequence"}, r"sequence 6 is not in E: one of its 6 .*4, \.\.\."),
        ({"rows": []}, "no prompt of E is named: name at least one of its 4"),
        ({"columns": []}, "no prompt of U is named"),
        ({"columns": [1, 0, 1]}, "prompt 1 of U is named twice"),
        ({"column_unit": "token"}, "unknown unit 'token'"),
        ({"route": "both"}, "unknown route 'both'"),
    ],
)
def test_what_is_not_there_is_refused_before_any_pass(probe64, chosen, says):
    passes, _ = attributed(probe64, step=PLAIN)
    with pytest.raises(InputError, match=says) as error:
        influence(probe64, passes, forward=probe64.forward._replace(hidden=no_model), **chosen)
    assert "\n" not in str(error.value)
