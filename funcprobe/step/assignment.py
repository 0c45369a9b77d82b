"""The linear assignment problem."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def best_assignment(score_MM: Float[Tensor, "M M"]) -> list[int]:
    """The permutation pi with the largest sum_i score[i, pi(i)].

    Shortest augmenting paths on the costs -score, with potentials that keep reduced costs non-negative
    (Jonker and Volgenant 1987, Computing 38), in O(M^3). Raises ValueError unless square and finite.
    """
    if score_MM.ndim != 2 or score_MM.shape[0] != score_MM.shape[1]:
        raise ValueError(f"scores have shape {tuple(score_MM.shape)}, a square matrix is expected")
    if not bool(score_MM.isfinite().all()):
        raise ValueError("scores contain a number that is not finite")
    cost_MM = -score_MM.to(device="cpu", dtype=torch.float64)
    M = len(cost_MM)
    row_of = [-1] * M  # the row to which a column is assigned
    row_potential_M, column_potential_M = cost_MM.new_zeros(M), cost_MM.new_zeros(M)
    for start in range(M):
        _augment(start, cost_MM, row_of, row_potential_M, column_potential_M)
    assigned = [0] * M
    for column, row in enumerate(row_of):
        assigned[row] = column
    return assigned


def _augment(start: int, cost_MM: Tensor, row_of: list[int], u_M: Tensor, v_M: Tensor) -> None:
    """Assign row `start` along the shortest alternating path (Dijkstra on the reduced costs)."""
    M = len(cost_MM)
    distance_M = torch.full((M,), math.inf, dtype=torch.float64)
    previous_M = torch.full((M,), -1)  # the column before on the path; -1: row `start`
    visited_M = torch.zeros(M, dtype=torch.bool)
    row, column, length = start, -1, 0.0
    while row >= 0:
        reduced_M = length + cost_MM[row] - u_M[row] - v_M
        nearer_M = ~visited_M & (reduced_M < distance_M)
        distance_M[nearer_M] = reduced_M[nearer_M]
        previous_M[nearer_M] = column
        column = int(torch.where(visited_M, math.inf, distance_M).argmin())
        length = float(distance_M[column])
        visited_M[column] = True
        row = row_of[column]
    closed = [j for j in visited_M.nonzero()[:, 0].tolist() if j != column]
    u_M[start] += length
    for j in closed:
        u_M[row_of[j]] += length - float(distance_M[j])
        v_M[j] -= length - float(distance_M[j])
    while column >= 0:
        before = int(previous_M[column])
        row_of[column] = row_of[before] if before >= 0 else start
        column = before
