"""A user's loss: its coefficients against finite differences, and every check of the function."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe
from funcprobe import InputError, LossInputs, LossValue, TokenStats
from funcprobe.losses.custom import custom_loss
from funcprobe.policy.layout import collate, response_mask

STEP = 1e-5


def drawn(lengths, prompt_of, seed):
    """U with responses of these lengths, its statistics, and inputs that all differ."""
    U = collate([[1]] * len(lengths), [[2] * T for T in lengths], prompt_of)
    real_NR = response_mask(U)
    generator = torch.Generator().manual_seed(seed)

    def table(low, high):
        x_NR = torch.rand(real_NR.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * x_NR) * real_NR

    stats = TokenStats(table(-3, -0.1), table(0.1, 2))
    mask_NR = real_NR & (table(0, 1) > 0.1)
    mask_NR[:, 0] = True
    inputs = LossInputs(
        advantage_N=torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        mask_NR=mask_NR,
        prompt_N=U.prompt_N,
        microbatch_N=(microbatch_N := torch.arange(len(lengths)) % 2),
        process_N=torch.zeros(len(lengths), dtype=torch.long),
        old_logp_NR=stats.logp_NR + 0.2 * table(-1, 1),
        ref_logp_NR=stats.logp_NR + 0.5 * table(-1, 1),
        sampler_logp_NR=stats.logp_NR + 0.1 * table(-1, 1),
        generated_tokens_N=(sum(lengths) + 3 + microbatch_N).double(),
    )
    return U, stats, inputs


def toy():
    return drawn([3, 1, 4, 2], [0, 0, 1, 1], seed=0)


def update_of(function, arrays=None):
    U, stats, inputs = arrays or toy()
    return funcprobe.loss_update(U, stats, inputs, custom_loss(function))


def by_token(weight):
    """-sum_ik weight(l - old) A / tokens, and the mean entropy as a metric."""

    def loss(logp, entropy, batch):
        x_NR = weight(logp - batch.old_logp_NR) * batch.advantage_N[:, None]
        tokens = batch.mask_NR.sum()
        return -(x_NR * batch.mask_NR).sum() / tokens, {
            "entropy": (entropy * batch.mask_NR).sum() / tokens
        }

    return loss


def gated(logp, entropy, batch):
    """A sigmoid of the ratio, by sequences, and a bonus of the entropy's root."""
    gate_NR = torch.sigmoid(3 * ((logp - batch.sampler_logp_NR).exp() - 1))
    sum_N = (gate_NR * batch.advantage_N[:, None] * batch.mask_NR).sum(1)
    bonus_N = (torch.where(batch.mask_NR, entropy, 1.0).sqrt() * batch.mask_NR).sum(1)
    bonus = (bonus_N / batch.generated_tokens_N).sum()
    return LossValue(-(sum_N / batch.mask_NR.sum(1)).mean() - 0.1 * bonus)


def by_sequence(logp, entropy, batch):
    """The geometric mean of the ratios, a KL term to the reference, h against l."""
    mask_NR, tokens_N = batch.mask_NR, batch.mask_NR.sum(1)
    mean_N = ((logp - batch.old_logp_NR) * mask_NR).sum(1) / tokens_N
    gap_NR = (batch.ref_logp_NR - logp) * mask_NR
    kl = (gap_NR.exp() - gap_NR - 1).sum() / tokens_N.sum()
    return -(mean_N.exp() * batch.advantage_N).mean() + 0.3 * kl - (entropy * logp * mask_NR).mean(0)[0]


LOSSES = (by_token(torch.exp), by_token(torch.sin), gated, by_sequence)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    seed=st.integers(0, 2**32),
    function=st.sampled_from(LOSSES),
    prompts=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_coefficients_are_minus_the_finite_differences(lengths, seed, function, prompts):
    """Central differences at 1e-5: 1e-10 times a third derivative of order 1, and rounding of 1e-11."""
    U, stats, inputs = drawn(lengths, [i % prompts for i in range(len(lengths))], seed)
    update, report = update_of(function, (U, stats, inputs))

    def value(**changed):
        found = function(*stats._replace(**changed), inputs)
        return float(found[0] if isinstance(found, tuple) else found)

    assert report.loss == value()
    d_NR = update.entropy_coef_NR
    coefs = {
        "logp_NR": update.coef_NR,
        "entropy_NR": torch.zeros_like(stats[1]) if d_NR is None else d_NR,
    }
    for name, found_NR in coefs.items():
        for i, k in torch.cartesian_prod(*(torch.arange(n) for n in found_NR.shape)).tolist():
            unit = torch.zeros_like(found_NR)
            unit[i, k] = STEP
            low, high = (value(**{name: getattr(stats, name) + s * unit}) for s in (-1, 1))
            assert float(found_NR[i, k]) == pytest.approx(-(high - low) / (2 * STEP), abs=1e-8)


