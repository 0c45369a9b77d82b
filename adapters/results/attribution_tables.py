"""modules.parquet, sequences.parquet and tokens.parquet: every share of a run, a row each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

import funcprobe
from funcprobe.attribution.module_shares import factor_of, layer_of, module_of, projection_of
from funcprobe.types import Batch, TokenStats

from ..rollouts import Rollouts
from ..rollouts.files import write_parquet
from ..stages.first_order import Predicted
from .attribution import share_of
from .table_columns import FILES, MODULES, SEQUENCES, SHARES, TOKENS, Column
from .token_texts import special_ids, token_texts


def write_tables(found: Predicted, attribution: funcprobe.Attribution, folder: Path) -> None:
    """modules.parquet and sequences.parquet, and at level "tokens" tokens.parquet.

    The metadata of every column has its unit and its meaning.
    """
    tables = {
        "modules.parquet": _modules(found, attribution),
        "sequences.parquet": _sequences(found, attribution),
    }
    if found.plan.config.attribution.level == "tokens":
        tables["tokens.parquet"] = _tokens(found, attribution)
    unit = f"nats per {found.plan.entropy.per}"
    for name, values in tables.items():
        write_parquet(values, _schema(FILES[name], unit), folder / name)


def _schema(columns: Mapping[str, Column], unit: str) -> pa.Schema:
    fields = [
        pa.field(n, c.type, metadata={"about": c.about, "unit": c.unit.replace("entropy", unit)})
        for n, c in columns.items()
    ]
    return pa.schema(fields)


def _modules(found: Predicted, attribution: funcprobe.Attribution) -> dict[str, list[Any]]:
    assert attribution.errors is not None
    rows = []
    for name, parts in attribution.modules.tensor.items():
        error = attribution.errors.tensor[name]
        interval = share_of(parts.total, error.total).interval
        assert interval is not None
        names = (name, module_of(name), layer_of(name), projection_of(name), factor_of(name))
        entries = found.plan.policy.params[name].numel()
        errors = (one.se for one in error)
        rows.append((*names, entries, *parts, parts.total, *errors, interval.low, interval.high))
    return {n: list(c) for n, c in zip(MODULES, zip(*rows, strict=True), strict=True)}


class _Side(NamedTuple):
    """A batch with what every token of it has."""

    name: str
    rollouts: Rollouts
    batch: Batch
    of_token: dict[str, Tensor | None]  # column -> [N, R]


def _sides(found: Predicted, attribution: funcprobe.Attribution) -> tuple[_Side, _Side]:
    batches, evaluation = found.batches, attribution.evaluation
    update = batches.update
    d_NR = update.entropy_coef_NR
    of_U = {
        **_stats(found.prediction.update_stats if update.moves else None),
        "coef_logp": update.coef_NR,
        "coef_entropy": torch.zeros_like(update.coef_NR) if d_NR is None else d_NR,
        "share": attribution.update.token_NR,
        "marginal": attribution.marginal.token_NR,
    }
    of_E = {
        **_stats(found.prediction.stats),
        "share": evaluation.tokens.token_NR,
        "direct": evaluation.direct.token_NR,
        "score": evaluation.score.token_NR,
        "control": evaluation.control.token_NR,
    }
    return (
        _Side("U", batches.update_rollouts, update.batch, of_U),
        _Side("E", batches.eval_rollouts, batches.eval_batch, of_E),
    )


def _stats(stats: TokenStats | None) -> dict[str, Tensor | None]:
    if stats is None:
        return {"logp": None, "entropy": None}
    return {"logp": stats.logp_NR, "entropy": stats.entropy_NR}


def _sequences(found: Predicted, attribution: funcprobe.Attribution) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {name: [] for name in SEQUENCES}
    for side in _sides(found, attribution):
        drawn, count = side.rollouts, len(side.rollouts.prompt_index)
        values: dict[str, Sequence[Any]] = {
            "batch": [side.name] * count,
            "sequence": range(count),
            "prompt_index": drawn.prompt_index,
            "prompt": drawn.prompt,
            "response": drawn.response,
            "response_tokens": side.batch.response_length_N.tolist(),
        }
        if side.name == "U":
            rewards = drawn.reward or [math.nan] * count
            values["reward"] = [None if math.isnan(r) else r for r in rewards]
            values["advantage"] = drawn.advantage or [None] * count
        else:
            values["influence"] = found.prediction.first_order.influence_N.tolist()
        for name in ("entropy", *SHARES):
            of_token = side.of_token.get(name)
            values[name] = [None] * count if of_token is None else of_token.sum(1).tolist()
        for name, column in table.items():
            column.extend(values.get(name, [None] * count))
    return table


def _tokens(found: Predicted, attribution: funcprobe.Attribution) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {name: [] for name in TOKENS}
    tokenizer = found.plan.policy.tokenizer
    special, alone = special_ids(tokenizer), dict[int, str]()
    for side in _sides(found, attribution):
        mask_NR = funcprobe.response_mask(side.batch)
        row_T, position_T = mask_NR.nonzero().T
        ids = [token for response in side.rollouts.response_ids for token in response]
        alone |= {token: str(tokenizer.decode([token])) for token in set(ids) - alone.keys()}
        texts = token_texts(side.rollouts.response_ids, tokenizer)
        rows, count = row_T.tolist(), len(ids)
        values: dict[str, Sequence[Any]] = {
            "batch": [side.name] * count,
            "sequence": rows,
            "prompt_index": [side.rollouts.prompt_index[i] for i in rows],
            "position": position_T.tolist(),
            "token_id": ids,
            "token": [alone[token] for token in ids],
            "text": [text for of_response in texts for text in of_response],
            "special": [token in special for token in ids],
        }
        if side.name == "U" and side.rollouts.advantage:
            values["advantage"] = [side.rollouts.advantage[i] for i in rows]
        for name, of_token in side.of_token.items():
            if of_token is not None:
                values[name] = of_token[mask_NR].tolist()
        for name, column in table.items():
            column.extend(values.get(name, [None] * count))
    return table
