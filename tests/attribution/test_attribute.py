"""Shares and marginals of a prediction on a small policy, against gradients one token at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import funcprobe
from funcprobe import AdamGroup, Step, tree
from funcprobe.statistics import evaluation
from support.attribution import (
    CLIPPED,
    ENTROPIES,
    PLAIN,
    PROMPTS_U,
    STEPS,
    E,
    U,
    adam_state,
    attributed,
    difference,
    each_step,
    no_model,
    update_of,
    update_on,
)
from support.policies import random_batch, tiny_policy


def require_sums(found: funcprobe.Attribution, masks: bool = False, wide: bool = True) -> None:
    """Every family sums to the derivative.

    In float64 to 1e-9, some 1e5 roundings of it, of which the tangents' and the gradient's are most; in
    float32 (not `wide`) to 1e-4 of the family's sum of absolute values, some 1e3 roundings of them.
    """
    parts, derivative = found.parts, found.derivative

    def require(total: float, values: Any) -> None:
        size = sum(map(abs, values))
        bound = 1e-9 * abs(derivative) if wide else 1e-4 * size
        assert total == pytest.approx(derivative, rel=0, abs=bound)

    require(parts.total, parts)
    for tokens in (found.update, found.evaluation.tokens):
        assert float(tokens.token_NR.sum()) == pytest.approx(tokens.total, rel=1e-9, abs=1e-14)
        assert float(tokens.prompt_M.sum()) == pytest.approx(tokens.total, rel=1e-9, abs=1e-14)
    dropout = found.dropout if masks else 0.0
    of_U = [parts.momentum, parts.decay, dropout, *found.update.sequence_N.tolist()]
    require(sum(of_U), of_U)
    require(found.evaluation.tokens.total, found.evaluation.tokens.sequence_N.tolist())
    terms = (found.evaluation.direct, found.evaluation.score, found.evaluation.control)
    of_terms = [term.derivative for term in terms]
    require(sum(of_terms), of_terms)
    for grouping in found.modules[:-1]:
        of_modules = [part.total for part in grouping.values()]
        require(sum(of_modules), of_modules)


@pytest.mark.parametrize(
    ("step", "entropy"),
    [
        # The step moves v, the entropy X: each of one with one of the other, all pairs with -m slow.
        pytest.param(
            *(s, e), marks=() if s is CLIPPED or e is ENTROPIES[0] else pytest.mark.slow, id=f"{i}-{k}"
        )
        for i, s in enumerate(STEPS)
        for k, e in enumerate(ENTROPIES)
    ],
)
def test_every_family_sums_to_the_derivative(probe64, step, entropy):
    passes, found = attributed(probe64, step=step, entropy=entropy)
    require_sums(found)
    state = adam_state(probe64.params)
    predicted = funcprobe.summarise(probe64.params, passes, E, U, state, step=step, entropy=entropy)
    assert found.derivative == predicted.derivative
    assert found.parts.total == pytest.approx(predicted.bars_dot, rel=1e-12)
    torch.testing.assert_close(found.update.sequence_N, predicted.t_N, rtol=1e-12, atol=1e-14)
    by_sequence = predicted.first_order.per_sequence_N
    torch.testing.assert_close(found.evaluation.tokens.sequence_N, by_sequence, rtol=1e-9, atol=1e-12)
    if step.rule == "adamw":
        assert min(abs(p) for p in found.parts) > 1e-4 * abs(found.derivative)


@settings(max_examples=12)
@given(
    rows_E=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=3, max_size=7),
    rows_U=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=7),
    seed=st.integers(0, 1000),
    step=st.sampled_from(STEPS),
    entropy=st.sampled_from(ENTROPIES),
    has_entropy=st.booleans(),
)
def test_families_sum_for_any_shapes_groups_and_shared_prompts(
    probe64, rows_E, rows_U, seed, step, entropy, has_entropy
):
    """Rows are (prompt, length of the response): prompts recur, in E and in U, in any order."""
    batch = random_batch([(0, 2, 2), *((m + 1, m + 1, t) for m, t in rows_E)], seed=seed)
    update = update_of([(m, m + 1, t) for m, t in rows_U], seed, has_entropy)
    _, found = attributed(probe64, update, batch, step=step, entropy=entropy)
    require_sums(found)
    for tokens, own in ((found.update, update.batch), (found.evaluation.tokens, batch)):
        assert tokens.prompt_index_M.tolist() == sorted(set(own.prompt_N.tolist()))
        for m, share in zip(tokens.prompt_index_M.tolist(), tokens.prompt_M, strict=True):
            of_prompt = tokens.token_NR[own.prompt_N == m].sum()
            assert float(share) == pytest.approx(float(of_prompt), rel=1e-9, abs=1e-14)
        assert not tokens.token_NR[~funcprobe.response_mask(own)].any()


@pytest.fixture(scope="module")
def probe32():
    return funcprobe.bind(tiny_policy(dtype=torch.float32), max_tokens=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@settings(max_examples=6)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), min_size=3, max_size=8
    ),
    seed=st.integers(0, 1000),
    step=st.sampled_from(STEPS),
    has_entropy=st.booleans(),
)
def test_families_sum_where_E_and_U_have_prompts_in_common(
    probe64, probe32, dtype, rows, seed, step, has_entropy
):
    """Rows are (prompt, length of the response, whether it is U's); a prompt's tokens are the same."""
    rows = [*rows, (0, 2, False), (1, 3, False), (0, 4, True), (2, 1, True)]
    both = random_batch([(m, m + 1, t) for m, t, _ in rows], seed=seed)
    of_U = torch.tensor([own for *_, own in rows])
    batch = funcprobe.select(both, (~of_U).nonzero()[:, 0])
    update = update_on(funcprobe.select(both, of_U.nonzero()[:, 0]), seed, has_entropy)
    wide = dtype == torch.float64
    _, found = attributed(probe64 if wide else probe32, update, batch, step=step)
    require_sums(found, wide=wide)
    assert set(found.update.prompt_index_M.tolist()) >= {0, 2}
    assert set(found.evaluation.tokens.prompt_index_M.tolist()) >= {0, 1}


@pytest.fixture(scope="module")
def token_gradients(probe64) -> dict[tuple[int, int], funcprobe.Params]:
    """Y_mk of every token of U, each by a reverse pass of its own."""
    zero = torch.zeros_like(U.coef_NR)
    found = {}
    for i, k in funcprobe.response_mask(U.batch).nonzero().tolist():
        one = zero.index_put((torch.tensor(i), torch.tensor(k)), torch.tensor(1.0).double())
        found[i, k] = probe64.weighted_grad(
            probe64.params, U.batch, one * U.coef_NR, one * U.entropy_coef_NR
        )
    assert len(found) == 21
    return found


@each_step
def test_shares_of_tokens_are_those_of_their_gradients(probe64, token_gradients, step):
    passes, found = attributed(probe64, step=step)
    scale = funcprobe.update_direction(
        probe64.params, passes.Y[0], adam_state(probe64.params), **step._asdict()
    ).scale
    for at, Y_mk in token_gradients.items():
        expected = tree.dot(tree.multiply(scale, passes.X), Y_mk)
        assert float(found.update.token_NR[at]) == pytest.approx(expected, rel=1e-9, abs=1e-13)
    prompts = torch.stack([found.update.sequence_N[list(rows)].sum() for rows in PROMPTS_U])
    torch.testing.assert_close(found.update.prompt_M, prompts, rtol=1e-12, atol=1e-14)


@each_step
@pytest.mark.parametrize("steps", [0, 8, 999])
def test_marginals_are_differences_of_the_prediction(probe64, token_gradients, step, steps):
    """<X, v(Y + e Y_mk)> of every token: the weight of one is 1 + e."""
    state = adam_state(probe64.params, steps)
    passes, found = attributed(probe64, step=step, state=state)
    Y = passes.Y[0]

    def prediction(e: float, towards: funcprobe.Params) -> float:
        moved = tree.axpy(e, towards, Y)
        v = funcprobe.update_direction(probe64.params, moved, state, **step._asdict())
        return tree.dot(passes.X, v.total)

    largest = float(found.marginal.token_NR.abs().max())
    for at, Y_mk in token_gradients.items():
        # Of e = 1e-5 the differences have rounding 1e-11 of <X, v>; entries of Y smaller than e Y_mk,
        # at which v of the first step turns within |Y| + eps, add up to some 1e-7.
        expected = difference(lambda e, Y_mk=Y_mk: prediction(e, Y_mk), 1e-5)
        assert float(found.marginal.token_NR[at]) == pytest.approx(
            expected, rel=1e-6, abs=1e-6 * largest
        )
    differs = (found.marginal.token_NR - found.update.token_NR).abs().max() / largest
    assert (differs > 1e-3) == (step.rule == "adamw" or step.max_update is not None)


@pytest.mark.parametrize(
    "step", [CLIPPED, pytest.param(PLAIN, marks=pytest.mark.slow)], ids=["clipped", "plain"]
)
def test_marginals_of_sequences_and_prompts_are_those_of_the_whole_prediction(probe64, step):
    """A whole prediction with the weight of a token, a sequence, a prompt changed in J."""
    passes, found = attributed(probe64, step=step)
    state, params = adam_state(probe64.params), probe64.params
    clip = funcprobe.update_direction(params, passes.Y[0], state, **step._asdict()).clip_coefficient
    assert (clip < 0.9) == (step is CLIPPED)

    def predicted(e: float, chosen_NR: torch.Tensor) -> float:
        weight_NR = 1 + e * chosen_NR
        update = U._replace(
            coef_NR=weight_NR * U.coef_NR, entropy_coef_NR=weight_NR * U.entropy_coef_NR
        )
        return probe64.predict(params, E, update, state, step=step).derivative

    zero = torch.zeros_like(U.coef_NR)
    token, sequence = zero.clone(), zero.clone()
    token[3, 2] = 1
    sequence[1] = 1
    prompt = zero + (U.batch.prompt_N == 1)[:, None]
    assert float(prompt.sum()) == 2 * 6
    pairs = [
        (token, found.marginal.token_NR[3, 2]),
        (sequence, found.marginal.sequence_N[1]),
        (prompt, found.marginal.prompt_M[1]),
        (zero + 1, found.marginal.sequence_N.sum()),
    ]
    for chosen_NR, marginal in pairs:
        expected = difference(lambda e, c=chosen_NR: predicted(e, c), 1e-4)
        # Rounding of the differences is 1e-12 of the derivative; a clipped step answers to the weight
        # of all tokens alike by little more.
        floor = 1e-10 * abs(found.derivative)
        assert float(marginal) == pytest.approx(expected, rel=1e-6, abs=floor)


@pytest.mark.parametrize("rule", ["sgd", "precondition"])
def test_where_the_step_is_linear_marginals_are_shares(probe64, rule):
    _, found = attributed(probe64, step=Step(rule))
    torch.testing.assert_close(found.marginal.token_NR, found.update.token_NR, rtol=1e-10, atol=1e-14)
    assert found.marginal.total == pytest.approx(found.derivative, rel=1e-9)  # Euler: of degree 1


def test_a_first_step_answers_to_no_common_weight(probe64):
    """v = Y / (|Y| + eps) is of degree 0 in Y but for eps: marginals sum to what eps leaves."""
    groups = (AdamGroup(tuple(probe64.params), 1e-3, 0.9, 0.99, 1e-14, 0.1),)
    state = funcprobe.fresh_adam_state(probe64.params, groups)
    _, found = attributed(probe64, state=state)
    assert abs(found.marginal.total) < 1e-8 * abs(found.update.total)
    assert found.update.total == pytest.approx(found.derivative - found.parts.decay, rel=1e-9)


def test_a_long_memory_makes_marginals_shares(probe64):
    """(1 - beta2) / (1 - beta2^t) of the second moment is this step's: 1 / t as beta2 tends to 1."""
    apart = []
    for steps in (10**4, 10**6):
        groups = (AdamGroup(tuple(probe64.params), 1e-3, 0.9, 1 - 1e-12, 1e-8, 0.1),)
        given = adam_state(probe64.params, steps, size=0.3)
        # Not yet corrected for its bias, and nowhere so small that Y matters beside it.
        nu = {n: steps * 1e-12 * (0.1 + t) for n, t in given.exp_avg_sq.items()}
        _, found = attributed(probe64, state=given._replace(exp_avg_sq=nu, groups=groups))
        difference_NR = found.marginal.token_NR - found.update.token_NR
        apart.append(float(difference_NR.abs().max() / found.update.token_NR.abs().max()))
    assert 0 < apart[1] < 1e-2
    assert apart[0] / apart[1] == pytest.approx(100, rel=0.1)


def test_shares_of_tensors_are_derivatives_along_them(probe64):
    """The forward route, restricted: E's tangents along v of one tensor alone, 0 elsewhere."""
    passes, found = attributed(probe64, step=CLIPPED)
    params, state = probe64.params, adam_state(probe64.params)
    v = funcprobe.update_direction(params, passes.Y[0], state, **CLIPPED._asdict()).total
    at = funcprobe.evaluate(E, passes.stats, baseline_NR=passes.baseline_NR)
    for name in list(params)[::5]:
        alone = tree.zeros(v) | {name: v[name]}
        _, tangent = probe64.tangents(params, E, alone)
        expected = evaluation.derivative(at, tangent, E.prompt_N).derivative
        assert found.modules.tensor[name].total == pytest.approx(expected, rel=1e-9)
    modules = found.modules
    assert len(modules.tensor) == len(params) == 28
    assert len(modules.module) == 14
    assert list(modules.layer) == [f"base_model.model.model.layers.{i}" for i in range(2)]
    assert set(modules.projection) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert set(modules.factor) == {"A", "B"}
    of_A = [part for name, part in modules.tensor.items() if ".lora_A." in name]
    for i in range(3):
        assert modules.factor["A"][i] == pytest.approx(sum(part[i] for part in of_A), rel=1e-12)


def test_with_masks_what_dropout_makes_is_a_part_of_its_own():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.3, target_modules="all-linear")
        model = get_peft_model(tiny_policy().unload().float(), lora)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
    policy = model.double().eval()
    probe = funcprobe.bind(policy)
    masks = funcprobe.masked_forwards(policy, probe.params, probe.forward, 3, 0)
    passes, found = attributed(probe, step=CLIPPED, masks=masks)
    require_sums(found, masks=True)
    state = adam_state(probe.params)
    predicted = funcprobe.summarise(probe.params, passes, E, U, state, step=CLIPPED)
    assert found.parts.update == pytest.approx(predicted.from_update, rel=1e-12)
    assert abs(found.dropout) > 1e-3 * abs(found.parts.update)

    def shifted(e: float) -> float:
        Y_2 = probe.weighted_grad(probe.params, U.batch, row * U.coef_NR, row * U.entropy_coef_NR)
        Y = [tree.axpy(e, Y_2, one) for one in passes.Y]
        v = funcprobe.step.masked.mean_direction(probe.params, Y, state, CLIPPED)
        return tree.dot(passes.X, v.total)

    row = torch.zeros_like(U.coef_NR)
    row[2] = 1
    assert float(found.marginal.sequence_N[2]) == pytest.approx(difference(shifted, 1e-4), rel=1e-6)


