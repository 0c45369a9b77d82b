"""verl's losses against loops with derivatives in closed form, and against finite differences."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from funcprobe import InputError, LossInputs, TokenStats, loss_update
from funcprobe.losses.verl import VerlLoss, verl_loss
from funcprobe.losses.verl_settings import KL_TYPES, REJECTIONS, LossAggMode, LossMode
from funcprobe.policy.layout import collate
from support import verl_loops

MODES = get_args(LossMode)
AGGREGATES = get_args(LossAggMode)
# Sums of fewer than 100 terms in float64; a log-ratio of 30 gives its exponential 30 ulps.
RELATIVE = 1e-10


class Case:
    """Arrays of a step: rows of `calls` micro-batches on each of `processes`."""

    def __init__(self, lengths, advantages, masked, seed=0, scale=0.3, calls=1, processes=1):
        N, generator = len(lengths), torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.batch = collate([[1]] * N, [[2] * T for T in lengths], list(range(N)))
        real_NR = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

        def table(low, high):
            return real_NR * (
                low + (high - low) * torch.rand(real_NR.shape, generator=generator).double()
            )

        # Two log-probabilities differ by up to `scale`: the ratio passes every bound of the losses.
        self.stats = TokenStats(table(-0.01 - scale, -0.01), table(0.05, 2))
        mask_NR = real_NR.clone()
        for i, k in masked:
            mask_NR[i % N, k % real_NR.shape[1]] = False
        each = torch.arange(N) % (calls * processes)
        self.inputs = LossInputs(
            torch.tensor(advantages).double(),
            mask_NR,
            prompt_N=torch.arange(N),
            microbatch_N=each // processes,
            process_N=each % processes,
            old_logp_NR=table(-0.01 - scale, -0.01),
            ref_logp_NR=table(-0.01 - scale, -0.01),
            sampler_logp_NR=table(-0.01 - scale, -0.01),
        )

    def value(self, asked, logp_NR=None, entropy_NR=None):
        l_NR = self.stats.logp_NR if logp_NR is None else logp_NR
        return verl_loss(asked).function(
            l_NR, self.stats.entropy_NR if entropy_NR is None else entropy_NR, self.inputs
        )

    def update(self, asked):
        return loss_update(self.batch, self.stats, self.inputs, verl_loss(asked))


def fixed(**inputs):
    """Five responses in two micro-batches, all signs of A, the whole of the fourth masked."""
    case = Case([3, 1, 4, 2, 5], [1.0, -0.5, 0.0, 2.0, -1.5], [(0, 1), (3, 0), (3, 1), (4, 4)], calls=2)
    case.inputs = case.inputs._replace(**inputs)
    return case


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    N = len(lengths)
    case = Case(
        lengths,
        draw(st.lists(st.sampled_from([-2.0, -0.7, 0.0, 0.4, 1.3]), min_size=N, max_size=N)),
        draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=6)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([0.1, 0.6, 3.0, 30.0])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
    )
    assume(bool(case.inputs.mask_NR.any()))
    if draw(st.booleans()):
        # Ratios of exactly 1, where |x| and clip ranges of 0 have their kinks.
        case.inputs = case.inputs._replace(old_logp_NR=None, ref_logp_NR=case.stats.logp_NR)
    return case


@st.composite
def asked_of(draw, mode):
    def one_of(*choices):
        return draw(st.sampled_from(choices))

    asked = VerlLoss(
        loss_mode=mode,
        clip_ratio=0.1,
        clip_ratio_low=one_of(None, 0.0, 0.2, 0.05),
        clip_ratio_high=one_of(None, 0.0, 0.28),
        clip_ratio_c=one_of(3.0, 1.2),
        loss_agg_mode=one_of(*AGGREGATES),
        loss_scale_factor=one_of(None, 7.0),
        global_batch_size=one_of(None, 8),
        entropy_coeff=one_of(0.0, 0.02, -0.3),
        use_kl_loss=one_of(False, True),
        kl_loss_coef=0.4,
        kl_loss_type=one_of(*KL_TYPES, *(f"{kind}+" for kind in KL_TYPES)),
        clip_cov_ratio=one_of(0.0002, 0.3),
        clip_cov_lb=one_of(-0.05, 0.02),
        clip_cov_ub=one_of(5.0, 0.3),
        kl_cov_ratio=one_of(0.0002, 0.4, 1.0),
        dro_beta=0.7,
        loss_type=one_of("ppo_clip", "reinforce"),
    )
    if one_of(False, True):
        rollout_is, threshold = one_of("token", "sequence"), one_of(2.0, "1.1", "0.7_1.3")
        asked = asked._replace(rollout_is=rollout_is, rollout_is_threshold=threshold)
        asked = asked._replace(rollout_is_batch_normalize=one_of(False, True))
    if one_of(False, True):
        criterion = one_of(*REJECTIONS)
        threshold = one_of(1.3, "0.6_1.2") if criterion.endswith("k1") else one_of(0.02, 1.0)
        asked = asked._replace(rollout_rs=criterion, rollout_rs_threshold=threshold)
    return asked


def near(found, expected, scale):
    return math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=RELATIVE * max(1.0, scale))


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_loss_coefficients_and_metrics_are_those_of_the_loops(mode, steps):
    """On random steps: lengths of 1, rows without advantage, masked tokens and rows."""

    @settings(max_examples=steps, deadline=None)
    @given(cases(), asked_of(mode))
    def check(case, asked):
        try:
            expected = verl_loops.step(asked, *case.stats, case.inputs, case.lengths)
        except verl_loops.AmbiguousError:
            assume(False)
        update, report = case.update(asked)
        scale = max(map(abs, (expected.loss, *expected.by_logp.values(), *expected.metrics.values())))
        assert near(report.loss, expected.loss, scale)
        assert report.metrics.keys() == expected.metrics.keys()
        for name, found in report.metrics.items():
            assert near(found, expected.metrics[name], scale), name
        d_NR = update.entropy_coef_NR
        d_NR = torch.zeros_like(update.coef_NR) if d_NR is None else d_NR
        for i, k in itertools.product(*map(range, update.coef_NR.shape)):
            assert near(float(update.coef_NR[i, k]), -expected.by_logp.get((i, k), 0.0), scale), (i, k)
            assert near(float(d_NR[i, k]), -expected.by_entropy.get((i, k), 0.0), scale), (i, k)

    check()


SMOOTH = {
    "vanilla": {},
    "sapo": {},
    "gpg": {},
    "dro": {"dro_beta": 0.7},
    "geo_mean": {},
    "kl_cov": {"kl_cov_ratio": 0.4},
    "clip_cov": {"clip_cov_lb": -0.2, "clip_cov_ratio": 0.3},
}


@pytest.mark.parametrize("mode", SMOOTH)
@pytest.mark.parametrize("kind", KL_TYPES)
def test_coefficients_are_minus_the_finite_differences(mode, kind):
    """Of the losses without a part held fixed. Central differences of step 1e-5: the third derivatives
    are below 10, so that they err by 1e-9 at most, and no kink is that close to these arrays."""
    asked = VerlLoss(
        loss_mode=mode, use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type=kind, entropy_coeff=0.3
    )
    asked, case = asked._replace(**SMOOTH[mode]), fixed()
    update, _ = case.update(asked)
    for name, found_NR in (("logp_NR", update.coef_NR), ("entropy_NR", update.entropy_coef_NR)):
        for i, k in itertools.product(range(5), range(5)):
            unit_NR = torch.zeros(5, 5).double()
            unit_NR[i, k] = 1e-5
            low, high = (
                float(case.value(asked, **{name: getattr(case.stats, name) + sign * unit_NR}).loss)
                for sign in (-1, 1)
            )
            assert abs(float(found_NR[i, k]) + (high - low) / 2e-5) < 1e-8, (i, k)


def derivative(asked, x, A=1.0, ref=None):
    """Of the loss of one token in l, where log r is exactly x, and l - l_ref exactly `ref`."""
    case = Case([1], [A], [])
    zero_NR = torch.zeros(1, 1).double()
    case.stats = case.stats._replace(logp_NR=zero_NR)
    case.inputs = case.inputs._replace(
        old_logp_NR=zero_NR - x, ref_logp_NR=None if ref is None else zero_NR - ref
    )
    return -float(case.update(asked)[0].coef_NR)


def test_at_a_bound_of_the_clip_the_derivative_is_that_of_the_inside():
    """Clip ranges of 0 put both bounds at the ratio 1, which exp(0) is exactly."""
    none = VerlLoss(clip_ratio_low=0.0, clip_ratio_high=0.0)
    for mode in ("vanilla", "gspo", "clip_cov"):
        for A in (1.0, -1.0):
            assert derivative(none._replace(loss_mode=mode), 0.0, A) == -A
    assert derivative(none, 1e-9) == derivative(none, -1e-9, -1.0) == 0
    geo = VerlLoss(loss_mode="geo_mean", clip_ratio_low=0.25, clip_ratio_high=0.5)
    assert derivative(geo, 0.5) == pytest.approx(-math.exp(0.5), rel=1e-15)
    assert derivative(geo, -0.25, -1.0) == pytest.approx(math.exp(-0.25), rel=1e-15)
    assert derivative(geo, 0.5 + 1e-9) == derivative(geo, -0.25 - 1e-9, -1.0) == 0


def test_at_the_bound_of_the_dual_clip_the_derivative_is_half_that_of_the_inside():
    c = float(torch.tensor([[1.25]]).double().exp())
    dual = VerlLoss(clip_ratio_c=c)
    assert derivative(dual, 1.25, -1.0) == pytest.approx(c / 2, rel=1e-15)
    assert derivative(dual, 1.25 - 1e-9, -1.0) == pytest.approx(c, rel=1e-8)
    assert derivative(dual, 1.25 + 1e-9, -1.0) == 0


def test_the_log_ratio_is_bounded_where_verl_bounds_it():
    wide = VerlLoss(clip_ratio_low=0.5, clip_ratio_high=1e12, clip_ratio_c=1e12)
    assert derivative(wide, 20.0) == pytest.approx(-math.exp(20), rel=1e-14)
    assert derivative(wide, 20.5) == 0
    assert derivative(wide._replace(loss_mode="clip_cov"), 20.5) == pytest.approx(
        -math.exp(20.5), rel=1e-14
    )
    assert derivative(wide._replace(loss_mode="gspo"), 10.5) == 0
    assert derivative(wide._replace(loss_mode="gspo"), 9.5) == pytest.approx(-math.exp(9.5), rel=1e-14)


@pytest.mark.parametrize(
    ("kind", "x", "expected"),
    [
        ("kl", 0.5, 1.0),
        ("k1", -0.5, 1.0),
        ("k1+", 0.5, 0.5),
        ("abs", -0.5, -1.0),
        ("abs", 0.0, 0.0),
        ("abs+", -0.5, -0.5),
        ("mse", -0.5, -0.5),
        ("k2+", -0.5, -0.5),
        ("k3", 0.5, 1 - math.exp(-0.5)),
        ("low_var_kl", -3.0, 0.0),  # the estimate is 16, above its bound of 10
        ("low_var_kl", -2.0, 1 - math.exp(2)),
        ("low_var_kl", 20.5, 0.0),
        ("low_var_kl+", -3.0, -3.0),
    ],
)
def test_derivative_of_the_kl_estimates(kind, x, expected):
    asked = VerlLoss(loss_mode="gpg", use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=kind)
    assert derivative(asked, 0.0, A=0.0, ref=x) == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_clip_cov_is_the_mean_over_verls_draws():
    """Every set of candidates that may be dropped, and the loss without it, in full."""
    case = Case([4, 5, 3], [1.0, -1.5, 0.3], [(1, 2)], seed=5, scale=1.0)
    asked = VerlLoss("clip_cov", 0.6, None, None, clip_cov_lb=-0.2, clip_cov_ratio=0.3)
    logp, A = case.stats.logp_NR.tolist(), case.inputs.advantage_N.tolist()
    tokens = [(int(i), int(k)) for i, k in case.inputs.mask_NR.nonzero()]
    x = {(i, k): logp[i][k] - float(case.inputs.old_logp_NR[i, k]) for i, k in tokens}
    candidates = verl_loops.clip_cov_candidates(asked, tokens, x, logp, A)
    number = int(0.3 * len(tokens))
    assert 1 < number < len(candidates)
    losses, derivatives = [], []
    for dropped in itertools.combinations(sorted(candidates), number):
        kept = {
            at: verl_loops.clip(asked, A[at[0]], *[math.exp(x[at])] * 2)
            for at in tokens
            if at not in dropped
        }
        losses.append(sum(value for value, _, _ in kept.values()) / len(tokens))
        derivatives.append({at: slope / len(tokens) for at, (_, slope, _) in kept.items()})
    update, report = case.update(asked)
    assert report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-13)
    for at in tokens:
        mean = sum(found.get(at, 0.0) for found in derivatives) / len(derivatives)
        assert float(update.coef_NR[at]) == pytest.approx(-mean, rel=1e-13, abs=1e-15)
    assert report.metrics["actor/pg_clipfrac"] == pytest.approx(number / len(tokens), rel=1e-14)


@pytest.mark.parametrize("mode", [m for m in MODES if m not in {"geo_mean", "clip_cov", "kl_cov"}])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_split_into_micro_batches_and_processes_does_not_matter(mode, aggregate):
    asked = VerlLoss(
        loss_mode=mode, loss_agg_mode=aggregate, loss_scale_factor=9.0, dro_beta=1.0, entropy_coeff=0.1
    )
    whole, split = (
        fixed(microbatch_N=torch.zeros(5).long()),
        fixed(process_N=torch.tensor([1, 0, 0, 1, 0])),
    )
    (one, report), (other, reported) = whole.update(asked), split.update(asked)
    torch.testing.assert_close(one.coef_NR, other.coef_NR, rtol=1e-13, atol=1e-15)
    assert report.loss == pytest.approx(reported.loss, rel=1e-13)


def test_geo_mean_is_a_mean_of_every_micro_batch_and_their_sum():
    """Two micro-batches on one process add up, on two processes they are averaged."""
    asked, halves = VerlLoss(loss_mode="geo_mean"), torch.tensor([0, 0, 1, 1, 1])
    one = fixed(microbatch_N=halves)
    two = fixed(microbatch_N=torch.zeros(5).long(), process_N=halves)
    assert one.update(asked)[1].loss == pytest.approx(2 * two.update(asked)[1].loss, rel=1e-14)


def test_without_a_scale_factor_the_longest_response_of_every_micro_batch_divides():
    """Its masked tokens count: the last token of the fifth response, and the whole of the fourth."""
    asked = VerlLoss(loss_mode="gpg", loss_agg_mode="seq-mean-token-sum-norm")
    for calls, longest in (
        ([0, 0, 0, 0, 1], [4, 4, 4, 4, 5]),
        ([0, 1, 2, 2, 2], [3, 1, 5, 5, 5]),
        ([1, 0, 1, 2, 3], [4, 1, 4, 2, 5]),
    ):
        case = fixed(microbatch_N=torch.tensor(calls))
        c_NR, A_N = case.update(asked)[0].coef_NR, case.inputs.advantage_N
        expected_NR = (A_N / (5 * torch.tensor(longest)))[:, None] * case.inputs.mask_NR
        torch.testing.assert_close(c_NR, expected_NR, rtol=1e-14, atol=0)


def test_what_stands_off_the_mask_has_no_effect():
    asked = VerlLoss(
        use_kl_loss=True,
        entropy_coeff=0.1,
        rollout_is="sequence",
        rollout_rs="seq_max_k2",
        rollout_rs_threshold=1.0,
    )
    plain, spoiled = fixed(), fixed()
    off_NR = ~plain.inputs.mask_NR
    names = ("old_logp_NR", "ref_logp_NR", "sampler_logp_NR")
    spoiled.inputs = plain.inputs._replace(
        **{name: getattr(plain.inputs, name).masked_fill(off_NR, math.nan) for name in names}
    )
    found, expected = (verl_loss(asked).function(*plain.stats, x.inputs) for x in (spoiled, plain))
    assert found.loss == expected.loss
    assert found.metrics == expected.metrics


def test_rejected_tokens_still_count_in_the_token_mean():
    """verl counts the mini-batch's tokens in its mask from before the rejection."""
    asked = VerlLoss(loss_mode="gpg", rollout_rs="token_k2", rollout_rs_threshold=0.005)
    case = fixed()
    inputs = case.inputs
    kept_NR = inputs.mask_NR & ((inputs.old_logp_NR - inputs.sampler_logp_NR).square() / 2 <= 0.005)
    assert 0 < int(kept_NR.sum()) < int(inputs.mask_NR.sum())
    expected_NR = inputs.advantage_N[:, None] * kept_NR / inputs.mask_NR.sum()
    torch.testing.assert_close(case.update(asked)[0].coef_NR, expected_NR, rtol=1e-14, atol=0)


