"""TRL's losses against TRL's own `_compute_loss` on the same arrays, and against finite differences."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from support.trl_step import trl_step
from trl import GRPOConfig

from funcprobe import InputError, LossInputs, TokenStats, coefficients, loss_update
from funcprobe.losses.trl import TrlLoss, trl_loss
from funcprobe.policy.layout import collate, response_mask

TYPES = ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOW, HIGH = 0.75, 1.5  # epsilon = 1/4 and 1/2: bounds that are exact, and e^(log bound) is, too


def any_settings(loss_type):
    modes = MODES[:2] if loss_type == "vespo" else MODES
    choices = {
        "loss_type": st.just(loss_type),
        "importance_sampling_level": st.sampled_from(["token", "sequence"]),
        "epsilon": st.just(1 - LOW),
        "epsilon_high": st.sampled_from([None, HIGH - 1]),
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
    """Arrays of a step: ragged responses, masked tokens and sequences, advantages of 0, ratios at bounds.

    Entropies are numbers of float32, as in TRL, where a threshold can be one of them; the sampler's are,
    too. Advantages are 0 for every third prompt.
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
@settings(deadline=None, max_examples=40)
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
    # A last step of an epoch may have fewer micro-batches than the setting, a generation may have more.
    last = data.draw(st.sampled_from([1, 2]))
    s = s._replace(gradient_accumulation_steps=last * microbatches)
    tokens = float(inputs.mask_NR.sum())
    if last == 2 or data.draw(st.booleans()):
        # Powers of two, by which TRL's divisor in float32 is exact.
        s = s._replace(steps_per_generation=data.draw(st.sampled_from([microbatches, 8])))
        inputs = inputs._replace(generated_tokens=data.draw(st.sampled_from([tokens, 3 * tokens])))
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
    assert close(torch.zeros_like(real_NR) if d_NR is None else -d_NR, h_gradient_NR, 1e-12)
    assert report.loss == pytest.approx(float(loss), rel=1e-11, abs=1e-13)
    assert report.metrics.pop("loss") == report.loss
    logged.pop("entropy_coef", None)
    assert report.metrics.keys() == logged.keys()
    # TRL counts in float32.
    assert report.metrics == pytest.approx(logged, rel=1e-6, abs=1e-12, nan_ok=True)
    for name in logged.keys() & {"kl", "entropy"}:
        assert report.metrics[name] == pytest.approx(logged[name], rel=1e-12)
