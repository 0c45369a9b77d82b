"""The frozen output embedding: closed forms against autograd through whole logits in float64."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from funcprobe.passes import head
from funcprobe.policy import readout
from funcprobe.policy.readout import Readout

T, D, V = 7, 5, 19


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Scores of size 2 to 10; a cap of 3 bends them visibly.
READOUTS = {
    f"{'bias-' * bias}{'cap-' * (cap is not None)}t{temperature}": Readout(
        1.3 * draw(V, D, seed=1) + 0.2, 0.7 * draw(V, seed=2) if bias else None, cap, temperature
    )
    for bias, cap, temperature in product((False, True), (None, 3.0), (1.0, 0.7))
}
HIDDEN_TD, FIRST_TD, SECOND_TD = (draw(T, D, seed=3 + i) + 0.1 for i in range(3))
P_T, Q_T = 1 + draw(T, seed=6), draw(T, seed=7) - 0.5
TARGET_T = torch.tensor([0, 18, 4, 4, 11, 7, 2])


def logits(hidden_TD, given):
    """Scores as one writes them down."""
    u_TV = hidden_TD @ given.weight_VD.T
    u_TV = u_TV if given.bias_V is None else u_TV + given.bias_V
    u_TV = u_TV if given.softcap is None else given.softcap * torch.tanh(u_TV / given.softcap)
    return u_TV / given.temperature


def plain(hidden_TD, given, target_T=TARGET_T):
    """(l, h) by log_softmax."""
    logp_TV = logits(hidden_TD, given).log_softmax(-1)
    logp_T = logp_TV[torch.arange(len(hidden_TD)), target_T]
    return logp_T, -(logp_TV.exp() * logp_TV).sum(-1)


def close(ours, theirs, tolerance=1e-12):
    """Norm-wise: some hundred roundings of 1e-16 and cancellation of a digit or two."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b).norm()) <= tolerance * max(1.0, float(b.norm()))


def twice(f, hidden_TD, first_TD, second_TD):
    """(f, f', f'') along z + eta first + eta^2 / 2 second."""

    def along(z_TD, dz_TD):
        return jvp(f, (z_TD,), (dz_TD,))

    (value, one), (_, two) = jvp(along, (hidden_TD, first_TD), (first_TD, second_TD))
    return (*value, *one, *two)


def rows_by_autograd(given, hidden_TD=HIDDEN_TD, target_T=TARGET_T):
    hidden_TD = hidden_TD.clone().requires_grad_()
    logp_T, entropy_T = plain(hidden_TD, given, target_T)
    (dlogp_TD,) = torch.autograd.grad(logp_T.sum(), hidden_TD, retain_graph=True)
    (dentropy_TD,) = torch.autograd.grad(entropy_T.sum(), hidden_TD)
    return logp_T.detach(), entropy_T.detach(), dlogp_TD, dentropy_TD


@pytest.fixture(params=READOUTS)
def given(request):
    return READOUTS[request.param]


@pytest.fixture(params=[1, 3, None], ids=["chunk1", "chunk3", "whole"])
def chunk(request, monkeypatch):
    """Tokens that a chunk has at most: 7 tokens in single ones, in 3 + 3 + 1 and in one."""
    if request.param:
        monkeypatch.setattr(readout, "MOST", request.param)


@pytest.mark.usefixtures("chunk")
def test_closed_forms_are_autograds(given):
    def f(z_TD):
        return plain(z_TD, given)

    expected = rows_by_autograd(given)
    close(readout.values(HIDDEN_TD, TARGET_T, given), expected[:2])
    close(readout.rows(HIDDEN_TD, TARGET_T, given), expected)
    row_TD = P_T[:, None] * expected[2] + Q_T[:, None] * expected[3]
    close([readout.weighted_row(HIDDEN_TD, TARGET_T, P_T, Q_T, given)], [row_TD])
    value, tangent = jvp(f, (HIDDEN_TD,), (FIRST_TD,))
    close(readout.along(HIDDEN_TD, FIRST_TD, TARGET_T, given), (*value, *tangent))
    jet = readout.twice_along(HIDDEN_TD, FIRST_TD, SECOND_TD, TARGET_T, given)
    expected = twice(f, HIDDEN_TD, FIRST_TD, SECOND_TD)
    close(jet, expected)
    # Every one of the twelve depends on every setting: the case is not one where it would not matter.
    assert all(float(x.abs().min()) > 1e-6 for x in expected)