def test_bypass_mode_normalises_over_a_micro_batch_of_all_processes():
    calls = torch.tensor([0, 0, 1, 1, 1])
    asked = VerlLoss(loss_mode="bypass_mode", loss_type="reinforce", rollout_is="token")
    asked = asked._replace(rollout_is_batch_normalize=True, rollout_is_threshold=9.0)
    case = fixed(microbatch_N=calls, process_N=torch.tensor([0, 1, 0, 0, 1]))
    c_NR, inputs = case.update(asked)[0].coef_NR, case.inputs
    ratio_NR = (case.stats.logp_NR - inputs.sampler_logp_NR).exp()
    for call in (0, 1):
        rows_N = calls == call
        mean = ratio_NR[rows_N][inputs.mask_NR[rows_N]].mean()
        expected_NR = (
            inputs.advantage_N[:, None] * ratio_NR / mean * inputs.mask_NR / inputs.mask_NR.sum()
        )
        torch.testing.assert_close(c_NR[rows_N], expected_NR[rows_N], rtol=1e-13, atol=0)


def test_divisors_follow_the_aggregation():
    def divisors(**asked):
        return verl_loss(VerlLoss(**asked))[1:3]

    assert divisors() == ("tokens", "tokens")
    assert divisors(loss_agg_mode="token-sum") == ("sequences", "sequences")
    assert divisors(loss_agg_mode="seq-mean-token-mean") == ("sequences", "sequences")
    for mode in ("sapo", "geo_mean"):
        assert divisors(loss_mode=mode) == ("sequences", "tokens")


