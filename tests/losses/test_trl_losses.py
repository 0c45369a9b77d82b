"""TRL's losses against TRL's own `_compute_loss` on the same arrays, and against finite differences."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from trl import GRPOConfig

from funcprobe import InputError, LossInputs, TokenStats, coefficients, loss_update
from funcprobe.losses.trl import TrlLoss, trl_loss
from funcprobe.policy.layout import collate, response_mask
from support.trl_step import trl_step

TYPES = ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOW, HIGH = 0.75, 1.5  # epsilon = 1/4 and 1/2: bounds that are exact, and e^(log bound) is, too


def any_settings(loss_type):
    modes = MODES[:2] if loss_type == "vespo" else MODES
    highs = [1.0, 1.25, 5.0] if loss_type == "cispo" else [None, HIGH - 1]  # the bound itself in CISPO
    choices = {
        "loss_type": st.just(loss_type),
        "importance_sampling_level": st.sampled_from(["token", "sequence"]),
        "epsilon": st.just(1 - LOW),
        "epsilon_high": st.sampled_from(highs),
        "delta": st.sampled_from([None, 1.25, 2.0]),
        "beta": st.sampled_from([0.0, 0.3]),
        "use_bias_correction_kl": st.booleans(),
        "entropy_coef": st.sampled_from([0.0, 0.05, -0.1]),
        "use_adaptive_entropy": st.booleans(),
        "top_entropy_quantile": st.sampled_from([1.0, 0.5, 0.2, 0.0]),
        "off_policy_mask_threshold": st.sampled_from([None, 0.0, 0.2]),
        "sapo_temperature_pos": st.sampled_from([1.0, 0.7]),
        "vespo_k_neg": st.sampled_from([3.0, 0.4]),
        "use_vllm": st.booleans(),
        "vllm_importance_sampling_correction": st.booleans(),
        "vllm_importance_sampling_mode": st.sampled_from(modes),
        "vllm_importance_sampling_clip_max": st.sampled_from([1.2, 3.0]),
        "vllm_importance_sampling_clip_min": st.sampled_from([None, 0.8]),
        "max_completion_length": st.sampled_from([7, 512]),
    }
    return st.fixed_dictionaries(choices).map(lambda chosen: TrlLoss(**chosen))


def drawn(seed, microbatches, processes, rows, longest, masked=True, old=True):
    """Arrays of a step: ragged responses, masked tokens and sequences, ratios exactly at bounds.

    Entropies are numbers of float32, as in TRL, where a threshold can be one of them, and so are the
    sampler's log-probabilities. Advantages are 0 for every third prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    N = microbatches * processes * rows

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    length_N = torch.randint(1, longest + 1, (N,), generator=generator)
    process_N = torch.arange(N) % processes
    length_N[:processes] = longest  # TRL then pads the rows of every process to the same length
    batch = collate([[2]] * N, [[1] * int(n) for n in length_N], [i // 2 for i in range(N)])
    real_NR = response_mask(batch)
    shape = real_NR.shape
    l_NR, h_NR = uniform(-4, -0.01, *shape), uniform(0, 2, *shape).float().double()
    old_NR = l_NR - uniform(-0.6, 0.6, *shape)
    where_NR = uniform(0, 1, *shape)
    for i, bound in enumerate([LOW, 1 - 1 / 8, 1.0, 1.25, HIGH, 2.0]):
        exactly_NR = (where_NR > 0.05 * i) & (where_NR < 0.05 * (i + 1))
        l_NR = torch.where(exactly_NR, min(0.0, math.log(bound)), l_NR)
        old_NR = torch.where(exactly_NR, min(0.0, -math.log(bound)), old_NR)
    sampler_NR = (old_NR + uniform(-0.4, 0.4, *shape)).float().double()
    sampler_NR = torch.where(uniform(0, 1, *shape) < 0.1, math.nan, sampler_NR)
    mask_NR = real_NR.clone()
    if masked:
        mask_NR &= uniform(0, 1, *shape) < 0.8
        mask_NR &= uniform(0, 1, N, 1) < 0.8
    advantage_N = uniform(-2, 2, N) * (batch.prompt_N % 3 != 2)
    inputs = LossInputs(
        advantage_N=advantage_N,
        mask_NR=mask_NR,
        prompt_N=batch.prompt_N,
        microbatch_N=torch.arange(N) // processes % microbatches,
        process_N=process_N,
        old_logp_NR=old_NR if old else None,
        ref_logp_NR=l_NR + uniform(-1, 1, *shape),
        sampler_logp_NR=sampler_NR,
    )
    return batch, real_NR, TokenStats(l_NR, h_NR), inputs


def close(found, expected, tolerance):
    """Relative to the largest entry: rounding of sums, of which TRL adds the terms in another order."""
    scale = max(float(expected.abs().max()), 1e-300)
    return float((found - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("loss_type", TYPES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_coefficients_value_and_metrics_are_trls(loss_type, data):
    """TRL's generation, loss and autograd in float64. Entries past a response's end are TRL's alone."""
    s = data.draw(any_settings(loss_type))
    microbatches, processes = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2]))
    longest = data.draw(st.integers(1, 6))
    batch, real_NR, stats, inputs = drawn(
        data.draw(st.integers(0, 2**32)),
        microbatches,
        processes,
        data.draw(st.integers(1, 3)),
        longest,
        # Of one column TRL takes means over all sequences; it has then no mask to agree about.
        masked=longest > 1 and data.draw(st.booleans()),
        old=s.corrects_sampler or data.draw(st.booleans()),
    )
    if not s.use_vllm and data.draw(st.booleans()):
        inputs = inputs._replace(sampler_logp_NR=None)
    # A last step of an epoch may have fewer micro-batches than the setting, a generation may have more.
    last = data.draw(st.sampled_from([1, 2]))
    s = s._replace(gradient_accumulation_steps=last * microbatches)
    if last == 2 or data.draw(st.booleans()):
        # Powers of two, by which TRL's divisor in float32 is exact.
        s = s._replace(steps_per_generation=data.draw(st.sampled_from([1, microbatches, 8])))
        tokens = float(inputs.mask_NR.sum())
        generation = st.sampled_from([tokens, 3 * tokens, tokens + 7])
        of_microbatch = [data.draw(generation) for _ in range(microbatches)]
        tokens_N = torch.tensor(of_microbatch).double()[inputs.microbatch_N]
        inputs = inputs._replace(generated_tokens_N=tokens_N)
    loss, (l_gradient_NR, h_gradient_NR), logged = trl_step(s, *stats, inputs, batch.response_length_N)

    own = inputs._replace(
        **{
            name: x * real_NR
            for name, x in inputs._asdict().items()
            if name in {"old_logp_NR", "ref_logp_NR"} and x is not None
        }
    )
    stats = TokenStats(*(x * real_NR for x in stats))
    update, report = loss_update(batch, stats, own, trl_loss(s))
    assert close(-update.coef_NR, l_gradient_NR, 1e-12)
    d_NR = update.entropy_coef_NR
    assert close(0 * h_gradient_NR if d_NR is None else -d_NR, h_gradient_NR, 1e-12)
    assert report.loss == pytest.approx(float(loss), rel=1e-11, abs=1e-13)
    assert report.metrics.pop("loss") == report.loss
    logged.pop("entropy_coef", None)
    assert report.metrics.keys() == logged.keys()
    # TRL counts in float32.
    assert report.metrics == pytest.approx(logged, rel=1e-6, abs=1e-12, nan_ok=True)
    for name in logged.keys() & {"kl", "entropy"}:
        assert report.metrics[name] == pytest.approx(logged[name], rel=1e-12)


@pytest.mark.parametrize("rejected", [False, True])
def test_vespos_weights_at_the_bounds_of_their_logarithms(rejected):
    """Tokens beyond e^±20, a sequence below 1e-8, a token whose correction is 0, against TRL's own."""
    log_ratio_NR = torch.tensor([[25, -24], [-25, 21], [-12, -12], [19, 0]], dtype=torch.float64)
    batch = collate([[2]] * 4, [[1, 1]] * 4, [0, 0, 1, 1])
    stats = TokenStats(torch.full((4, 2), -0.5).double(), torch.ones(4, 2).double())
    old_NR = stats.logp_NR - log_ratio_NR
    inputs = LossInputs(
        advantage_N=torch.tensor([1.0, -0.5, 2.0, -1.5]).double(),
        mask_NR=response_mask(batch),
        prompt_N=batch.prompt_N,
        microbatch_N=torch.zeros(4).long(),
        process_N=torch.zeros(4).long(),
        old_logp_NR=old_NR,
        sampler_logp_NR=old_NR - 2.0 * rejected * torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1]]),
    )
    s = TrlLoss("vespo", use_vllm=True, vllm_importance_sampling_mode="token_mask")
    found_NR = loss_update(batch, stats, inputs, trl_loss(s))[0].coef_NR
    trls_NR = -trl_step(s, *stats, inputs, batch.response_length_N)[1][0]
    assert torch.allclose(found_NR, trls_NR, rtol=1e-12, atol=0)
    # Of weight e^(20 - 20) = 1, an advantage each over 8 tokens: it is not 0 that is compared.
    assert found_NR[0].tolist() == pytest.approx([1 / 8, 1 / 8], rel=1e-12)


