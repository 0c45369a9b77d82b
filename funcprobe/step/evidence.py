"""Whether an optimizer state without names is in the assumed order, by the gradient on U.

Adam's second moment nu says what gradients its parameter had. Among the M parameters of one shape let

    L_ij = -(mean log nu_j + log mean(Y_i^2 / nu_j)) / 2        nats per entry, up to a constant,

be the log-likelihood of the n entries of Y_i as independent N(0, c nu_j) at its maximum over the scale
c. The entries are not independent, and nu averages few steps, so that n L is tempered by an unknown
factor b: an order, a pairing i -> pi(i), has the probability

    p_b(pi) = exp(b n sum_i L_i,pi(i)) / sum over all M! orders of the same  >=  prod_i P_i,pi(i)

with P the matrix exp(b n L) scaled to rows, and nearly to columns, of sum 1 (Sinkhorn and Knopp 1967,
Pacific J. Math. 21): scaling cancels in p_b, and the sum over orders, the permanent of P, is at most
the product of the row sums. The evidence of an order is the mean of the bound over b, uniform in log b;
the odds of two orders are the ratio of their evidences, and over a random order the ratio to 1/M!. If
an order is drawn at random, its odds over a random order exceed 1000 with probability at most 1/1000,
since their expectation is at most 1.
"""

import math
from collections import defaultdict
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..tree import f64
from ..types import AdamState, Params
from .assignment import best_assignment
from .orders import Pairing, other_orders

Verdict: TypeAlias = Literal["confirmed", "contradicted", "undecided"]

ODDS = math.log(1000)
"""Logarithm of the odds over every other order that confirm the assumed one, or contradict it; and of
those, for each parameter that it moves, by which the best assignment keeps it from being confirmed.

Noise in the gradient of a small U moves some parameters of a true order, by a few nats each
(benchmarks/RESULTS.md)."""
LEAST_HOME = 0.5
"""Least share of parameters paired with themselves in a confirmed order."""

_FLOOR = 1e-6  # added to nu, relative to its mean: quantised and underflowed entries are 0
_TEMPERING_T = torch.logspace(-5, 0, 16, dtype=torch.float64)
_SCALINGS = 20  # of rows and columns; the bound holds after any number, and is tightest at the limit
_CHUNK = 1 << 14  # entries of a parameter that are compared at once, in float64


class Evidence(NamedTuple):
    """The assumed order of a state, compared with others by the gradient; odds as logarithms, nats."""

    verdict: Verdict
    alike: int  # parameters that share their shape with another, so that a file may confuse them
    home: int  # of these, paired with themselves in the assignment of the largest total likelihood
    margin: dict[str, float]  # name -> L_ii - max over j != i of L_ij, nats per entry; where Y, nu > 0
    assigned: Pairing  # name -> name under which its state is filed, in that assignment
    over_random: float  # log odds of the assumed order over a random one
    over: dict[str, float]  # log odds of the assumed order over each of `other_orders`
    over_assigned: float  # over that assignment, at the b at which it is likeliest; at most 0 or nearly
    likeliest: str | None  # if contradicted by one of `other_orders`: that one


class Alike(NamedTuple):
    """The parameters of one shape, compared with each other."""

    names: list[str]
    per_entry_MM: Float[Tensor, "M M"]  # L
    log_p_TMM: Float[Tensor, "T M M"]  # log P_ij for every b


def state_evidence(Y: Params, adam_state: AdamState) -> Evidence:
    """Whether the gradient Y on U confirms, contradicts or leaves open the names of `adam_state`.

    *Confirmed*: the odds of the assumed order exceed 1000 over a random order and over every one of
    `orders.other_orders`; at least half of the parameters are paired with themselves; and the best
    assignment has odds over the assumed order below 1000 for each parameter that it moves, so that few
    parameters under wrong names are noticed, too. *Contradicted*: one of the other orders has odds over
    1000 over the assumed and over a random one. Else it is undecided. Parameters with a shape of their
    own need no evidence; those whose Y or nu is 0 give none. The order is that of `adam_state.groups`.
    Raises ValueError for a second moment of another shape than its gradient.
    """
    shapes = {name: tuple(grad.shape) for name, grad in Y.items()}
    others = other_orders([group.names for group in adam_state.groups], shapes)
    total = sum(map(len, _by_shape(Y)))
    return judge(compare(Y, adam_state), others, total)


def compare(Y: Params, adam_state: AdamState) -> list[Alike]:
    """The parameters with nonzero Y and nu, shape by shape, where two or more have it."""
    classes = []
    for all_names in _by_shape(Y):
        names = [name for name in all_names if _has_evidence(Y[name], adam_state, name)]
        if len(names) > 1:
            Y_MK = torch.stack([Y[name].flatten() for name in names])
            nu_MK = torch.stack([adam_state.exp_avg_sq[name].flatten() for name in names])
            per_entry_MM = fit_MM(Y_MK, nu_MK)
            log_p_TMM = _scaled(_TEMPERING_T[:, None, None] * Y_MK.shape[1] * per_entry_MM)
            classes.append(Alike(names, per_entry_MM, log_p_TMM))
    return classes


