"""Every derivative of the model against the others and against finite differences, in float64."""

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp

import funcprobe
from funcprobe import tree
from funcprobe.passes import head
from funcprobe.policy import precision, readout
from funcprobe.policy.layout import microbatches
from funcprobe.types import InputError
from support.policies import VOCABULARY, random_batch, random_like, tiny_policy

POLICY = tiny_policy()
BATCH = random_batch([(0, 3, 4), (0, 3, 2), (1, 2, 3)])
ONES = torch.ones(3, 4, dtype=torch.float64)
STEP = 1e-5  # central differences of smooth functions in float64: error about STEP^2 + 1e-16 / STEP


@st.composite
def batches(draw):
    """Prompts shared by groups of any size, any lengths, in any order."""
    groups = draw(st.integers(1, 3))
    lengths = []
    for prompt in range(groups):
        prompt_length = draw(st.integers(1, 6))
        for _ in range(draw(st.integers(1, 3))):
            lengths.append((prompt, prompt_length, draw(st.integers(1, 6))))
    lengths = draw(st.permutations(lengths))
    return random_batch(lengths, seed=draw(st.integers(0, 99)))


def per_sequence_loop(probe, batch, p_NR, q_NR, mu):
    """<grad f_i, mu> one sequence, one gradient at a time."""
    s = []
    for i in range(len(batch.prompt_N)):
        one = torch.zeros_like(p_NR)
        one[i] = 1
        s.append(tree.dot(probe.weighted_grad(probe.params, batch, one * p_NR, one * q_NR), mu))
    return torch.tensor(s, dtype=torch.float64)


@settings(max_examples=12)
@given(batches(), st.integers(12, 60), st.integers(0, 99))
def test_alpha_trick_tangents_loop_and_differences_agree(batch, max_tokens, seed):
    probe = funcprobe.bind(POLICY, max_tokens=max_tokens)
    mask = funcprobe.response_mask(batch)
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    mu = random_like(probe.params, seed)
    loop = per_sequence_loop(probe, batch, p, q, mu)
    scale = float(loop.abs().max())
    _, tangent = probe.tangents(probe.params, batch, mu)
    forward_mode = (p * tangent.logp_NR + q * tangent.entropy_NR).sum(1)
    assert float((forward_mode - loop).abs().max()) < 1e-9 * scale
    n = len(loop)
    for alpha in (torch.ones(n), torch.randn(n, generator=generator), torch.eye(n)[-1]):
        s = probe.alpha_vjp(probe.params, batch, mu, p_NR=p, q_NR=q, alpha_N=alpha.double())
        assert float((s - loop).abs().max()) < 1e-9 * scale

    def f(eta):
        stats = probe.token_stats(tree.axpy(eta, mu, probe.params), batch)
        return (p * stats.logp_NR + q * stats.entropy_NR).sum(1)

    # |mu| is about 40 here, so that the third derivative's share is near 1e-5 of the largest.
    differences = (f(STEP) - f(-STEP)) / (2 * STEP)
    assert float((differences - loop).abs().max()) < 1e-4 * scale


def test_default_alpha_trick_is_of_the_sequence_logprobs(probe64):
    batch = random_batch([(0, 2, 3), (1, 4, 1), (2, 1, 5)])
    mu = random_like(probe64.params)
    _, tangent = probe64.tangents(probe64.params, batch, mu)
    s = probe64.alpha_vjp(probe64.params, batch, mu)
    assert torch.allclose(s, tangent.logp_NR.sum(1), rtol=1e-10)


def test_statistics_by_a_plain_forward(policy64, probe64):
    """log_softmax of the model's own logits, token by token."""
    batch = random_batch([(0, 2, 3), (1, 4, 1), (2, 1, 5)])
    stats = probe64.token_stats(probe64.params, batch)
    for i in range(3):
        start, count = int(batch.prompt_length_N[i]), int(batch.response_length_N[i])
        row = batch.tokens_NL[i, : start + count]
        with torch.no_grad(), precision.StayFloat64():
            logp = policy64(input_ids=row[None]).logits[0].log_softmax(-1)
        for k in range(count):
            here = logp[start + k - 1]
            assert float(stats.logp_NR[i, k]) == pytest.approx(float(here[row[start + k]]), abs=1e-12)
            entropy = -float((here.exp() * here).sum())
            assert float(stats.entropy_NR[i, k]) == pytest.approx(entropy, abs=1e-12)
        assert not stats.logp_NR[i, count:].any()
    assert torch.equal(probe64.seq_logprobs(probe64.params, batch), stats.logp_NR.sum(1))


def test_temperature_is_that_of_the_distribution(policy64, probe64):
    batch = random_batch([(0, 2, 3), (1, 4, 1)])
    cold = funcprobe.bind(policy64, temperature=0.5).token_stats(probe64.params, batch)
    warm = probe64.token_stats(probe64.params, batch)
    assert float(cold.entropy_NR.sum()) < float(warm.entropy_NR.sum())
    row = batch.tokens_NL[0, :5]
    with torch.no_grad(), precision.StayFloat64():
        logits = policy64(input_ids=row[None]).logits[0, 1]
    expected = (logits / 0.5).log_softmax(-1)[row[2]]
    assert float(cold.logp_NR[0, 0]) == pytest.approx(float(expected), abs=1e-12)