def test_every_way_to_return_a_loss():
    def plain(logp, entropy, batch):
        return (logp * batch.mask_NR).sum()

    ways = {
        "scalar": plain,
        "pair": lambda *given: (plain(*given), {"a": given[0].sum(), "b": 2}),
        "value": lambda *given: LossValue(plain(*given), {"a": given[0].sum(), "b": torch.tensor(2)}),
        "settings": functools.partial(lambda x, y, z, *, scale: scale * plain(x, y, z), scale=1.0),
    }
    reports = {way: update_of(function)[1] for way, function in ways.items()}
    logp_NR = toy()[1].logp_NR
    assert {report.loss for report in reports.values()} == {float((logp_NR * toy()[2].mask_NR).sum())}
    assert reports["pair"].metrics == reports["value"].metrics == {"a": float(logp_NR.sum()), "b": 2.0}
    assert reports["scalar"].metrics == reports["settings"].metrics == {}


def test_a_loss_that_has_no_gradient_here_is_one():
    """Equal rewards: a zero gradient, of a loss that depends on l."""
    U, stats, inputs = toy()
    inputs = inputs._replace(advantage_N=torch.zeros(4).double())
    update, _ = update_of(LOSSES[0], (U, stats, inputs))
    assert not update.moves
    assert update.normaliser_N.tolist() == [0.25] * 4


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        raise KeyError("behind")


def masked(logp, batch):
    return (logp * batch.mask_NR).sum()


def in_place(logp, entropy, batch):
    batch.advantage_N.sub_(1)
    return masked(logp, batch)


def behind_numpy(logp, entropy, batch):
    batch.advantage_N.numpy()[0] = 0
    return masked(logp, batch)


def behind_detach(logp, entropy, batch):
    logp.detach().exp_()
    return masked(logp, batch)


def assigned(logp, entropy, batch):
    logp[0, 0] = 0
    return masked(logp, batch)


def raising(logp, entropy, batch):
    raise ZeroDivisionError("on\ntwo lines")


def random(logp, entropy, batch):
    return masked(logp * torch.rand_like(logp), batch)


def counted(logp, entropy, batch, calls=[]):  # noqa: B006
    calls.append(1)
    return masked(logp, batch) + len(calls)


def rooted(logp, entropy, batch):
    return masked((logp - logp.detach()).sqrt(), batch)


def without_graph(logp, entropy, batch):
    with torch.no_grad():
        return masked(logp, batch)


def mean_of_array(logp, entropy, batch):
    return (logp * batch.mask_NR).mean()


def behind_the_end(logp, entropy, batch):
    return masked(logp, batch) * (1 + entropy.detach().max())


def value_behind_the_end(logp, entropy, batch):
    return masked(logp, batch) + entropy.detach().sum()