def judge(classes: list[Alike], others: dict[str, Pairing], total: int) -> Evidence:
    """The verdict on the order in which `classes` were compared; `total` as `Evidence.alike`."""
    names = [name for one in classes for name in one.names]
    assumed = {name: name for name in names}
    evidence = _log_evidence(classes, assumed)
    random = -sum(math.lgamma(len(one.names) + 1) for one in classes)
    against = {what: _log_evidence(classes, pairing) for what, pairing in others.items()}
    over = {what: evidence - other for what, other in against.items()}
    assigned = _assigned(classes)
    home = sum(assigned[name] == name for name in names)
    best_T = _log_p(classes, assigned)
    over_assigned = float((_log_p(classes, assumed) - best_T)[best_T.argmax()])
    moved = len(names) - home
    likeliest = max(against, key=against.__getitem__, default=None)
    known = likeliest is not None and over[likeliest] < -ODDS and against[likeliest] - random > ODDS
    verdict: Verdict = "undecided"
    if known:
        verdict = "contradicted"
    elif (
        min([evidence - random, *over.values()]) > ODDS
        and home >= LEAST_HOME * total
        and over_assigned >= -ODDS * moved
    ):
        verdict = "confirmed"
    return Evidence(
        verdict=verdict,
        alike=total,
        home=home,
        margin=_margins(classes),
        assigned=assigned,
        over_random=evidence - random,
        over=over,
        over_assigned=over_assigned,
        likeliest=likeliest if known else None,
    )


def fit_MM(Y_MK: Float[Tensor, "M K"], nu_MK: Float[Tensor, "M K"]) -> Float[Tensor, "M M"]:
    """L_ij of M gradients and M second moments of K entries each; float64."""
    (M, K), floor_M1 = Y_MK.shape, _FLOOR * nu_MK.double().mean(1, keepdim=True)
    log_nu_M, ratio_MM = f64(nu_MK.new_zeros(M)), f64(Y_MK.new_zeros(M, M))
    for i in range(0, K, _CHUNK):
        nu_Mk = f64(nu_MK[:, i : i + _CHUNK]) + floor_M1
        log_nu_M += nu_Mk.log().sum(1)
        ratio_MM += f64(Y_MK[:, i : i + _CHUNK]).square() @ (1 / nu_Mk).T
    return -(log_nu_M / K + (ratio_MM / K).log()) / 2


def _by_shape(Y: Params) -> list[list[str]]:
    """Names by shape, where two or more share it."""
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in sorted(Y):
        by_shape[tuple(Y[name].shape)].append(name)
    return [names for names in by_shape.values() if len(names) > 1]


def _has_evidence(grad: Tensor, adam_state: AdamState, name: str) -> bool:
    nu = adam_state.exp_avg_sq.get(name)
    if nu is None or not bool(grad.any()) or not bool(nu.any()):
        return False
    if nu.shape != grad.shape:
        raise ValueError(
            f"exp_avg_sq of {name} has shape {tuple(nu.shape)}, expected {tuple(grad.shape)}"
        )
    return bool((nu.isfinite() & (nu >= 0)).all())


def _log_evidence(classes: list[Alike], pairing: Pairing) -> float:
    """log of the mean over b of prod_i P_i,pi(i)."""
    return float(_log_p(classes, pairing).logsumexp(0)) - math.log(len(_TEMPERING_T))


def _log_p(classes: list[Alike], pairing: Pairing) -> Float[Tensor, " T"]:
    """sum_i log P_i,pi(i), for every b."""
    total_T = torch.zeros(len(_TEMPERING_T), dtype=torch.float64)
    for one in classes:
        position = {name: j for j, name in enumerate(one.names)}
        filed = [position.get(pairing[name]) for name in one.names]
        known = [(i, j) for i, j in enumerate(filed) if j is not None]
        total_T += one.log_p_TMM[:, [i for i, _ in known], [j for _, j in known]].sum(1)
        # A state that says nothing is that of any parameter.
        total_T -= (len(filed) - len(known)) * math.log(len(filed))
    return total_T


def _scaled(log_TMM: Tensor) -> Tensor:
    """Logarithm of a positive matrix scaled to columns, nearly, and rows of sum 1."""
    for _ in range(_SCALINGS):
        log_TMM = (log_TMM - log_TMM.logsumexp(-2, keepdim=True)).log_softmax(-1)
    return log_TMM


def _assigned(classes: list[Alike]) -> Pairing:
    pairing = {}
    for one in classes:
        for i, j in enumerate(best_assignment(one.per_entry_MM)):
            pairing[one.names[i]] = one.names[j]
    return pairing


def _margins(classes: list[Alike]) -> dict[str, float]:
    margins: dict[str, float] = {}
    for one in classes:
        own_MM = torch.eye(len(one.names), dtype=torch.bool)
        others_MM = one.per_entry_MM.masked_fill(own_MM, -math.inf)
        margin_M = one.per_entry_MM.diagonal() - others_MM.amax(1)
        margins |= dict(zip(one.names, margin_M.tolist(), strict=True))
    return margins