def test_shares_need_no_pass_and_marginals_one_over_U(probe64):
    seen: list[int] = []

    def counting(params, rows):
        seen.extend(rows.sequence_T.unique().tolist())
        return probe64.forward.hidden(params, rows)

    params, state, step = probe64.params, adam_state(probe64.params), CLIPPED
    passes = funcprobe.first_order_passes(params, E, U, state, probe64.forward, step=step)
    forward = probe64.forward._replace(hidden=counting)
    along = funcprobe.marginal_tangents(params, passes, U, state, forward, step=step)
    assert sorted(seen) == list(range(6))
    found = funcprobe.attribute(params, passes, along, E, U, state, step=step)  # has no forward
    assert torch.equal(found.marginal.token_NR, funcprobe.update_shares(U, along).token_NR)


def test_without_gradient_there_is_nothing_to_share(probe64):
    still = U._replace(coef_NR=0 * U.coef_NR, entropy_coef_NR=0 * U.entropy_coef_NR)
    passes, found = attributed(probe64, still)
    require_sums(found)
    params, state = probe64.params, adam_state(probe64.params)
    along = funcprobe.marginal_tangents(params, passes, still, state, no_model)
    assert not along.logp_NR.any()
    assert found.parts.update == found.update.total == found.marginal.total == 0.0
