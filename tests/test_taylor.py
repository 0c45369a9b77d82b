"""Second derivatives along a path: every rule against reverse mode over reverse mode, in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from funcprobe.autodiff import taylor
from funcprobe.autodiff.taylor import second_jvp
from funcprobe.autodiff.taylor_rules import COMPOSED, RULES


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_reverse_mode(f, at, direction, bend):
    """f, d/dt and d2/dt2 of f(at + t direction + t^2 bend / 2), entry by entry, from autograd."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    path = [x + t * v + t * t * a / 2 for x, v, a in zip(at, direction, bend, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):  # the only one that has second derivatives
        out = f(*path)
    rows = []
    for entry in out.flatten():
        first = slope(entry, t)
        rows.append((entry, first, slope(first, t)))
    return [torch.stack(column).reshape(out.shape).detach() for column in zip(*rows, strict=True)]


def slope(y, t):
    if not y.requires_grad:
        return torch.zeros(())
    (found,) = torch.autograd.grad(y, t, create_graph=True, materialize_grads=True)
    return found


X, C, M = draw(3, 4, seed=1), draw(4, seed=2), draw(4, 5, seed=3)
FIRST = (3, 4)
PAIR = [(3, 4), (4,)]  # the second is broadcast
# name -> (f of jets alone, their shapes); constants are closed over.
MAPS = {
    "view": lambda x: x.view(2, 6),
    "reshape": lambda x: torch.reshape(x.T, (2, 6)),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "contiguous": lambda x: x.T.contiguous(),
    "to": lambda x: x.to(torch.float32).to(x.dtype) if x.dtype == torch.float32 else x.to(x.dtype),
    "to like another": lambda x: x.to(C),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "clone": lambda x: x.clone(),
    "__getitem__": lambda x: x[1:, [0, 2]],
    "cat": lambda x: torch.cat([x, 2 * x], -1),
    "cat with a constant": lambda x: torch.cat([x, X]),
    "concat": lambda x: torch.concat((x, x * x)),
    "stack": lambda x: torch.stack([x, -x], 1),
    "split": lambda x: x.split(2, -1)[1],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "unbind": lambda x: x.unbind(1)[3],
    "neg": lambda x: -x,
    "negative": torch.negative,
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(0),
    "expand": lambda x: x[:, None].expand(3, 2, 4),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "repeat": lambda x: x.repeat(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0, 0])),
    "select": lambda x: x.select(0, 2),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "movedim": lambda x: x.movedim(0, 1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 1),
}
CASES = {
    **{name: (f, [FIRST]) for name, f in MAPS.items()},
    "add": (lambda x, y: x + y, PAIR),
    "add, the wider second": (lambda x, y: y + x, PAIR),
    "add a constant": (lambda y: y + X, [(4,)]),
    "add from the right": (lambda x: 1 + x, [FIRST]),
    "add, scaled": (lambda x, y: torch.add(x, y, alpha=3), PAIR),
    "sub": (lambda x, y: x - y, PAIR),
    "sub from a constant": (lambda y: torch.sub(X, y), [(4,)]),
    "sub from a number": (lambda x: 1 - x, [FIRST]),
    "sub, scaled": (lambda x, y: torch.sub(x, y, alpha=3), PAIR),
    "mul": (lambda x, y: x * y, PAIR),
    "mul by itself": (lambda x: x * x, [FIRST]),
    "mul by a constant": (lambda x: x * C, [FIRST]),
    "mul of a constant": (lambda y: X * y, [(4,)]),
    "mul by a number": (lambda x: 3 * x, [FIRST]),
    "mul of two precisions": (lambda x, y: x.float() * y, PAIR),
    "multiply": (torch.multiply, PAIR),
    "div": (lambda x: torch.div(x, C), [FIRST]),
    "div by a jet": (lambda x, y: x / y, PAIR),
    "true_divide": (lambda x: torch.true_divide(x, 2), [FIRST]),
    "matmul": (lambda x, y: x @ y, [(2, 3, 4), (4, 5)]),
    "mm": (torch.mm, [(3, 4), (4, 5)]),
    "mm with a constant": (lambda x: torch.mm(x, M), [FIRST]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "linear": (functional.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear, narrow": (functional.linear, [(2, 3, 4), (2, 4), (2,)]),
    "linear, by name": (
        lambda x, w: functional.linear(input=x * x, weight=w, bias=None),
        [(3, 4), (2, 4)],
    ),
    "linear, narrow, frozen bias": (lambda x, w: functional.linear(x, w, C[:2]), [(3, 4), (2, 4)]),
    "linear, frozen": (lambda x: functional.linear(x, M.T, M[0]), [FIRST]),
    "linear of a constant": (lambda w: functional.linear(X, w), [(5, 4)]),
    "linear, bias alone": (lambda b: functional.linear(X, M.T, b), [(5,)]),
    "addmm": (torch.addmm, [(5,), (3, 4), (4, 5)]),
    "addmm, frozen": (lambda x: torch.addmm(M[0], x, M), [FIRST]),
    "addmm, scaled": (lambda x: torch.addmm(M[0], x, M, beta=2, alpha=3), [FIRST]),
    "silu": (functional.silu, [FIRST]),
    "silu as a module": (torch.nn.SiLU(), [FIRST]),
    "silu of a jet that bends": (lambda x: functional.silu(x * x), [FIRST]),
    "pow": (lambda x: x.pow(3), [FIRST]),
    "pow, squared": (lambda x: x**2, [FIRST]),
    "pow to the one half": (lambda x: (x * x + 1).pow(0.5), [FIRST]),
    "pow to a jet": (lambda x, y: (x * x + 1).pow(y), PAIR),
    "rsqrt": (lambda x: torch.rsqrt(x * x + 1), [FIRST]),
    "tanh": (torch.tanh, [FIRST]),
    "dropout": (lambda x: functional.dropout(x, 0.3, training=False), [FIRST]),
    "scaled_dot_product_attention": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 2, 3, 4)] * 3,
    ),
    "layer_norm": (lambda x, w, b: functional.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)]),
    "layer_norm of two axes": (lambda x: torch.layer_norm(x, (3, 4)), [(2, 3, 4)]),
    # Without a rule
    "softmax": (lambda x: x.softmax(-1), [FIRST]),
    "gelu": (lambda x: functional.gelu(x, approximate="tanh"), [FIRST]),
    "rms_norm": (lambda x, w: functional.rms_norm(x, (4,), w), [(3, 4), (4,)]),
    "einsum": (lambda x, y: torch.einsum("ij,kj->ik", x, y), [(3, 4), (5, 4)]),
    "where": (lambda x: torch.where(X > 0, x.exp(), 0.0), [FIRST]),
    "topk": (lambda x: (x * x).topk(2, -1).values, [FIRST]),
    "complex": (lambda x: (torch.view_as_complex(x.view(3, 2, 2)) ** 2).real, [FIRST]),
    "complex, rotated": (
        lambda x: torch.view_as_real(torch.polar(X[:, :2].abs(), X[:, 2:]) * torch.fft.rfft(x)[:, :2]),
        [FIRST],
    ),
    "normalize": (lambda x: functional.normalize(x, dim=-1), [FIRST]),
    "pow to 1, at 0": (lambda x: (x - x).pow(1) + x, [FIRST]),
    "pow to 0, at 0": (lambda x: (x - x).pow(0) + x, [FIRST]),
    "add of two precisions": (lambda x: functional.linear(x.float() + X, M.T), [FIRST]),
    "attention of three dimensions": (
        functional.scaled_dot_product_attention,
        [(2, 3, 4)] * 3,
    ),
    "attention with a mask that moves": (
        lambda q, m: functional.scaled_dot_product_attention(q, q, q, attn_mask=m),
        [(2, 2, 3, 4), (3, 3)],
    ),
    "attention of a query without keys": (
        lambda q, k, v: functional.scaled_dot_product_attention(
            q, k, v, torch.tensor([[True, False], [False, False]])
        ).sum(-1),
        [(1, 1, 2, 4)] * 3,
    ),
    "linear, a vector": (lambda x, w: functional.linear(x * x, w), [(3, 4), (4,)]),
    "div by name": (lambda x: torch.div(x, other=C), [FIRST]),
    "div, all by name": (lambda x: torch.div(input=x, other=C), [FIRST]),
    "several results": (lambda x: torch.sub(*torch.var_mean(x, -1)), [FIRST]),
    "another's shape": (lambda x, y: y.expand_as(x).exp(), PAIR),
    "a constant of its shape": (lambda x: x * torch.ones_like(x) + x.new_zeros(x.shape), [FIRST]),
    "an expanded derivative": (lambda y: (y + X[:, :1]).exp(), [(4,)]),
    "detached": (lambda x: x * x.detach(), [FIRST]),
}
# Numbers of size 1 through a few operations, in float64; some cases pass through float32.
ROUNDING = dict.fromkeys(("float", "mul of two precisions", "add of two precisions"), 1e-6)


