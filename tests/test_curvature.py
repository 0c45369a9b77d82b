"""Second order along a direction, against differences, autograd and enumeration."""

import itertools
import math

import pytest
import torch
from architectures import ARCHITECTURES, lora_config
from conftest import random_batch, random_like, tiny_policy
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import funcprobe
from funcprobe import Entropy, InputError, TokenStats, tree
from funcprobe.autodiff import taylor, taylor_rules
from funcprobe.policy.layout import microbatches
from funcprobe.statistics import estimators, second_order
from funcprobe.statistics.weights import by_unit, importance_weights

ESTIMATORS = [
    Entropy(per, integrand, weights)
    for per, integrand, weights in itertools.product(
        ("token", "sequence"), ("rao_blackwell", "sampled"), ("per_decision", "sequence")
    )
]
each_estimator = pytest.mark.parametrize("entropy", ESTIMATORS, ids=lambda e: "-".join(e[:3]))
# With a baseline where it has a place, and without.
CONTROLLED = [e._replace(baseline="ridge") for e in ESTIMATORS if e.integrand == "rao_blackwell"]
BARE = [e._replace(baseline="none") for e in ESTIMATORS]
each_variant = pytest.mark.parametrize(
    "entropy", BARE + CONTROLLED, ids=lambda e: "-".join((*e[:3], e.baseline))
)
LENGTHS = [(0, 2, 6), (1, 4, 1), (2, 1, 4), (0, 2, 3), (3, 5, 2)]
BATCH = random_batch(LENGTHS)
MASK = funcprobe.response_mask(BATCH)
UNIT = BATCH.prompt_N
STEP = 1e-4  # |v| is 2 here: truncation STEP^2 and rounding 1e-16 / STEP of central differences


def seconds(probe, batch, v, max_tokens=64):
    return funcprobe.second_tangents(probe.params, batch, v, probe.forward, max_tokens)


def difference_of_tangents(probe, batch, v, step):
    """d2/d eta2 of l and h from first-order forward mode at theta +- step v."""
    up, down = (probe.tangents(tree.axpy(s * step, v, probe.params), batch, v)[1] for s in (1, -1))
    return TokenStats(*((u - d) / (2 * step) for u, d in zip(up, down, strict=True)))


def relative(found, expected):
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def direction(probe64):
    return tree.scale(0.05, random_like(probe64.params))


@pytest.fixture(scope="module")
def jet(probe64, direction):
    return seconds(probe64, BATCH, direction)


