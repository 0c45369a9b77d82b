"""Grouped products against torch's own, and their derivatives against differences."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp

from funcprobe.autodiff.forward_mode import ForwardMode
from funcprobe.autodiff.grouped import GroupedProducts
from funcprobe.autodiff.taylor import second_jvp

# An expert without rows, first, in the middle; rows that belong to none.
ENDS = [[0, 3, 3, 7], [2, 2, 5, 9], [9, 9, 9, 9]]


def draw(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_torchs_own(ends, dtype):
    x_SD, w_EDF = draw(9, 16, seed=0, dtype=dtype), draw(4, 16, 8, seed=1, dtype=dtype)
    offs = torch.tensor(ends, dtype=torch.int32)
    own = torch.nn.functional.grouped_mm(x_SD, w_EDF, offs=offs)
    with GroupedProducts():
        ours = torch.nn.functional.grouped_mm(x_SD, w_EDF, offs=offs)
    end = ends[-1]  # torch leaves what comes after the last group as it was in memory
    # A sum of 16 terms in another order; rounded once to bfloat16.
    bound = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours[:end], own[:end], rtol=bound, atol=bound)
    assert not ours[end:].any()


@pytest.mark.parametrize("ends", ENDS)
def test_derivatives_of_every_mode(ends):
    x_SD, dx_SD = draw(9, 6, seed=0), draw(9, 6, seed=2)
    w_EDF, dw_EDF = draw(4, 6, 5, seed=1), draw(4, 6, 5, seed=3)
    offs = torch.tensor(ends, dtype=torch.int32)

    def f(x_SD, w_EDF):
        with GroupedProducts():
            return torch._grouped_mm(x_SD.sin(), w_EDF, offs=offs)

    def loop(x_SD, w_EDF):
        out = torch.zeros(9, 5, dtype=torch.float64)
        for row in range(ends[-1]):
            expert = next(i for i, end in enumerate(ends) if row < end)
            out[row] = x_SD[row].sin() @ w_EDF[expert]
        return out

    at, along = (x_SD, w_EDF), (dx_SD, dw_EDF)
    value, first = jvp(loop, at, along)
    _, second = jvp(lambda *given: jvp(loop, given, along)[1], at, along)
    for context in (ForwardMode, GroupedProducts):
        with context():
            for a, b in zip(jvp(f, at, along), (value, first), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            with forward_ad.dual_level():
                dual = f(*(forward_ad.make_dual(x, dx) for x, dx in zip(at, along, strict=True)))
                torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, first)
    for a, b in zip(second_jvp(f, at, along), (value, first, second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    row_SF = draw(9, 5, seed=4)
    for n in (0, 1):
        ours, theirs = (grad(lambda *g, h=h: (row_SF * h(*g)).sum(), n)(*at) for h in (f, loop))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_other_products_are_torchs():
    a, b = draw(3, 4, 16, seed=0, dtype=torch.float32), draw(3, 16, 8, seed=1, dtype=torch.float32)
    with GroupedProducts():
        found = torch.nn.functional.grouped_mm(a, b)
    torch.testing.assert_close(found, a @ b)
