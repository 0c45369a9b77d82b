"""Which part of U changes the entropy of which part of E: the matrix of the update's share."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import tree
from ..along import Passes
from ..passes.gradients import grad_Y, weighted_grad
from ..passes.tangents import tangents
from ..policy.forward import Forward
from ..policy.layout import MAX_TOKENS, response_mask, select
from ..statistics import evaluation
from ..statistics.estimators import FirstOrder
from ..statistics.evaluation import Evaluation
from ..step import masked
from ..types import AdamState, Batch, Entropy, InputError, Params, Step, TokenStats, UpdateBatch
from .subset import Unit, moves, moving_rows, named, of_unit, subset
from .token_shares import update_shares

Route: TypeAlias = Literal["auto", "columns", "rows"]

GRADIENT, TANGENTS = 2.4, 3.0  # what a pass costs, in forwards of the same tokens


class Influence(NamedTuple):
    """K_nm = <X_n, P Y_m>: what part m of U adds to the derivative through part n of E.

    Per unit of eta, in the entropy estimator's unit. Over all rows a column sums to the share of m;
    over all columns a row sums to E's share along P Y, without masks. `share_M` and `tensor_M` are
    empty where they were not asked for by the route; see `influence`.
    """

    pair_NM: Float[Tensor, "N M"]
    row_N: Int[Tensor, " N"]  # prompts of E by `Batch.prompt_N`, or its sequences by their row
    column_M: Int[Tensor, " M"]  # the same of U
    share_M: tuple[FirstOrder, ...]  # <X, P Y_m> with its error given U; of all rows
    tensor_M: tuple[dict[str, float], ...]  # <X, P Y_m> restricted to every tensor


class Pair(NamedTuple):
    """One entry of the matrix."""

    row: int  # of E
    column: int  # of U
    influence: float


class _Given(NamedTuple):
    params: Params
    scale: Params  # P
    X: Params
    at: Evaluation
    E: Batch
    update: UpdateBatch
    forward: Forward
    over_U: Forward
    max_tokens: int


def influence(
    params: Params,
    passes: Passes,
    eval_batch: Batch,
    update: UpdateBatch,
    adam_state: AdamState,
    forward: Forward,
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    row_unit: Unit = "prompt",
    column_unit: Unit = "prompt",
    route: Route = "auto",
    entropy: Entropy = Entropy(),
    step: Step = Step(),
    max_tokens: int = MAX_TOKENS,
    sampler_logp_NR: Float[Tensor, "N R"] | None = None,
    unit_N: Int[Tensor, " N"] | None = None,
    update_forward: Forward | None = None,
) -> Influence:
    """K_nm = <X_n, P Y_m> of chosen rows of E and columns of U, by default all; no gradient is stored.

    X_n is the part of X of E's prompt or sequence n, with the coefficients p, q of the whole of E,
    baseline included; Y_m that of Y of U's prompt or sequence m, c and d those of the whole of U. There
    are two routes to the same numbers:

        "columns"   for every m: Y_m over its sequences, and tangents l', h' of the rows of E along
                    P Y_m; K_nm = sum_j p_nj l'_nj + q_nj h'_nj over the tokens of n
        "rows"      for every n: X_n over its sequences, and tangents of the columns of U along P X_n;
                    K_nm = sum_k c_mk l'_mk + d_mk h'_mk over the tokens of m

    With t_E and t_U the tokens of the chosen sequences, prompts included, they cost about
    2.4 t_U + 3 M t_E and 2.4 t_E + 3 N t_U forwards of a token, for M columns and N rows; "auto" takes
    the cheaper. By columns `tensor_M` is free, and with all rows so is `share_M`: the tangents are
    those of the whole estimator along P Y_m, so that its error over the units `unit_N` of E (default:
    its prompts) is exact. By rows both are empty.

    P is that of the passes' step. With masks of dropout it is the mean of P_k, and Y_m is without
    masks, as in `token_shares`. Columns without coefficients are 0 without a pass. `update_forward`
    (default `forward`) is used over U; the other arguments are those of `summarise`. Raises InputError
    for a row or column that is not in E or U, for none, for one named twice, and where
    `update_direction` does.
    """
    at = evaluation.evaluate(
        eval_batch, passes.stats, entropy, sampler_logp_NR, baseline_NR=passes.baseline_NR
    )
    row_N = of_unit(eval_batch, row_unit).unique()
    if rows is not None:
        row_N = named(eval_batch, row_unit, rows, "E")
    column_M = of_unit(update.batch, column_unit).unique()
    if columns is not None:
        column_M = named(update.batch, column_unit, columns, "U")
    if route == "auto":
        route = _cheaper(eval_batch, row_N, row_unit, update.batch, column_M, column_unit)
    scale = masked.mean_direction(params, passes.Y, adam_state, step).scale
    over_U = forward if update_forward is None else update_forward
    given = _Given(params, scale, passes.X, at, eval_batch, update, forward, over_U, max_tokens)
    if route == "rows":
        part = _part(update, column_unit, column_M.tolist())
        own_N, name_N = of_unit(eval_batch, row_unit), of_unit(update.batch, column_unit)
        rows_N = [_row(given, (own_N == n).nonzero()[:, 0], part, name_N) for n in row_N.tolist()]
        pair_NM = torch.stack([_by_name(s_u, name_u, column_M) for s_u, name_u in rows_N])
        return Influence(pair_NM, row_N, column_M, (), ())
    if route != "columns":
        raise InputError(f'unknown route {route!r}: "auto", "columns" or "rows" is expected')
    chosen_n = torch.isin(of_unit(eval_batch, row_unit), row_N).nonzero()[:, 0]
    unit_N = eval_batch.prompt_N if unit_N is None else unit_N
    parts = (_part(update, column_unit, [m]) for m in column_M.tolist())
    columns_M = [_column(given, part, chosen_n, unit_N) for part in parts]
    name_n = of_unit(eval_batch, row_unit)[chosen_n]
    return Influence(
        torch.stack([_by_name(column.s_n, name_n, row_N) for column in columns_M], 1),
        row_N,
        column_M,
        tuple(column.share for column in columns_M if column.share is not None),
        tuple(column.tensor for column in columns_M),
    )


def top_pairs(found: Influence, count: int = 10) -> list[Pair]:
    """The `count` entries of the matrix that are largest in absolute value, largest first.

    InputError for a count below 1.
    """
    if count < 1:
        raise InputError(f"{count} pairs: at least 1 is expected")
    flat = found.pair_NM.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:count].tolist()
    width = len(found.column_M)
    return [
        Pair(int(found.row_N[i // width]), int(found.column_M[i % width]), float(flat[i]))
        for i in order
    ]


class _Column(NamedTuple):
    s_n: Float[Tensor, " n"]  # <X_i, P Y_m> of the chosen sequences of E
    share: FirstOrder | None  # None: not all of E
    tensor: dict[str, float]


def _column(
    given: _Given, part: UpdateBatch, chosen_n: Int[Tensor, " n"], unit_N: Int[Tensor, " N"]
) -> _Column:
    """One gradient over the part of U, tangents of the chosen sequences of E along P times it."""
    Y = grad_Y(given.params, moving_rows(part), given.over_U, given.max_tokens)
    PY = {name: scale * tree.f64(Y[name]) for name, scale in given.scale.items()}
    own = select(given.E, chosen_n)
    p_nR, q_nR = _coefficients(given, own, chosen_n)
    tangent = TokenStats(torch.zeros_like(p_nR), torch.zeros_like(p_nR))
    if part.moves:
        tangent = tangents(given.params, own, PY, given.forward, given.max_tokens)[1]
    share = None
    if len(chosen_n) == len(given.E.prompt_N):
        share = evaluation.derivative(given.at, tangent, unit_N)
    s_n = (p_nR * tangent.logp_NR + q_nR * tangent.entropy_NR).sum(1)
    return _Column(s_n, share, tree.dot_by_name(given.X, PY))


def _row(
    given: _Given, chosen_n: Int[Tensor, " n"], part: UpdateBatch, name_N: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " u"], Int[Tensor, " u"]]:
    """One gradient over some sequences of E, tangents of the part of U along P times it.

    <X_n, P Y_i> of the part's sequences that move, and their names.
    """
    if not part.moves:
        return torch.zeros(0, dtype=torch.float64), name_N[:0]
    own = select(given.E, chosen_n)
    p_nR, q_nR = _coefficients(given, own, chosen_n)
    X = weighted_grad(given.params, own, p_nR, q_nR, given.forward, given.max_tokens)
    PX = {name: scale * tree.f64(X[name]) for name, scale in given.scale.items()}
    moving = moving_rows(part)
    tangent = tangents(given.params, moving.batch, PX, given.over_U, given.max_tokens)[1]
    return update_shares(moving, tangent).sequence_N, name_N[moves(part)]


def _coefficients(
    given: _Given, own: Batch, chosen_n: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n R"], Float[Tensor, "n R"]]:
    """p and q of the whole of E, at some of its sequences."""
    width = response_mask(own).shape[1]
    p_NR, q_NR = evaluation.gradient_coefficients(given.at)
    return p_NR[chosen_n, :width], q_NR[chosen_n, :width]


def _part(update: UpdateBatch, unit: Unit, names: Sequence[int]) -> UpdateBatch:
    return subset(update, prompts=names) if unit == "prompt" else subset(update, sequences=names)


def _by_name(
    s_n: Float[Tensor, " n"], name_n: Int[Tensor, " n"], names: Int[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """Sums over the sequences of each name, in the order of the names; 0 where there are none."""
    return (names[:, None] == name_n[None, :]).to(s_n.dtype) @ s_n


def _cheaper(
    E: Batch, row_N: Tensor, row_unit: Unit, U: Batch, column_M: Tensor, column_unit: Unit
) -> Route:
    def tokens(batch: Batch, unit: Unit, names: Tensor) -> int:
        chosen_N = torch.isin(of_unit(batch, unit), names)
        return int((batch.prompt_length_N + batch.response_length_N)[chosen_N].sum())

    t_E, t_U = tokens(E, row_unit, row_N), tokens(U, column_unit, column_M)
    by_columns = GRADIENT * t_U + TANGENTS * len(column_M) * t_E
    by_rows = GRADIENT * t_E + TANGENTS * len(row_N) * t_U
    return "columns" if by_columns <= by_rows else "rows"