def at_ratios(ratio_R, advantage):
    """A response of one token per ratio: l = log r or 0, whichever is a log-probability, exactly."""
    log_ratio_NR = torch.tensor(ratio_R).double().log()[None]
    batch = collate([[2]], [[1] * len(ratio_R)], [0])
    inputs = LossInputs(
        advantage_N=torch.tensor([advantage]).double(),
        mask_NR=response_mask(batch),
        prompt_N=batch.prompt_N,
        microbatch_N=torch.tensor([0]),
        process_N=torch.tensor([0]),
        old_logp_NR=-log_ratio_NR.clamp(min=0),
    )
    l_NR = log_ratio_NR.clamp(max=0)
    assert torch.equal((l_NR - inputs.old_logp_NR).exp()[0], torch.tensor(ratio_R).double())
    return batch, TokenStats(l_NR, torch.ones_like(l_NR)), inputs


@pytest.mark.parametrize(
    ("name", "advantage", "delta", "passes"),
    [
        # r:                                     0.5    0.75     1   1.5    2    4
        ("the gradient passes up to 1.5", 2.0, None, [True, True, True, True, False, False]),
        ("the gradient passes from 0.75", -2.0, None, [False, True, True, True, True, True]),
        ("the gradient passes up to delta", -2.0, 2.0, [False, True, True, True, True, False]),
    ],
)
def test_subgradients_at_a_ratio_of_1_and_at_the_bounds(name, advantage, delta, passes):
    """At r = 1 and at a bound r A and clip(r) A are equal: each gets half of the gradient, A r / z, and
    the clamp passes its half, at the bound too. Beyond a bound it is 0."""
    ratio_R = [0.5, LOW, 1.0, HIGH, 2.0, 4.0]
    batch, stats, inputs = at_ratios(ratio_R, advantage)
    s = TrlLoss("grpo", epsilon=1 - LOW, epsilon_high=HIGH - 1, delta=delta)
    found_R = loss_update(batch, stats, inputs, trl_loss(s))[0].coef_NR[0]
    expected_R = advantage * torch.tensor(ratio_R).double() / 6 * torch.tensor(passes)
    assert torch.allclose(found_R, expected_R, rtol=1e-15, atol=0)  # of one product and one quotient
    trls_R = -trl_step(s, *stats, inputs, batch.response_length_N)[1][0][0]
    assert torch.equal(found_R != 0, trls_R != 0)
    assert torch.allclose(found_R, trls_R, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("loss_type", "normalisation"),
    [("dapo", "token_mean"), ("grpo", "sequence_mean"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize(("microbatches", "processes"), [(1, 1), (4, 1), (2, 2)])
def test_plain_losses_at_a_ratio_of_1_have_the_coefficients_of_the_objective(
    loss_type, normalisation, microbatches, processes
):
    batch, _, stats, inputs = drawn(3, microbatches, processes, 3, 5, masked=False, old=False)
    s = TrlLoss(loss_type, gradient_accumulation_steps=microbatches, max_completion_length=9)
    found_NR = loss_update(batch, stats, inputs, trl_loss(s))[0].coef_NR
    expected_NR = coefficients(
        inputs.advantage_N, batch.response_length_N, batch.prompt_N, normalisation, 9.0
    )
    assert bool(expected_NR.any())
    assert torch.allclose(found_NR, expected_NR, rtol=1e-15, atol=0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("corrected", [False, True])
def test_coefficients_are_minus_the_finite_differences(loss_type, level, corrected):
    """Central differences of step 3e-5: 2e-10 of a third derivative, and rounding of 1e-10.

    CISPO's and VESPO's weights are held fixed, and their losses no functions that c is the slope of.
    """
    batch, _, stats, inputs = drawn(5, 2, 2, 2, 4)
    s = TrlLoss(
        loss_type,
        level,
        epsilon_high=0.33,
        beta=0.3,
        entropy_coef=0.05,
        top_entropy_quantile=0.73,
        use_bias_correction_kl=not corrected,
        use_vllm=corrected,
        vllm_importance_sampling_mode="token_truncate",
        gradient_accumulation_steps=2,
    )
    # Off the bounds, where there is no derivative.
    inputs = inputs._replace(old_logp_NR=inputs.old_logp_NR - 0.012345)
    update, _ = loss_update(batch, stats, inputs, trl_loss(s))
    value = trl_loss(s).function
    for field, found_NR in (("logp_NR", update.coef_NR), ("entropy_NR", update.entropy_coef_NR)):
        assert bool(found_NR.any())
        assert not bool(found_NR[~inputs.mask_NR].any())
        for i, k in inputs.mask_NR.nonzero().tolist():
            unit = torch.zeros_like(stats.logp_NR)
            unit[i, k] = 3e-5
            low, high = (
                float(value(*stats._replace(**{field: getattr(stats, field) + x}), inputs).loss)
                for x in (-unit, unit)
            )
            assert float(found_NR[i, k]) == pytest.approx((low - high) / 6e-5, abs=1e-8)


def test_what_is_outside_the_mask_is_in_nothing():
    """Not even where it overflows, as a placeholder of -1e9 in recorded log-probabilities would."""
    batch, _, stats, inputs = drawn(1, 2, 1, 3, 5)
    s = TrlLoss("grpo", beta=0.1, entropy_coef=0.1, use_vllm=True, gradient_accumulation_steps=2)
    update, report = loss_update(batch, stats, inputs, trl_loss(s))
    outside = {
        name: torch.where(inputs.mask_NR, getattr(inputs, name), x)
        for name, x in (("old_logp_NR", -1e9), ("ref_logp_NR", 1e9), ("sampler_logp_NR", math.nan))
    }
    changed, same = loss_update(batch, stats, inputs._replace(**outside), trl_loss(s))
    assert same == report
    assert torch.equal(changed.coef_NR, update.coef_NR)


def test_the_token_of_highest_entropy_is_kept_though_its_float32_is_larger():
    h_NR = torch.tensor([[0.05, 0.1, 0.02]], dtype=torch.float64)
    assert h_NR[0, 1] < h_NR[0, 1].float()
    batch, stats, inputs = at_ratios([1.0, 1.0, 1.0], 1.0)
    s = TrlLoss("grpo", top_entropy_quantile=0.0)
    update, _ = loss_update(batch, stats._replace(entropy_NR=h_NR), inputs, trl_loss(s))
    assert update.coef_NR.ne(0).tolist() == [[False, True, False]]


def test_names_and_defaults_are_those_of_grpoconfig():
    trls = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert TrlLoss()._asdict() == {name: trls[name] for name in TrlLoss._fields}


def test_settings_can_be_validated_by_their_types():
    adapter = TypeAdapter(TrlLoss)
    assert adapter.validate_python({"loss_type": "sapo", "beta": 0.1}) == TrlLoss("sapo", beta=0.1)
    for wrong in ({"loss_type": "ppo"}, {"importance_sampling_level": "turn"}, {"beta": "much"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo', expected one of grpo, dapo"),
        ({"importance_sampling_level": "turn"}, "'turn', expected one of token, sequence"),
        ({"vllm_importance_sampling_mode": "clip"}, "'clip', expected one of token_truncate"),
        ({"top_entropy_quantile": 1.5}, "is 1.5, expected 0 to 1"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg is 0.0, expected a positive"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "dr_grpo divides by it"),
        ({"loss_type": "vespo", "use_vllm": True}, "expected token_truncate or token_mask"),
        (
            {
                "loss_type": "vespo",
                "use_vllm": True,
                "vllm_importance_sampling_mode": "token_mask",
                "vllm_importance_sampling_clip_max": 0.9,
            },
            "vespo needs 1 between them",
        ),
    ],
)
def test_settings_that_do_not_fit_are_rejected(wrong, match):
    with pytest.raises(InputError, match=match):
        trl_loss(TrlLoss(**wrong))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"vllm_importance_sampling_clip_min": 3.0}, "expected the first to be less"),
        (
            {
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            "set at least one",
        ),
    ],
)
def test_what_grpoconfig_rejects_is_rejected(tmp_path, wrong, match):
    with pytest.raises(ValueError, match="vllm_importance_sampling"):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **wrong)
    with pytest.raises(InputError, match=match):
        trl_loss(TrlLoss(**wrong))


@pytest.mark.parametrize(
    ("changed", "given", "match"),
    [
        ({"beta": 0.1}, {"ref_logp_NR": None}, "beta is 0.1, and there is no ref_logp"),
        ({"use_vllm": True}, {"sampler_logp_NR": None}, "correction needs the sampler's"),
        (
            {
                "use_vllm": True,
                "vllm_importance_sampling_correction": False,
                "off_policy_mask_threshold": 0.1,
            },
            {"sampler_logp_NR": None},
            "off_policy_mask_threshold needs the sampler's",
        ),
        (
            {"gradient_accumulation_steps": 1},
            {},
            "of 2 micro-batches, and gradient_accumulation_steps is 1",
        ),
        (
            {"steps_per_generation": 4},
            {},
            "of 4 micro-batches, and the step has 2: give generated_tokens",
        ),
        ({"gradient_accumulation_steps": 4}, {}, "of 4 micro-batches, and the step has 2"),
        ({}, {"process_N": torch.tensor([0, 0, 0, 1])}, "3 pairs of micro-batch and process"),
        ({}, {"microbatch_N": torch.tensor([1, 1, 1, 1])}, "1 pairs of micro-batch and process"),
    ],
)
def test_arrays_that_do_not_fit_are_rejected(changed, given, match):
    batch, _, stats, inputs = drawn(0, 2, 1, 2, 3)
    s = TrlLoss(**{"gradient_accumulation_steps": 2, **changed})
    with pytest.raises(InputError, match=match):
        loss_update(batch, stats, inputs._replace(**given), trl_loss(s))


@pytest.mark.parametrize("loss_type", TYPES)
def test_divisors_of_the_error_are_those_of_the_loss(loss_type):
    loss = trl_loss(TrlLoss(loss_type))
    whole = {"dapo", "bnpo", "cispo", "vespo"}
    assert loss.divisor == ("tokens" if loss_type in whole else "sequences")
    assert loss.entropy_divisor == "tokens"