def paths(shapes):
    return [[draw(*s, seed=10 * n + i) for i, s in enumerate(shapes)] for n in (1, 2, 3)]


def require_close(found, expected, bound=1e-13):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert type(a) is Tensor
        assert not a.requires_grad
        assert float((a - b).norm()) <= bound * max(1.0, float(b.norm()))


@pytest.mark.parametrize("name", CASES)
def test_against_reverse_mode(name):
    """Along a curve, along a line, and where one argument alone moves."""
    f, shapes = CASES[name]
    at, direction, bend = paths(shapes)
    still = [torch.zeros_like(x) for x in at]
    bound = ROUNDING.get(name, 1e-13)
    found = second_jvp(f, tuple(at), tuple(direction), tuple(bend))
    require_close(found, by_reverse_mode(f, at, direction, bend), bound)
    found = second_jvp(f, tuple(at), tuple(direction))
    require_close(found, by_reverse_mode(f, at, direction, still), bound)
    for i in range(len(at) if len(at) > 1 else 0):

        def alone(x, i=i):
            return f(*at[:i], x, *at[i + 1 :])

        part = slice(i, i + 1)
        found = second_jvp(alone, tuple(at[part]), tuple(direction[part]))
        require_close(found, by_reverse_mode(alone, at[part], direction[part], still[part]), bound)