def test_seq_logprobs_composes_with_torch_func(probe64):
    """Notebook use: torch.func.grad through the public function is weighted_grad."""
    batch = random_batch([(0, 2, 3), (1, 4, 1), (2, 1, 5)])
    grads = torch.func.grad(lambda p: probe64.seq_logprobs(p, batch).sum())(probe64.params)
    mask = funcprobe.response_mask(batch).double()
    ours = probe64.weighted_grad(probe64.params, batch, mask, 0 * mask)
    for name in grads:
        assert torch.allclose(grads[name], ours[name], rtol=1e-9, atol=1e-12)


DERIVATIVES = {
    "weighted_grad": lambda probe, q, v: probe.weighted_grad(q, BATCH, ONES, ONES),
    "tangents": lambda probe, q, v: probe.tangents(q, BATCH, v),
    "along": lambda probe, q, v: probe.tangents(probe.params, BATCH, q),
    "second_tangents": lambda probe, q, v: probe.second_tangents(q, BATCH, v),
    "grad_dots": lambda probe, q, v: probe.grad_dots(q, BATCH, v),
    "alpha_vjp": lambda probe, q, v: probe.alpha_vjp(q, BATCH, v),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_a_derivative_of_a_derivative_is_refused(probe64, derivative):
    """It keeps no graph: grad around it would be zeros."""
    v = random_like(probe64.params)

    def total(q):
        return sum(t.sum() for t in optree.tree_leaves(derivative(probe64, q, v)))

    for transform in (grad(total), lambda q: jvp(total, (q,), (v,))):
        with pytest.raises(InputError, match="differentiate token_stats or seq_logprobs instead"):
            transform(probe64.params)
    # Autograd's own leaves are allowed, and find no graph.
    leaves = {n: t.clone().requires_grad_() for n, t in probe64.params.items()}
    assert not total(leaves).requires_grad


def test_grad_Y_is_the_gradient_of_J(probe64):
    batch = random_batch([(0, 2, 3), (0, 2, 1), (2, 1, 5)])
    coef = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = funcprobe.UpdateBatch(batch, coef)

    def J(params):
        return (coef * probe64.token_stats(params, batch).logp_NR).sum()

    expected = torch.func.grad(J)(probe64.params)
    Y = probe64.grad_Y(probe64.params, update)
    for name in expected:
        assert torch.allclose(Y[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_the_head_change_nothing(monkeypatch, probe64, chunk):
    """17 response tokens: whole chunks, a last short one, single tokens."""
    batch = random_batch([(0, 2, 6), (1, 4, 4), (2, 1, 7)])
    mask = funcprobe.response_mask(batch).double()
    v = random_like(probe64.params)

    def everything():
        stats, tangent = probe64.tangents(probe64.params, batch, v)
        grads = probe64.weighted_grad(probe64.params, batch, mask, 0.3 * mask)
        return stats, tangent, probe64.token_stats(probe64.params, batch), grads

    whole = everything()
    vocabulary, float64 = len(probe64.forward.readout.weight_VD), 8
    monkeypatch.setattr(readout, "BYTES", 4 * float64 * vocabulary * chunk)
    parts = everything()
    for a, b in zip(whole[:3], parts[:3], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-13)
    for name in whole[3]:
        assert torch.allclose(whole[3][name], parts[3][name], rtol=1e-9, atol=1e-12)


def test_a_batch_of_many_microbatches_gives_the_same_numbers(policy64):
    """Ten times a microbatch against one."""
    lengths = [(i // 2, 1 + i // 2 % 4, 1 + i % 6) for i in range(40)]
    batch = random_batch(lengths)
    one = funcprobe.bind(policy64, max_tokens=4096)
    many = funcprobe.bind(policy64, max_tokens=12)
    assert len(microbatches(batch, 12)) >= 10
    assert len(microbatches(batch, 4096)) == 1
    mask, v = funcprobe.response_mask(batch).double(), random_like(one.params)
    for a, b in zip(
        one.tangents(one.params, batch, v), many.tangents(one.params, batch, v), strict=True
    ):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-11, atol=1e-12)
    left, right = (p.weighted_grad(one.params, batch, mask, mask) for p in (one, many))
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-9, atol=1e-11)
    left, right = (p.alpha_vjp(one.params, batch, v) for p in (one, many))
    assert torch.allclose(left, right, rtol=1e-10)


def test_trainable_head_and_modules_to_save_are_in_every_derivative():
    """A trained lm_head belongs to the registry and reaches the chunked head."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], r=2),
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    probe = funcprobe.bind(model.double().eval(), max_tokens=32)
    assert any("lm_head" in name for name in probe.params)
    batch = random_batch([(0, 2, 6), (1, 4, 4)])
    mask, v = funcprobe.response_mask(batch).double(), random_like(probe.params)
    _, tangent = probe.tangents(probe.params, batch, v)
    slope = float((tangent.logp_NR + 0.3 * tangent.entropy_NR).sum())
    grads = probe.weighted_grad(probe.params, batch, mask, 0.3 * mask)
    assert tree.dot(grads, v) == pytest.approx(slope, rel=1e-9)
    up, down = (probe.token_stats(tree.axpy(sign * STEP, v, probe.params), batch) for sign in (1, -1))
    difference = float((up.logp_NR + 0.3 * up.entropy_NR - down.logp_NR - 0.3 * down.entropy_NR).sum())
    assert difference / (2 * STEP) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_routes_agree_in_both_precisions(dtype, bound):
    """Reverse then dot against forward then sum, the bound of every run."""
    probe = funcprobe.bind(tiny_policy(dtype=dtype), max_tokens=40)
    batch = random_batch([(i, 3, 1 + i % 6) for i in range(12)])
    v = random_like(probe.params)
    stats, tangent = probe.tangents(probe.params, batch, v)
    at = funcprobe.evaluate(batch, stats)
    assert at.entropy.baseline == "ridge"
    first = funcprobe.derivative(at, tangent, batch.prompt_N)
    other = tree.dot(probe.grad_X(probe.params, batch), v)
    assert abs(other - first.derivative) < bound * abs(other)


def test_a_bfloat16_base_with_float32_adapters_is_near_the_float32_one():
    """What peft loads on a bfloat16 base; 16 roundings of 0.4 % at most, not all of one sign."""
    exact, half = tiny_policy(dtype=torch.float32), tiny_policy(dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            p.data.copy_(dict(exact.named_parameters())[name])
    batch = random_batch([(i % 7, 1 + i % 7, 1 + i % 6) for i in range(40)])
    mask = funcprobe.response_mask(batch).double()
    found = []
    for model in (exact, half):
        probe = funcprobe.bind(model, max_tokens=24)  # many microbatches, whose sum must not round
        assert next(iter(probe.params.values())).dtype == torch.float32
        found.append(probe.weighted_grad(probe.params, batch, mask, 0.3 * mask))
        assert all(t.dtype == torch.float32 for t in found[-1].values())
    assert probe.forward.coarsest == torch.bfloat16
    difference = tree.norm(tree.axpy(-1.0, found[0], found[1]))
    assert 0 < difference < 0.1 * tree.norm(found[0])


def test_pure_bfloat16_sums_in_float32():
    """300 equal sequences: a bfloat16 sum would stop growing at 256 times the first."""
    probe = funcprobe.bind(tiny_policy(dtype=torch.bfloat16), max_tokens=4)
    one = random_batch([(0, 2, 2)])
    many = funcprobe.Batch(*(field.expand(300, *field.shape[1:]) for field in one))
    sums = []
    for batch in (one, many):
        mask = funcprobe.response_mask(batch).double()
        sums.append(probe.weighted_grad(probe.params, batch, mask, 0 * mask))
    for name, single in sums[0].items():
        assert sums[1][name].dtype == torch.float32
        # 300 additions in float32
        assert torch.allclose(sums[1][name], 300 * single, rtol=1e-4, atol=1e-6)


def test_head_works_in_float32_on_half_precision_logits():
    """log_softmax in bfloat16 would leave three digits; here only the logits' own rounding stays."""
    probe = funcprobe.bind(tiny_policy(dtype=torch.bfloat16))
    batch = random_batch([(0, 2, 6), (1, 4, 4)])
    (rows,) = microbatches(batch, 2048)
    hidden_TD = probe.forward.hidden(probe.params, rows)
    logp_T, entropy_T = head.token_head(probe.params, hidden_TD, rows.target_T, probe.forward)
    logp_TV = probe.forward.logits(probe.params, hidden_TD).double().log_softmax(-1)
    picked = logp_TV.gather(1, rows.target_T[:, None]).squeeze(1)
    # float32 over 11 tokens
    assert torch.allclose(logp_T.double(), picked, atol=1e-6)
    assert torch.allclose(entropy_T.double(), -(logp_TV.exp() * logp_TV).sum(1), atol=1e-6)


def test_a_direction_of_other_names_or_shapes_is_refused(probe64):
    batch = random_batch([(0, 2, 3)])
    v = random_like(probe64.params)
    first = next(iter(v))
    for wrong in ({n: t for n, t in v.items() if n != first}, {**v, first: v[first][:1]}):
        with pytest.raises(ValueError, match="lora_A"):
            probe64.tangents(probe64.params, batch, wrong)
        with pytest.raises(ValueError, match="lora_A"):
            probe64.alpha_vjp(probe64.params, batch, wrong)
    # Another order is no other direction.
    backwards = dict(reversed(v.items()))
    here, there = (probe64.alpha_vjp(probe64.params, batch, d) for d in (v, backwards))
    assert torch.equal(here, there)