DETACHED = "no function of logp and entropy that torch can differentiate"
TRACED = "use torch operations alone"
REJECTED = {
    "too few": (
        lambda logp, entropy: logp.sum(),
        "cannot be called with .logp, entropy, batch.: too many",
    ),
    "too many": (lambda a, b, c, d: a.sum(), "loss '<lambda>' cannot be called with .*'d'"),
    "no such setting": (
        functools.partial(raising, beta=1),
        "loss 'raising' cannot be called .*argument 'beta'",
    ),
    "no signature": (3, "loss 'int' cannot be called"),
    "exception": (raising, "loss 'raising' raised ZeroDivisionError: on two lines$"),
    "exit": (lambda a, b, c: exit(3), "raised SystemExit: 3$"),
    "exception behind": (lambda a, b, c: Raising.apply(a).sum(), "raised KeyError: 'behind'"),
    "without setup_context": (lambda a, b, c: Old.apply(a).sum(), TRACED),
    "numpy": (lambda a, b, c: masked(a, c) * a.numpy().sum(), TRACED),
    "detached numpy": (lambda a, b, c: masked(a, c) * a.detach().numpy().sum(), TRACED),
    "backward": (lambda a, b, c: masked(a, c).backward(), TRACED),
    "nothing": (lambda a, b, c: None, "returned NoneType, expected a scalar tensor, or"),
    "a list": (lambda a, b, c: [a.sum()], "returned list, expected a scalar tensor"),
    "three": (lambda a, b, c: (a.sum(), {}, {}), "returned tuple, expected a scalar tensor"),
    "a number": (lambda a, b, c: masked(a, c).item(), "returned float, .* lose the gradient$"),
    "tokens": (lambda a, b, c: a * c.mask_NR, r"returned a tensor of shape \(4, 4\), .* sum it"),
    "one entry": (lambda a, b, c: a.sum()[None], r"a tensor of shape \(1,\)"),
    "float32": (lambda a, b, c: masked(a, c).float(), "returned torch.float32, expected torch.float64"),
    "metrics": (lambda a, b, c: (masked(a, c), [1.0]), "metrics of type list, expected a dict"),
    "a metric": (lambda a, b, c: (masked(a, c), {"x": a}), r"metric 'x' as Tensor of shape \(4, 4\)"),
    "its name": (lambda a, b, c: (masked(a, c), {3: 1.0}), "metric 3 as Tensor of shape"),
    "constant": (lambda a, b, c: c.advantage_N.sum(), DETACHED),
    "detached": (lambda a, b, c: masked(a.detach(), c), DETACHED),
    "no_grad": (without_graph, DETACHED),
    "nan": (lambda a, b, c: masked(a * math.nan, c), "loss '<lambda>' is nan on U"),
    "inf": (lambda a, b, c: (1e6 * b * c.mask_NR).exp().sum(), "loss '<lambda>' is inf on U"),
    "gradient": (rooted, r"'rooted' has the gradient inf in logp at \[0, 0\].*torch.where before"),
    "in place": (in_place, TRACED),
    "behind numpy": (behind_numpy, TRACED),
    "behind detach": (behind_detach, "'behind_detach' changes logp in place"),
    "assigned": (assigned, TRACED),
    "random": (random, "'random' has two values for the same arguments"),
    "a state": (counted, "'counted' has two values"),
    "unmasked": (lambda a, b, c: a.sum(), r"a gradient in logp at \[0, 3\], past the end"),
    "unmasked entropy": (lambda a, b, c: masked(a, c) + b.sum(), r"in entropy at \[0, 3\], past"),
    "mean": (mean_of_array, "'mean_of_array' depends on padding: .* one more column"),
    "maximum": (behind_the_end, "depends on padding.*by a sum of it, not by a length"),
    "minimum": (lambda a, b, c: masked(a, c) * a.detach().min(), "depends on padding"),
    "its value": (value_behind_the_end, "depends on padding"),
    "old": (lambda a, b, c: masked(a, c) + c.old_logp_NR.exp().sum(), "depends on padding"),
}


@pytest.mark.parametrize(("function", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_a_function_that_is_no_loss_is_one_line(function, message):
    with pytest.raises(InputError, match=message) as caught:
        update_of(function)
    assert "\n" not in str(caught.value)


def test_the_users_exception_is_the_cause():
    with pytest.raises(InputError) as caught:
        update_of(raising)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_arrays_of_the_caller_are_not_changed():
    arrays = toy()
    for function in (in_place, behind_numpy, behind_detach):
        with pytest.raises(InputError):
            update_of(function, arrays)
    for mine, fresh in zip((*arrays[1], *arrays[2]), (*toy()[1], *toy()[2]), strict=True):
        assert torch.equal(mine, fresh) if isinstance(fresh, torch.Tensor) else mine == fresh


def test_a_sampler_that_knows_some_tokens_only():
    """Sampler log-probabilities may be NaN; a loss that leaves these tokens out is one."""
    U, stats, inputs = toy()
    unknown_NR = inputs.sampler_logp_NR.clone()
    unknown_NR[0, 1] = math.nan
    inputs = inputs._replace(sampler_logp_NR=unknown_NR)

    def known(logp, entropy, batch):
        known_NR = batch.mask_NR & batch.sampler_logp_NR.isfinite()
        x_NR = logp - torch.where(known_NR, batch.sampler_logp_NR, 0.0)
        return -(x_NR * known_NR * batch.advantage_N[:, None]).sum() / known_NR.sum()

    update, _ = update_of(known, (U, stats, inputs))
    assert update.coef_NR[0, 1] == 0 != update.coef_NR[0, 0]