def architecture(name, adapter="all-linear"):
    """A policy in float64 whose adapter and biases have moved from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        base = ARCHITECTURES[name]()
        model = get_peft_model(base, lora_config(name, adapter))
        for key, p in model.named_parameters():
            if p.requires_grad or key.endswith("bias"):
                p.data += 0.2 * torch.randn_like(p)
    return model.double().eval()


def test_values_first_and_second_derivatives_of_every_token(probe64, direction, jet):
    stats, first, second = jet
    assert relative(stats, probe64.token_stats(probe64.params, BATCH)) < 1e-13
    assert relative(first, probe64.tangents(probe64.params, BATCH, direction)[1]) < 1e-12
    # Truncation STEP^2 (third derivatives are of the size of second ones here), rounding 1e-12.
    assert relative(second, difference_of_tangents(probe64, BATCH, direction, STEP)) < 1e-6
    for x in (*stats, *first, *second):
        assert not x[~MASK].any()


def test_second_tangents_of_a_plain_second_difference_of_values(probe64, direction, jet):
    """Without any derivative by torch: (f(e) - 2 f(0) + f(-e)) / e^2, rounding 1e-15 / e^2 = 1e-9."""
    e = 1e-3
    up, here, down = (
        probe64.token_stats(tree.axpy(s * e, direction, probe64.params), BATCH) for s in (1, 0, -1)
    )
    found = [(u - 2 * h + d) / e**2 for u, h, d in zip(up, here, down, strict=True)]
    assert relative(jet[2], found) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name):
    """GPT-2 among them, whose layer_norm has wrong nested forward mode in torch 2.13."""
    probe = funcprobe.bind(architecture(name), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    with torch.no_grad():  # in which nested forward mode would not work
        _, first, second = seconds(probe, batch, v)
    assert relative(first, probe.tangents(probe.params, batch, v)[1]) < 1e-11
    # As above; Gemma's caps bend more.
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-5


def test_experts_that_are_added_up_in_place():
    """Which no rule can follow, so that the model goes by nested jvp whole."""
    config = MixtralConfig(
        **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4},
        initializer_range=0.3,
        experts_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = get_peft_model(
            MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
    probe = funcprobe.bind(model.double().eval(), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    _, first, second = seconds(probe, batch, v)
    assert relative(first, probe.tangents(probe.params, batch, v)[1]) < 1e-11
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-6


@pytest.mark.parametrize("adapter", ["trained-norms", "trained-biases"])
def test_layer_norm_whose_own_weights_are_trained(adapter):
    probe = funcprobe.bind(architecture("gpt2", adapter), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    second = seconds(probe, batch, v)[2]
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-5


@pytest.mark.parametrize("adapter", ["trained-head", "lora-head"])
def test_a_head_that_moves(adapter):
    """Whose own weights and whose hidden states both do."""
    probe = funcprobe.bind(architecture("qwen2", adapter), max_tokens=64)
    assert probe.forward.readout is None
    v = tree.scale(0.02, random_like(probe.params))
    batch = random_batch([(0, 3, 4), (1, 5, 3)])
    second = seconds(probe, batch, v)[2]
    assert relative(second, difference_of_tangents(probe, batch, v, STEP)) < 1e-6


@pytest.mark.parametrize("affine", [True, False])
def test_plain_layer_norm_is_layer_norm(affine):
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    norm = torch.nn.LayerNorm((4, 5), eps=0.1, elementwise_affine=affine, dtype=torch.float64)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    found = taylor_rules._layer_norm(x, (4, 5), norm.weight, norm.bias, 0.1)
    torch.testing.assert_close(found, norm(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_nested_forward_mode_is_refused(monkeypatch, dtype):
    """torch's own layer_norm, were it not replaced."""
    probe = funcprobe.bind(architecture("gpt2").to(dtype), max_tokens=64)
    v = tree.scale(0.02, random_like(probe.params))
    seconds(probe, BATCH, v)
    monkeypatch.setattr(taylor, "COMPOSED", {})
    with pytest.raises(InputError, match=r"second derivatives .* differ from a symmetric difference"):
        seconds(probe, BATCH, v)


class Unseen(torch.autograd.Function):
    """sin(c x), whose body Taylor mode does not see, so that all derivatives are 0 there."""

    @staticmethod
    def forward(x, c):
        with torch._C.DisableTorchFunctionSubclass():
            return (c * x).sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.c = inputs
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx, tangent, _):
        return ctx.c * (ctx.c * ctx.saved_tensors[0]).cos() * tangent


def spoilt(forward, spoil, where):
    """The policy with its logits or hidden states through a function."""
    if where == "logits":
        logits = forward.logits
        return forward._replace(logits=lambda p, h: spoil(logits(p, h)), readout=None)
    hidden = forward.hidden
    return forward._replace(hidden=lambda params, rows: spoil(hidden(params, rows)))


