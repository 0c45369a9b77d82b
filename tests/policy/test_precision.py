"""float64 for real: nothing inside a float64 model passes through float32."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp

import funcprobe
from funcprobe import tree
from funcprobe.policy import forward as policy
from funcprobe.policy import trials
from funcprobe.policy.precision import StayFloat64, arithmetic_of
from support.policies import random_batch, random_like, tiny_policy

THIRD = torch.tensor([1 / 3, -2 / 7], dtype=torch.float64)  # not representable in float32
NARROW = torch.ones(2, dtype=torch.float32)

REQUESTS = {
    ".float()": lambda x: x.float(),
    ".to(dtype)": lambda x: x.to(torch.float32),
    ".to(dtype=)": lambda x: x.to(dtype=torch.float32),
    ".to(device, dtype)": lambda x: x.to("cpu", torch.float32),
    ".to(device=, dtype=)": lambda x: x.to(device="cpu", dtype=torch.float),
    ".to(other)": lambda x: x.to(NARROW),
    ".type(dtype)": lambda x: x.type(torch.float32),
    ".type_as(other)": lambda x: x.type_as(NARROW),
    "sum(dtype=)": lambda x: torch.stack([x, 0 * x]).sum(0, dtype=torch.float32),
    "there and back": lambda x: x.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("request_float32", REQUESTS.values(), ids=REQUESTS)
def test_a_request_for_float32_leaves_float64(request_float32):
    with StayFloat64():
        inside = request_float32(THIRD)
    assert inside.dtype == torch.float64
    assert torch.equal(inside, THIRD)
    # the case is one: without the mode the digits are lost
    assert not torch.equal(request_float32(THIRD).double(), THIRD)


def test_softmax_in_float32_is_made_in_float64():
    calls = [
        lambda: torch.softmax(THIRD, -1, torch.float32),
        lambda: torch.nn.functional.softmax(THIRD, dim=-1, dtype=torch.float32),
        lambda: torch.nn.functional.log_softmax(THIRD, dim=-1, dtype=torch.float32).exp(),
    ]
    exact = THIRD.exp() / THIRD.exp().sum()
    for call in calls:
        with StayFloat64():
            found = call()
        torch.testing.assert_close(found, exact, rtol=1e-15, atol=0)  # a few float64 roundings
        assert call().dtype == torch.float32


def test_new_tensors_and_integers_are_float64():
    with StayFloat64():
        made = [
            torch.arange(3, dtype=torch.float32),
            torch.zeros(2, dtype=torch.float32),
            torch.full((2,), 1 / 3, dtype=torch.float32),
            torch.tensor([1 / 3], dtype=torch.float32),
            torch.zeros_like(THIRD, dtype=torch.float32),
            THIRD.new_zeros(2, dtype=torch.float32),
            torch.arange(3).float(),
            torch.arange(3).to(torch.float32),
            torch.tensor([True]).float(),
        ]
    assert [t.dtype for t in made] == [torch.float64] * len(made)
    assert float(made[2][0]) == float(made[3][0]) == 1 / 3


def test_other_requests_are_left_alone():
    with StayFloat64():
        assert THIRD.to(torch.bfloat16).dtype == torch.bfloat16
        assert THIRD.half().dtype == torch.float16
        assert THIRD.long().dtype == torch.int64
        assert THIRD.to(torch.arange(2)).dtype == torch.int64
        assert THIRD.double() is THIRD
        assert THIRD.to(THIRD) is THIRD
        # A float32 tensor that is only an operand keeps its dtype, and promotion does the rest.
        assert (NARROW * NARROW).dtype == torch.float32
        assert (NARROW * THIRD).dtype == torch.float64


def test_the_mode_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), StayFloat64():
        1 / 0  # noqa: B018
    assert THIRD.float().dtype == torch.float32
    assert torch.zeros(1, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_parameters_decide(dtype):
    with arithmetic_of({"w": torch.ones(1, dtype=dtype)}):
        found = THIRD.float().dtype
    assert found == (torch.float64 if dtype == torch.float64 else torch.float32)


def rms_norm(x: Tensor) -> Tensor:
    """As Hugging Face writes it, entered as the policy enters it."""
    with arithmetic_of({"x": x}):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.softmax(3 * wide.float(), dim=-1, dtype=torch.float32).type_as(NARROW).to(x.dtype)


def plain_rms_norm(x: Tensor) -> Tensor:
    return torch.softmax(3 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), dim=-1)


def second(f, x: Tensor, cotangent: Tensor, outer: Tensor) -> Tensor:
    """vjp of the vjp in x."""
    _, pull = vjp(lambda y: vjp(f, y)[1](cotangent)[0], x)
    return pull(outer)[0]


@pytest.mark.parametrize("where", ["inside", "around"])
def test_the_mode_survives_the_transforms(where):
    generator = torch.Generator().manual_seed(3)
    x, u, w = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    transforms = {
        "vjp": lambda f: vjp(f, x)[1](u)[0],
        "jvp": lambda f: jvp(f, (x,), (u,))[1],
        "vjp of vjp": lambda f: second(f, x, u, w),
        "jvp of vjp": lambda f: jvp(lambda y: vjp(f, y)[1](u)[0], (x,), (w,))[1],
        "vmap of vjp": lambda f: torch.vmap(lambda y, c: vjp(f, y)[1](c)[0])(x, u),
    }
    for name, transform in transforms.items():
        if where == "inside":
            found = transform(rms_norm)
        else:
            with StayFloat64():
                found = transform(rms_norm)
        expected = transform(plain_rms_norm)
        # some twenty float64 operations of numbers of size 1; float32 would leave 1e-7
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, msg=name)
        assert found.dtype == torch.float64


def finite_difference_error(model, eps: float) -> float:
    """|(l(theta + eps v) - l(theta)) / eps - l'| / |l'|, of log-probabilities and entropies."""
    probe = funcprobe.bind(model, max_tokens=64)
    batch = random_batch([(0, 3, 5), (1, 4, 2), (2, 2, 7)])
    v = random_like(probe.params)
    start = probe.token_stats(probe.params, batch)
    moved = probe.token_stats(tree.axpy(eps, v, probe.params), batch)
    _, tangent = probe.tangents(probe.params, batch, v)
    return max(
        float(((m - s) / eps - d).norm() / d.norm())
        for m, s, d in zip(moved, start, tangent, strict=True)
    )


def test_a_float64_policy_answers_to_steps_of_1e_10(monkeypatch):
    # Rounding of l (about 3) leaves 1e-15 / 1e-10 = 1e-5 of tangents of size 1 or more, with some
    # headroom for the depth of the network; curvature leaves 1e-10.
    assert finite_difference_error(tiny_policy(), 1e-10) < 1e-4
    # Without the mode float32 islands leave 1e-7 / 1e-10: nothing of the tangent is seen.
    for module in (policy, trials):
        monkeypatch.setattr(module, "arithmetic_of", lambda params: nullcontext())
    assert finite_difference_error(tiny_policy(), 1e-10) > 0.1