def test_every_rule_has_a_case(monkeypatch):
    """By name, as torch's function and the method of a name are one rule."""
    used = set()

    class Recorded(dict):
        def get(self, func, default=None):
            used.add(func.__name__ if func in self else None)
            return super().get(func, default)

    monkeypatch.setattr(taylor, "RULES", Recorded(RULES))
    monkeypatch.setattr(taylor, "COMPOSED", {})
    for f, shapes in CASES.values():
        at, direction, _ = paths(shapes)
        second_jvp(f, tuple(at), tuple(direction))
    assert {func.__name__ for func in RULES} <= used
    assert {func.__name__ for func in COMPOSED} == {"layer_norm"}


def test_a_rule_takes_products_with_a_constant_three_times():
    at, direction, bend = paths([FIRST])
    with FlopCounterMode(display=False) as counter:
        second_jvp(lambda x: functional.linear(x, M.T), tuple(at), tuple(direction), tuple(bend))
    assert counter.get_total_flops() == 3 * 2 * 3 * 4 * 5


def test_lora_bends_by_twice_both_directions():
    """y = B A x with x = u^2: y'' = 2 (B' A' x + B A' x' + B' A x') + B A x''."""
    (u, a, b), (du, da, db), _ = paths([(3, 4), (2, 4), (5, 2)])

    def lora(u, a, b):
        return functional.linear(functional.linear(u * u, a), b)

    x, dx, ddx = u * u, 2 * u * du, 2 * du * du
    first = dx @ a.T @ b.T + x @ da.T @ b.T + x @ a.T @ db.T
    both = x @ da.T @ db.T + dx @ da.T @ b.T + dx @ a.T @ db.T
    found = second_jvp(lora, (u, a, b), (du, da, db))
    require_close(found, (x @ a.T @ b.T, first, 2 * both + ddx @ a.T @ b.T))


def test_trees_constants_and_integers():
    x = draw(3, seed=1)
    at = ({"b": x, "a": 2 * x},)

    def f(given):
        assert given["a"].shape == (3,)
        assert bool((given["a"] > given["b"]).any())
        return {"y": given["a"] * given["b"], "n": given["a"].argmax(), "c": x}

    value, first, second = second_jvp(f, at, ({"b": torch.ones(3).double(), "a": x},))
    torch.testing.assert_close(first["y"], 2 * x + x * x)
    torch.testing.assert_close(second["y"], 2 * x)
    assert value["n"] == (2 * x).argmax()
    assert not first["c"].any()
    assert not second["c"].any()


@pytest.mark.parametrize(
    ("direction", "bend"),
    [
        (({"a": X},), None),
        (({"a": X, "b": X[0]},), None),
        (({"a": X, "c": X},), None),
        (({"a": X, "b": X, "c": X},), None),
        ((X, X), None),
        (({"a": X, "b": X},), ({"a": X, "b": C},)),
    ],
)
def test_other_trees_and_shapes_are_refused(direction, bend):
    with pytest.raises(ValueError, match="expected the arguments'"):
        second_jvp(lambda given: given["a"] * given["b"], ({"a": X, "b": X},), direction, bend)


