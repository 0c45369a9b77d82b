"""The best assignment against enumeration and SciPy's."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from funcprobe.step.assignment import best_assignment


def total(score_MM: torch.Tensor, columns) -> float:
    return float(score_MM[range(len(columns)), list(columns)].sum())


@given(st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_against_every_permutation(size: int, seed: int, ties: bool) -> None:
    score_MM = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    score_MM = (3 * score_MM).round() if ties else score_MM
    found = best_assignment(score_MM)
    assert sorted(found) == list(range(size))
    best = max(total(score_MM, p) for p in permutations(range(size)))
    assert total(score_MM, found) == pytest.approx(best, rel=1e-12, abs=1e-12)  # order of a sum


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_against_scipy_on_many(scale: float) -> None:
    score_MM = scale * torch.randn(60, 60, generator=torch.Generator().manual_seed(4)).double()
    expected = linear_sum_assignment(score_MM.numpy(), maximize=True)[1]
    assert best_assignment(score_MM) == expected.tolist()


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(3), torch.full((2, 2), torch.nan)])
def test_what_is_no_matrix_of_scores_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected|not finite"):
        best_assignment(bad)