CALLS = {
    "values": lambda given, z: readout.values(z, TARGET_T, given),
    "rows": lambda given, z: readout.rows(z, TARGET_T, given),
    "weighted_row": lambda given, z: readout.weighted_row(z, TARGET_T, P_T, Q_T, given),
    "along": lambda given, z: readout.along(z, 0.3 * z, TARGET_T, given),
    "twice_along": lambda given, z: readout.twice_along(z, 0.3 * z, 0.1 * z, TARGET_T, given),
}


class Alive(TorchDispatchMode):
    """Bytes of all tensors of V columns that are alive at once, at the most, but for the embedding."""

    def __init__(self, embedding_VD):
        super().__init__()
        self.embedding = embedding_VD.untyped_storage().data_ptr()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == V:
            storage = out.untyped_storage()
            if storage.data_ptr() != self.embedding:  # its transpose is a view
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.storages = {ref: n for ref, n in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_a_chunk_takes_no_more_than_its_bytes(monkeypatch, given, call, dtype):
    """Room for 12 to 48 rows of the vocabulary, which a chunk of 1 to 7 tokens uses."""
    single = Readout(*(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in given))
    room = 24 * V * 8
    monkeypatch.setattr(readout, "BYTES", room)
    with Alive(single.weight_VD) as alive:
        CALLS[call](single, HIDDEN_TD.to(dtype))
    assert 0 < alive.peak <= room


def test_the_bound_on_bytes_makes_the_chunks(monkeypatch):
    sizes = []

    def seen(hidden_nD, *rest):
        sizes.append(len(hidden_nD))
        return softmax(hidden_nD, *rest)

    softmax = readout._softmax
    monkeypatch.setattr(readout, "_softmax", seen)
    for call in CALLS.values():
        monkeypatch.setattr(readout, "BYTES", 24 * V * 8)
        call(READOUTS["bias-cap-t0.7"], HIDDEN_TD)
        assert 1 < sizes[0] < T  # neither a token at a time nor all at once
        sizes.clear()
        monkeypatch.setattr(readout, "BYTES", 0)  # a token at a time where not even one fits
        call(READOUTS["bias-cap-t0.7"], HIDDEN_TD)
        assert sizes == [1] * T
        sizes.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_accuracy(given, dtype):
    """The same numbers, rounded once to `dtype`, in float64: what is left is the arithmetic's."""
    single = Readout(*(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in given))
    exact = Readout(*(x.double() if isinstance(x, torch.Tensor) else x for x in single))
    z, dz, ddz = (x.to(dtype) for x in (HIDDEN_TD, FIRST_TD, SECOND_TD))

    def f(z_TD):
        return plain(z_TD, exact)

    expected = twice(f, z.double(), dz.double(), ddz.double())
    ours = readout.twice_along(z, dz, ddz, TARGET_T, single)
    # Scores of half precision are rounded to it: 0.4 % of a score of 10, squared slopes of which add.
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert all(x.dtype == torch.float32 for x in ours)
    close(ours, expected, bound)
    close(readout.values(z, TARGET_T, single), expected[:2], bound)
    close(readout.along(z, dz, TARGET_T, single), expected[:4], bound)
    by_autograd = rows_by_autograd(exact, z.double())
    rows = readout.rows(z, TARGET_T, single)
    close(rows, by_autograd, bound)
    row_TD = P_T[:, None] * by_autograd[2] + Q_T[:, None] * by_autograd[3]
    close([readout.weighted_row(z, TARGET_T, P_T, Q_T, single)], [row_TD], bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [12.0, 40.0, 1e4])
def test_a_nearly_certain_token(gap, dtype):
    """Scores (gap, 0, 0): l, h and their derivatives from sums of what is small, in math."""
    weight_VD = torch.tensor([[1.0, 0.3], [0.0, -0.2], [0.0, 0.5]], dtype=dtype)
    given = Readout(weight_VD, None, None, 1.0)
    z = torch.tensor([[gap, 0.0]] * 3, dtype=dtype)
    target_T = torch.arange(3)
    small = math.exp(-gap)
    logp = [-math.log1p(2 * small), -gap - math.log1p(2 * small), -gap - math.log1p(2 * small)]
    p = small / (1 + 2 * small)
    entropy = math.log1p(2 * small) + 2 * p * gap
    eps = torch.finfo(dtype).eps
    values, rows = readout.values(z, target_T, given), readout.rows(z, target_T, given)
    for logp_T, entropy_T in (values, rows[:2]):
        torch.testing.assert_close(logp_T, torch.tensor(logp, dtype=dtype), rtol=4 * eps, atol=4 * eps)
        assert bool((entropy_T >= 0).all())
        # log(1 + 2 s) loses what is below eps: one part in gap of the entropy, no digit of l + h.
        bound = 4 * eps + (0 if gap > 1e3 else 1.1 * entropy / gap * (2 * small < eps))
        assert float((entropy_T - entropy).abs().max()) <= bound
    dz = torch.tensor([[0.4, 1.1]] * 3, dtype=dtype)
    _, _, dlogp_T, dentropy_T = readout.along(z, dz, target_T, given)
    da = (weight_VD.double() @ dz[0].double()).tolist()
    mean = da[0] * (1 - 2 * p) + p * (da[1] + da[2])
    torch.testing.assert_close(
        dlogp_T.double(),
        torch.tensor([x - mean for x in da], dtype=torch.float64),
        rtol=8 * eps,
        atol=8 * eps,
    )
    # dh = -sum p_v c_v da_v = gap p (da_1 + da_2 - 2 da_0), up to terms of p^2.
    slope = gap * p * (da[1] + da[2] - 2 * da[0])
    bound = 8 * eps + 20 * p * p * gap * gap + 4 * p
    assert float((dentropy_T - slope).abs().max()) <= bound
    for out in (*rows, *readout.twice_along(z, dz, dz, target_T, given)):
        assert bool(out.isfinite().all())


def test_all_scores_equal_is_the_uniform_distribution():
    given = Readout(torch.zeros(V, D).double(), None, 3.0, 0.7)
    logp_T, entropy_T, dlogp_TD, dentropy_TD = readout.rows(HIDDEN_TD, TARGET_T, given)
    for found_T, expected in ((entropy_T, math.log(V)), (logp_T, -math.log(V))):
        assert float((found_T - expected).abs().max()) < 1e-15
    assert not dlogp_TD.any()
    assert not dentropy_TD.any()


# The head's autograd.Function: every way to differentiate it, against the same way through `plain`.


def forward_of(given):
    """All that token_head reads of a Forward."""
    return SimpleNamespace(readout=given, logits=lambda _, hidden_TD: logits(hidden_TD, given))


def ours_and_plain(given):
    """(l, h)(hidden) by the head and by log_softmax."""
    return (
        lambda z_TD: head.token_head({}, z_TD, TARGET_T, forward_of(given)),
        lambda z_TD: plain(z_TD, given),
    )


def scalar(f):
    """A sum with weights that tells tokens, l and h apart."""

    def total(z_TD):
        logp_T, entropy_T = f(z_TD)
        return (P_T * logp_T + Q_T * entropy_T).sum()

    return total


def per_token(given, of_head):
    def one(z_D, target, p, q):
        if of_head:
            out = head.token_head({}, z_D[None], target[None], forward_of(given))
        else:
            logp_1V = logits(z_D[None], given).log_softmax(-1)
            out = logp_1V.gather(-1, target[None, None])[:, 0], -(logp_1V.exp() * logp_1V).sum(-1)
        return p * out[0][0] + q * out[1][0]

    return one


def by_cotangent(f):
    """d/d alpha of <d/dz sum alpha f, first>: the alpha trick."""

    def inner(alpha_T):
        def weighted(z_TD):
            logp_T, entropy_T = f(z_TD)
            return alpha_T * (P_T * logp_T + Q_T * entropy_T)

        _, pull = vjp(weighted, HIDDEN_TD)
        (g_TD,) = pull(torch.ones(T).double())
        return (g_TD * FIRST_TD).sum()

    value, pull = vjp(inner, torch.linspace(0.5, 2, T).double())
    return value, *pull(torch.tensor(1.0).double())


WAYS = {
    "grad": lambda f: (grad(scalar(f))(HIDDEN_TD),),
    "vjp": lambda f: vjp(f, HIDDEN_TD)[1]((P_T, Q_T)),
    "jvp": lambda f: [x for pair in jvp(f, (HIDDEN_TD,), (FIRST_TD,)) for x in pair],
    "cotangent": by_cotangent,
    "grad-of-grad": lambda f: (grad(lambda z: (grad(scalar(f))(z) * FIRST_TD).sum())(HIDDEN_TD),),
    "jvp-of-jvp": lambda f: twice(f, HIDDEN_TD, FIRST_TD, SECOND_TD),
    "jvp-of-grad": lambda f: jvp(grad(scalar(f)), (HIDDEN_TD,), (FIRST_TD,)),
    "grad-of-jvp": lambda f: (grad(lambda z: jvp(scalar(f), (z,), (FIRST_TD,))[1])(HIDDEN_TD),),
    "third": lambda f: (
        grad(lambda z: jvp(grad(scalar(f)), (z,), (FIRST_TD,))[1].square().sum())(HIDDEN_TD),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_derivative_of_the_head_is_the_plain_ones(given, way):
    ours, theirs = (WAYS[way](f) for f in ours_and_plain(given))
    # Third derivatives of scores of size 10 are some hundred.
    close(ours, theirs, 1e-11)
    assert float(theirs[-1].abs().min()) > 1e-9


def test_vmap_of_grad(given):
    arguments = (HIDDEN_TD, TARGET_T, P_T, Q_T)
    ours, theirs = (vmap(grad(per_token(given, of_head)))(*arguments) for of_head in (True, False))
    close([ours], [theirs])


def test_vmap_of_jvp_of_grad(given):
    def second(f):
        def one(z_D, *rest):
            return jvp(lambda x_D: grad(f)(x_D, *rest), (z_D,), (z_D + 1,))[1]

        return vmap(one)(HIDDEN_TD, TARGET_T, P_T, Q_T)

    ours, theirs = (second(per_token(given, of_head)) for of_head in (True, False))
    close([ours], [theirs])


def test_plain_autograd_once_is_right_and_twice_is_refused(given):
    z_TD = HIDDEN_TD.clone().requires_grad_()
    ours, theirs = ours_and_plain(given)
    (expected,) = torch.autograd.grad(scalar(theirs)(z_TD), z_TD)
    (found,) = torch.autograd.grad(scalar(ours)(z_TD), z_TD)
    close([found], [expected])
    with pytest.raises(RuntimeError, match="create_graph = True through the head"):
        torch.autograd.grad(scalar(ours)(z_TD), z_TD, create_graph=True)
    # torch.func inside a graph of autograd's is two derivatives, and right.
    (expected,) = torch.autograd.grad((grad(scalar(theirs))(z_TD) * FIRST_TD).sum(), z_TD)
    (found,) = torch.autograd.grad((grad(scalar(ours))(z_TD) * FIRST_TD).sum(), z_TD)
    close([found], [expected], 1e-11)


def test_the_head_leaves_the_graph_where_none_is_wanted(given):
    z_TD = HIDDEN_TD.clone().requires_grad_()
    with torch.no_grad():
        logp_T, _ = head.token_head({}, z_TD, TARGET_T, forward_of(given))
    assert not logp_T.requires_grad
    close([logp_T], [plain(HIDDEN_TD, given)[0]])


def test_dual_numbers(given):
    ours, theirs = ours_and_plain(given)
    found = []
    for f in (ours, theirs):
        with forward_ad.dual_level():
            out = f(forward_ad.make_dual(HIDDEN_TD, FIRST_TD))
            found.append([forward_ad.unpack_dual(x).tangent for x in out])
    close(*found)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, [n, V] ones among them."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_has_all_tokens_and_the_vocabulary(monkeypatch):
    """8 chunks of 4 tokens: none is larger than a chunk, whichever derivative is taken."""
    tokens, size, width, vocabulary = 32, 4, 3, 211  # T D and V D are less than 4 V
    given = Readout(draw(vocabulary, width), draw(vocabulary, seed=1), 3.0, 0.7)
    z_TD, dz_TD = draw(tokens, width, seed=2), draw(tokens, width, seed=3)
    target_T = torch.arange(tokens)
    p_T = draw(tokens, seed=4)
    monkeypatch.setattr(readout, "MOST", size)

    def f(x_TD):
        return head.token_head({}, x_TD, target_T, forward_of(given))

    def weighted(x_TD, alpha_T):
        logp_T, entropy_T = f(x_TD)
        return (alpha_T * (p_T * logp_T + entropy_T)).sum()

    def alpha_trick():
        return grad(lambda alpha_T: (grad(weighted)(z_TD, alpha_T) * dz_TD).sum())(p_T)

    def autograd():
        x_TD = z_TD.clone().requires_grad_()
        return torch.autograd.grad(f(x_TD)[0].sum(), x_TD)

    calls = {
        "values": lambda: f(z_TD),
        "grad": lambda: grad(weighted)(z_TD, p_T),
        "autograd": autograd,
        "jvp": lambda: jvp(f, (z_TD,), (dz_TD,)),
        "alpha trick": alpha_trick,
        "head_gradient": lambda: head.head_gradient({}, z_TD, target_T, p_T, p_T, forward_of(given)),
        "head_tangents": lambda: head.head_tangents({}, z_TD, dz_TD, target_T, {}, forward_of(given)),
        "head_second_tangents": lambda: head.head_second_tangents(
            {}, (z_TD, dz_TD, dz_TD), target_T, {}, forward_of(given)
        ),
    }
    for name, call in calls.items():
        with Largest() as largest:
            call()
        # The head did run under the mode, a chunk at a time.
        assert largest.numel == size * vocabulary, name
    with Largest() as largest:  # the mode does see what is whole
        plain(z_TD, given, target_T)
    assert largest.numel == tokens * vocabulary


def test_only_rows_are_kept_for_the_backward_pass():
    """Autograd holds two [T, D] tensors and no [T, V] one."""
    given = READOUTS["bias-cap-t0.7"]
    kept = []
    z_TD = HIDDEN_TD.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        head.token_head({}, z_TD, TARGET_T, forward_of(given))
    assert kept == [(T, D), (T, D)]


def test_products_with_the_embedding(given):
    """As the docstrings promise; a forward without derivatives makes no rows."""

    def products(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / (2 * T * D * V)

    found = {name: products(lambda call=call: call(given, HIDDEN_TD)) for name, call in CALLS.items()}
    head_only = products(lambda: head.token_head({}, HIDDEN_TD, TARGET_T, forward_of(given)))
    assert head_only == found["values"] < 2
    assert found["values"] < found["weighted_row"] < 2.5
    assert found["rows"] < 3.5