def written(x):
    out = torch.zeros(2, 4, dtype=x.dtype)
    out[1] = x[0] * x[1]
    return out


def filled(x, value):
    y = x * x
    y[0] = value
    return y


WRITES = {
    "add_": lambda x: (x * x).add_(x.sin()),
    "into a constant": lambda x: torch.zeros_like(x).add_(x * x),
    "__setitem__": lambda x: filled(x, 1.0),
    "into a part of a constant": written,
    "__iadd__": lambda x: (x * x).__iadd__(x),
    "inplace": lambda x: functional.silu(x * x, inplace=True),
    "an operator": lambda x: torch.ops.aten.mul_.Tensor(x * x, x),
    # As experts are added up.
    "index_add_": lambda x: torch.zeros_like(x).index_add_(0, torch.tensor([2, 0, 2]), x * x),
    "into what is given": lambda x: x.mul_(x.sin()),
    "and a layer_norm": lambda x: functional.layer_norm((x * x).add_(1.0), (4,)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_function_that_writes_goes_by_nested_jvp_whole(name):
    """And leaves alone what it was given."""
    at, direction, bend = paths([FIRST])
    before = at[0].clone()
    found = second_jvp(WRITES[name], tuple(at), tuple(direction), tuple(bend))
    assert torch.equal(at[0], before)
    if name == "into what is given":
        expected = by_reverse_mode(lambda x: x * x.sin(), at, direction, bend)
    else:
        expected = by_reverse_mode(WRITES[name], at, direction, bend)
    require_close(found, expected)
    assert torch.equal(second_jvp(WRITES[name], tuple(at), tuple(direction))[1], found[1])


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[0],
        lambda x: torch.ops.aten.layer_norm.default(x, (4,)),
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: functional.instance_norm(x[None]),
        lambda x: torch.add(x, x, out=torch.empty(3, 4).double()),
    ],
)
def test_what_torch_has_no_right_derivative_of_is_refused(f):
    at, direction, _ = paths([FIRST])
    with pytest.raises(RuntimeError, match=r"wrong second derivative|does not support"):
        second_jvp(f, tuple(at), tuple(direction))


def test_a_transform_around_is_followed():
    """The third derivative of sum x^4 sin x along v^3, rules and a function without one in it."""
    x, v = draw(5, seed=1), draw(5, seed=2)

    def bend(x):
        (value,) = second_jvp(lambda x: (x * x * x * x * x.sin()).sum(), (x,), (v,))[2:]
        return value

    third = x**4 * -x.cos() - 12 * x**3 * x.sin() + 36 * x**2 * x.cos() + 24 * x * x.sin()
    torch.testing.assert_close(grad(bend)(x), v**2 * third, rtol=1e-12, atol=1e-12)
    _, along = jvp(bend, (x,), (v,))
    torch.testing.assert_close(along, (v**3 * third).sum(), rtol=1e-12, atol=1e-12)


def test_a_dual_level_around_is_refused():
    x, v = draw(5, seed=1), draw(5, seed=2)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="not propagate: use torch"):
        second_jvp(lambda x: x * x, (forward_ad.make_dual(x, v),), (v,))


@pytest.mark.parametrize("f", [torch.sin, torch.tanh, lambda x: (x * x).add_(x)])
def test_no_graph_is_kept(f):
    x, v = draw(5, seed=1).requires_grad_(), draw(5, seed=2).requires_grad_()
    assert not any(part.requires_grad for part in second_jvp(f, (x,), (v,), (v,)))


def test_an_autograd_function_is_followed_inside():
    """Its body is torch functions; its own derivatives, wrong here, are not asked for."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, dx):
            return dx

    at, direction, bend = paths([FIRST])
    found = second_jvp(Cube.apply, tuple(at), tuple(direction), tuple(bend))
    require_close(found, by_reverse_mode(lambda x: x**3, at, direction, bend))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_is_nothing_but_in_training(training, rate):
    at, direction, _ = paths([FIRST])
    _, first, _ = second_jvp(
        lambda x: functional.dropout(x, rate, training), tuple(at), tuple(direction)
    )
    same = torch.equal(first, direction[0])
    assert same == (rate == 0 or not training)