def test_defaults_are_verls():
    """verl 0.9.1, verl/trainer/config/actor/actor.yaml and algorithm/rollout_correction.yaml."""
    assert VerlLoss()._asdict() == {
        "loss_mode": "vanilla",
        "clip_ratio": 0.2,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.2,
        "clip_ratio_c": 3.0,
        "loss_agg_mode": "token-mean",
        "loss_scale_factor": None,
        "global_batch_size": None,
        "entropy_coeff": 0,
        "use_kl_loss": False,
        "kl_loss_coef": 0.001,
        "kl_loss_type": "low_var_kl",
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "clip_cov_ratio": 0.0002,
        "clip_cov_lb": 1.0,
        "clip_cov_ub": 5.0,
        "kl_cov_ratio": 0.0002,
        "ppo_kl_coef": 0.1,
        "dro_beta": None,
        "rollout_is": None,
        "rollout_is_threshold": 2.0,
        "rollout_is_batch_normalize": False,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
        "loss_type": "ppo_clip",
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"loss_mode": "ppo"}, "unknown loss_mode 'ppo': expected one of vanilla, "),
        ({"loss_agg_mode": "mean"}, "unknown loss_agg_mode 'mean'"),
        ({"use_kl_loss": True, "kl_loss_type": "full"}, "unknown kl_loss_type 'full'"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c is 1, expected more than 1"),
        ({"loss_mode": "bypass_mode", "clip_ratio_c": 0.5}, "clip_ratio_c is 0.5"),
        ({"loss_mode": "bypass_mode", "loss_type": "pg"}, "unknown loss_type 'pg'"),
        ({"loss_mode": "dro"}, "dro_beta is None"),
        ({"loss_mode": "dro", "dro_beta": -1.0}, "dro_beta is -1, expected a positive number"),
        ({"loss_mode": "sapo", "tau_neg": 0.0}, "tau_neg is 0"),
        ({"loss_mode": "clip_cov", "clip_cov_ratio": 0.0}, "clip_cov_ratio is 0"),
        ({"loss_mode": "kl_cov", "kl_cov_ratio": 0.0}, "kl_cov_ratio is 0"),
        ({"loss_mode": "kl_cov", "kl_cov_ratio": 1.5}, "kl_cov_ratio is 1.5, expected at most 1"),
        ({"loss_scale_factor": 0.0}, "loss_scale_factor is 0"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"entropy_coeff": math.nan}, "entropy_coeff is nan, expected a finite number"),
        ({"rollout_is": "geometric"}, "unknown rollout_is 'geometric'"),
        ({"rollout_is": "token", "rollout_is_threshold": "2_1"}, "expected positive finite bounds"),
        ({"rollout_is": "token", "rollout_is_threshold": "much"}, "rollout_is_threshold is 'much'"),
        ({"rollout_rs": "token_k4", "rollout_rs_threshold": 1.0}, "unknown rollout_rs 'token_k4'"),
        ({"rollout_rs": "token_k1"}, "rollout_rs_threshold has 0 thresholds for 1 criteria"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "1,2"}, "2 thresholds for 1 criteria"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 0.5}, "expected positive finite bounds"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"}, "expected one upper bound"),
    ],
)
def test_a_setting_that_verl_rejects_is_an_input_error(asked, message):
    with pytest.raises(InputError) as error:
        verl_loss(VerlLoss(**asked))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "inputs", "message"),
    [
        ({"use_kl_loss": True}, {"ref_logp_NR": None}, "use_kl_loss needs ref_logp_NR"),
        (
            {"loss_mode": "bypass_mode"},
            {"sampler_logp_NR": None},
            '"bypass_mode" needs sampler_logp_NR',
        ),
        ({"rollout_is": "token"}, {"sampler_logp_NR": None}, "needs sampler_logp_NR"),
        (
            {"rollout_is": "token"},
            {"sampler_logp_NR": torch.full((5, 5), math.nan)},
            "some are not finite",
        ),
        ({}, {"mask_NR": torch.zeros(5, 5).bool()}, "no token of U is in the loss"),
    ],
)
def test_a_missing_array_is_an_input_error(asked, inputs, message):
    with pytest.raises(InputError) as error:
        fixed(**inputs).update(VerlLoss(**asked))
    assert message in str(error.value)