@pytest.mark.parametrize("where", ["logits", "hidden states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_that_are_not_seen_are_refused(dtype, where):
    probe = funcprobe.bind(tiny_policy(dtype=dtype), max_tokens=64)
    v = tree.scale(0.05, random_like(probe.params))
    wrong = spoilt(probe.forward, lambda x: Unseen.apply(x, 1.0), where)
    with pytest.raises(InputError, match=f"first derivatives of the {where} in Taylor mode are not"):
        funcprobe.second_tangents(probe.params, BATCH, v, wrong)


@pytest.mark.parametrize("where", ["logits", "hidden states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_of_false_zeros_is_refused(monkeypatch, dtype, where):
    """A rule without its bend, for a function of which the first derivative is right."""
    probe = funcprobe.bind(tiny_policy(dtype=dtype), max_tokens=64)
    v = tree.scale(0.05, random_like(probe.params))
    wrong = spoilt(probe.forward, torch.sin, where)
    funcprobe.second_tangents(probe.params, BATCH, v, wrong)

    def straight(jet):
        x, *parts = jet
        return taylor_rules.Jet(x.sin(), *(None if y is None else x.cos() * y for y in parts))

    monkeypatch.setitem(taylor_rules.RULES, torch.sin, straight)
    with pytest.raises(InputError, match=f"of the {where} in Taylor mode differ"):
        funcprobe.second_tangents(probe.params, BATCH, v, wrong)


class OnlyReverse(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "spoil", [OnlyReverse.apply, lambda x: torch.native_layer_norm(x, (11,), None, None, 1e-5)[0]]
)
def test_a_model_without_derivatives_in_taylor_or_forward_mode_is_refused(probe64, direction, spoil):
    wrong = spoilt(probe64.forward, spoil, "logits")
    with pytest.raises(InputError, match="no derivatives in Taylor mode"):
        funcprobe.second_tangents(probe64.params, BATCH, direction, wrong)


def test_half_precision_is_refused():
    probe = funcprobe.bind(tiny_policy(dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"bfloat16 .* policy.dtype"):
        seconds(probe, BATCH, random_like(probe.params))


def test_float32_is_near_float64(probe64, direction, jet):
    probe = funcprobe.bind(tiny_policy(dtype=torch.float32))
    v = {n: t.float() for n, t in direction.items()}
    # Some twenty operations deep, float32 leaves 1e-5 of first derivatives, and twice that here.
    assert relative(seconds(probe, BATCH, v)[2], jet[2]) < 1e-4


@pytest.mark.parametrize("scale", [1e-7, 1e4])
def test_a_direction_of_any_length(probe64, direction, jet, scale):
    """The check's own step follows the direction; second derivatives are quadratic in it."""
    second = seconds(probe64, BATCH, tree.scale(scale, direction))[2]
    assert relative([x / scale**2 for x in second], jet[2]) < 1e-11


def test_a_direction_of_zeros_bends_nothing(probe64):
    _, first, second = seconds(probe64, BATCH, tree.zeros(probe64.params))
    assert not any(x.any() for x in (*first, *second))


def test_requires_grad_order_of_names_and_microbatches_change_nothing(probe64, direction, jet):
    leaves = {n: t.clone().requires_grad_() for n, t in probe64.params.items()}
    backwards = dict(reversed(direction.items()))
    found = funcprobe.second_tangents(leaves, BATCH, backwards, probe64.forward, 8)
    assert len(microbatches(BATCH, 8)) > 3
    for x, y in zip(itertools.chain(*found), itertools.chain(*jet), strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_other_names_are_refused(probe64, direction):
    wrong = dict(itertools.islice(direction.items(), 3))
    with pytest.raises(ValueError, match="lora_A"):
        seconds(probe64, BATCH, wrong)


# The estimator's second derivative.


def toy_jets(seed):
    """(l, h) of a batch under a softmax policy whose logits bend, as a function of eta."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*MASK.shape, 4)
    z0, z1, z2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    token = torch.randint(4, MASK.shape, generator=generator)

    def stats(eta):
        logp = (z0 + eta * z1 + eta.square() * z2 / 2).log_softmax(-1)
        picked = logp.gather(-1, token[..., None]).squeeze(-1)
        return TokenStats(picked * MASK, -(logp.exp() * logp).sum(-1) * MASK)

    sampler = TokenStats(*stats(torch.zeros((), dtype=torch.float64)))
    noise = 0.3 * torch.randn(MASK.shape, generator=generator, dtype=torch.float64) * MASK
    return stats, sampler, noise


def by_autograd(stats, eta, order):
    """The order-th derivative of every token's l and h, by reverse mode over reverse mode."""
    eta = eta.clone().requires_grad_()
    outs = []
    for x in stats(eta):
        cells = []
        for cell in x.flatten():
            value = cell
            for _ in range(order):
                value = (
                    torch.autograd.grad(value, eta, create_graph=True)[0] if value.grad_fn else 0 * eta
                )
            cells.append(value.detach())
        outs.append(torch.stack(cells).reshape(x.shape))
    return TokenStats(*outs)


def loop_estimate(stats, log_ratio, entropy):
    """The estimator as DESIGN defines it, response by response, differentiable."""
    lengths = MASK.sum(1).tolist()
    numerator, denominator = {}, {}
    for i, length in enumerate(lengths):
        for k in range(MASK.shape[1]):
            if entropy.per == "token" and k >= length:
                continue
            last = length if entropy.weights == "sequence" else min(k, length)
            if entropy.weights == "per_decision" and entropy.integrand == "sampled":
                last = min(k + 1, length)
            w = log_ratio[i, :last].sum().exp()
            if entropy.clip is not None:
                w = w.clamp(max=entropy.clip)
            z = stats[1][i, k] if entropy.integrand == "rao_blackwell" else -stats[0][i, k]
            group = 0 if entropy.per == "token" else k
            numerator[group] = numerator.get(group, 0) + (w * z if k < length else 0)
            denominator[group] = denominator.get(group, 0) + w
    return sum(numerator[g] / denominator[g] for g in numerator)


@pytest.mark.parametrize("clip", [None, 1.1])
@each_estimator
def test_second_order_by_autograd_of_a_loop(entropy, clip):
    """The sampler differs from the policy, so that weights are not 1 and the clip holds some."""
    entropy = entropy._replace(clip=clip)
    stats, here, noise = toy_jets(7)
    zero = torch.zeros((), dtype=torch.float64)
    first, second = (by_autograd(stats, zero, order) for order in (1, 2))
    eta = zero.clone().requires_grad_()
    moved = stats(eta)
    value = loop_estimate(moved, moved.logp_NR - here.logp_NR + noise, entropy)
    (slope,) = torch.autograd.grad(value, eta, create_graph=True)
    (bend,) = torch.autograd.grad(slope, eta)
    seen = estimators.first_order(here, first, MASK, UNIT, entropy, noise)
    assert seen.derivative == pytest.approx(float(slope.detach()), rel=1e-11)
    found = second_order.second_order(here, first, second, MASK, UNIT, entropy, noise)
    assert found.derivative == pytest.approx(float(bend), rel=1e-10)
    assert float(found.per_sequence_N.sum()) == pytest.approx(found.derivative, rel=1e-10)


def test_the_clip_of_the_test_above_holds_some_weights():
    _, _, noise = toy_jets(7)
    for weights in ("per_decision", "sequence"):
        held = importance_weights(noise, MASK, Entropy(weights=weights, clip=1.1)) == 1.1
        assert 0 < int((held & MASK).sum()) < int(MASK.sum())


@pytest.fixture(scope="module")
def stats64(probe64):
    return probe64.token_stats(probe64.params, BATCH)


def differences(probe, stats, direction, eta, entropy):
    """(delta(eta), delta(-eta)) through the model."""
    return [
        probe.measure(probe.params, BATCH, direction, s * eta, stats, entropy=entropy).delta
        for s in (1, -1)
    ]


@each_variant
def test_exact_and_cheap_second_derivatives_agree(probe64, direction, jet, stats64, entropy):
    """To 1e-5 at the eta that the precision asks for, where 1e-8 of H S'^2 is expected."""
    at = funcprobe.evaluate(BATCH, stats64, entropy)
    exact = funcprobe.second_derivative(at, *jet[1:], UNIT).derivative
    eta = funcprobe.difference_eta(jet[1], MASK, probe64.forward.coarsest)
    deltas = differences(probe64, stats64, direction, eta, entropy)
    assert funcprobe.second_difference(*deltas, eta) == pytest.approx(exact, rel=1e-5)


def test_the_chosen_eta_is_near_the_best(probe64, direction, jet, stats64):
    """Truncation grows as eta^2, rounding as eta^-2: a factor of 30 costs either way."""
    best = funcprobe.difference_eta(jet[1], MASK, torch.float64)
    error = dict.fromkeys((1 / 30, 1.0, 30.0), 0.0)
    for entropy, factor in itertools.product(BARE, error):
        exact = funcprobe.second_order(stats64, *jet[1:], MASK, UNIT, entropy).derivative
        eta = factor * best
        deltas = differences(probe64, stats64, direction, eta, entropy)
        error[factor] += abs(funcprobe.second_difference(*deltas, eta) / exact - 1)
    assert 10 * error[1.0] < min(error[1 / 30], error[30.0])


@each_variant
def test_what_two_orders_leave_is_cubic(probe64, direction, jet, stats64, entropy):
    at = funcprobe.evaluate(BATCH, stats64, entropy)
    first = funcprobe.derivative(at, jet[1], UNIT).derivative
    second = funcprobe.second_derivative(at, *jet[1:], UNIT).derivative
    left = []
    for eta in (2e-3, 1e-3):
        delta = differences(probe64, stats64, direction, eta, entropy)[0]
        left.append(delta - eta * first - eta**2 * second / 2)
    # 8 but for the fourth order, which is eta of it.
    assert left[0] / left[1] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("clip", [None, 1.1])
@each_estimator
def test_influence_is_what_one_more_copy_of_a_unit_adds(entropy, clip):
    """K copies of every unit and one more of m move the estimate by influence_m / K, to 1 / K."""
    copies = 2000
    entropy = entropy._replace(clip=clip)
    stats, here, noise = toy_jets(7)
    zero = torch.zeros((), dtype=torch.float64)
    first, second = (by_autograd(stats, zero, order) for order in (1, 2))

    def estimate(index):
        rows = [TokenStats(*(x[index] for x in s)) for s in (here, first, second)]
        units = torch.arange(len(index))
        return second_order.second_order(*rows, MASK[index], units, entropy, noise[index]).derivative

    found = second_order.second_order(here, first, second, MASK, UNIT, entropy, noise)
    many = torch.arange(len(MASK)).repeat(copies)
    start = estimate(many)
    added = [estimate(torch.cat([many, (m == UNIT).nonzero().squeeze(1)])) for m in UNIT.unique()]
    expected = copies * (torch.tensor(added, dtype=torch.float64) - start)
    scale = float(expected.abs().max())
    assert torch.allclose(by_unit(found.influence_N, UNIT), expected, rtol=0, atol=5 / copies * scale)
    assert abs(float(found.influence_N.sum())) < 1e-12 * scale
    units = len(expected)
    se = math.sqrt(units / (units - 1) * float(expected.square().sum()))
    assert found.se == pytest.approx(se, rel=5 / copies)


# A policy small enough to enumerate.

SYMBOLS, LONGEST = 3, 3
PROMPTS = ([1, 2], [2, 1, 1])


@pytest.fixture(scope="module")
def world():
    """Every response as often as a uniform sampler of tokens draws it, and the exact derivatives."""
    responses = [
        [*body, end]
        for length in range(1, LONGEST + 1)
        for body in itertools.product(range(1, SYMBOLS), repeat=length - 1)
        for end in (range(SYMBOLS) if length == LONGEST else [0])
    ]
    drawn = [y for y in responses for _ in range(SYMBOLS ** (LONGEST - len(y)))]
    assert len(drawn) == SYMBOLS**LONGEST
    probe = funcprobe.bind(tiny_policy(SYMBOLS, seed=2), max_tokens=512)
    once, often = (
        funcprobe.collate(
            [x for x in PROMPTS for _ in ys],
            [y for _ in PROMPTS for y in ys],
            [i for i in range(len(PROMPTS)) for _ in ys],
        )
        for ys in (responses, drawn)
    )
    v = tree.scale(0.1, random_like(probe.params))

    def slope(eta, per):
        """d/d eta of -sum p log p of whole responses, by reverse mode."""
        moved = tree.axpy(eta, v, probe.params)
        leaves = {n: t.clone().requires_grad_() for n, t in moved.items()}
        logp = probe.seq_logprobs(leaves, once)
        p = logp.exp() / len(PROMPTS)
        value = -(p * logp).sum()
        if per == "token":
            value = value / (p * once.response_length_N).sum()
        grads = torch.autograd.grad(value, list(leaves.values()))
        return tree.dot(dict(zip(leaves, grads, strict=True)), v)

    exact = {per: (slope(STEP, per) - slope(-STEP, per)) / (2 * STEP) for per in ("token", "sequence")}
    return often, funcprobe.second_tangents(probe.params, often, v, probe.forward), exact


@each_estimator
def test_the_population_second_derivative_is_exact(world, entropy):
    batch, jets, exact = world
    mask = funcprobe.response_mask(batch)
    log_ratio = (jets[0].logp_NR + math.log(SYMBOLS)) * mask
    units = torch.arange(len(mask))
    found = funcprobe.second_order(*jets, mask, units, entropy, log_ratio)
    assert abs(exact[entropy.per]) > 0.05
    # Truncation of the difference, STEP^2, with third derivatives up to ten times second ones.
    assert found.derivative == pytest.approx(exact[entropy.per], rel=1e-6)


def test_eta_star_is_where_the_quadratic_term_is_the_linear_one():
    star = funcprobe.eta_star(-3.0, 0.5)
    assert star == 12
    assert abs(-3.0 * star) == pytest.approx(0.5 * 0.5 * star**2)
    assert funcprobe.eta_star(0.0, -2.0) == 0
    assert funcprobe.eta_star(1.0, 0.0) == math.inf


@pytest.mark.parametrize("rate", [0.0, math.inf, math.nan])
def test_no_eta_for_a_direction_that_moves_nothing(rate):
    tangent = TokenStats(torch.full(MASK.shape, rate).double(), torch.ones(MASK.shape).double())
    with pytest.raises(InputError, match="direction"):
        funcprobe.difference_eta(tangent, MASK, torch.float64)


def test_one_sampling_unit_has_no_standard_error(jet, stats64):
    with pytest.raises(InputError, match="1 sampling unit"):
        funcprobe.second_order(stats64, *jet[1:], MASK, 0 * UNIT, Entropy())
