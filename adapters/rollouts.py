"""Sampled batches as they are stored: token by token, in Parquet, and as the core's Batch."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from funcprobe.layout import collate, response_mask
from funcprobe.types import Batch, InputError

SCHEMA = pa.schema(
    [
        pa.field("prompt_index", pa.int64(), metadata={"about": "which prompt of the source"}),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("prompt_ids", pa.list_(pa.int64())),
        pa.field("response_ids", pa.list_(pa.int64()), metadata={"about": "first EOS included"}),
        pa.field("finish_reason", pa.string(), metadata={"about": "stop or length"}),
        pa.field("temperature", pa.float64()),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        pa.field("sampler_logp", pa.list_(pa.float64()), metadata={"about": "nats per token"}),
    ]
)
REQUIRED = ("prompt_index", "prompt_ids", "response_ids", "temperature")


class Rollouts(NamedTuple):
    """Sequences with what is known of each. A column that is not known is None throughout."""

    prompt_index: list[int]
    prompt: list[str]
    response: list[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    finish_reason: list[str]
    temperature: float
    reward: list[float] | None = None
    advantage: list[float] | None = None
    sampler_logp: list[list[float]] | None = None  # where another program sampled


def to_batch(rollouts: Rollouts) -> Batch:
    """The core's Batch; equal prompt indices are one sampling unit."""
    return collate(rollouts.prompt_ids, rollouts.response_ids, rollouts.prompt_index)


def sampler_logp(rollouts: Rollouts, batch: Batch) -> Float[Tensor, "N R"] | None:
    """The sampler's own log-probabilities [N, R], where the rollouts bring them."""
    if rollouts.sampler_logp is None:
        return None
    mask_NR = response_mask(batch)
    logp_NR = torch.zeros(mask_NR.shape, dtype=torch.float64)
    flat = [x for row in rollouts.sampler_logp for x in row]
    logp_NR[mask_NR] = torch.tensor(flat, dtype=torch.float64)
    return logp_NR


def save_rollouts(rollouts: Rollouts, path: Path) -> None:
    """Write Parquet in SCHEMA."""
    count = len(rollouts.response_ids)
    columns = rollouts._asdict() | {"temperature": [rollouts.temperature] * count}
    arrays = [
        pa.nulls(count, field.type)
        if columns[field.name] is None
        else pa.array(columns[field.name], field.type)
        for field in SCHEMA
    ]
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), path)


def load_rollouts(path: Path, vocabulary: int, *, rewards: bool) -> Rollouts:
    """Read Parquet in SCHEMA; `rewards` says whether they are needed (U).

    Raises InputError, one line, for a file that is not Parquet, missing or ill-typed columns, no
    rows, an index that stands for two prompts, responses of zero tokens, ids outside the vocabulary,
    several temperatures, rewards that are not finite, or log-probabilities that do not match.
    """
    table = _read(path)
    needed = (*REQUIRED, "reward") if rewards else REQUIRED
    if missing := [name for name in needed if name not in table.column_names]:
        raise InputError(f"{path} has no column {missing[0]}: needed are {', '.join(needed)}")
    count = len(table)
    columns: dict[str, list[Any]] = {
        field.name: _column(path, table, field) if field.name in table.column_names else [None] * count
        for field in SCHEMA
    }
    _check(path, columns, needed, vocabulary)
    known: dict[str, Any] = {k: None if any(v is None for v in c) else c for k, c in columns.items()}
    return Rollouts(
        prompt_index=columns["prompt_index"],
        prompt=known["prompt"] or [""] * count,
        response=known["response"] or [""] * count,
        prompt_ids=columns["prompt_ids"],
        response_ids=columns["response_ids"],
        finish_reason=known["finish_reason"] or ["unknown"] * count,
        temperature=columns["temperature"][0],
        reward=known["reward"],
        advantage=known["advantage"],
        sampler_logp=known["sampler_logp"],
    )


def _read(path: Path) -> pa.Table:
    if not path.exists():
        raise InputError(f"{path}: no such file; give rollouts as a run writes them (Parquet)")
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:200]}): give rollouts "
            "as a run writes them"
        ) from error


def _column(path: Path, table: pa.Table, field: pa.Field) -> list[Any]:
    try:
        values: list[Any] = table[field.name].cast(field.type).to_pylist()
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: column {field.name} is {table.schema.field(field.name).type}, {field.type} is "
            "expected"
        ) from error
    return values


def _check(path: Path, columns: dict[str, list[Any]], needed: tuple[str, ...], vocabulary: int) -> None:
    if not columns["prompt_index"]:
        raise InputError(f"{path} has no rows: at least two prompts are needed")
    for name in needed:
        if None in columns[name]:
            raise InputError(f"{path}: row {columns[name].index(None)} has no {name}")
    prompts: dict[int, list[int]] = {}
    for i, index in enumerate(columns["prompt_index"]):
        x, y = columns["prompt_ids"][i], columns["response_ids"][i]
        if not x or not y:
            part = "response" if x else "prompt"
            raise InputError(f"{path}: row {i} has a {part} of zero tokens: at least one is needed")
        if not all(token is not None and 0 <= token < vocabulary for token in (*x, *y)):
            raise InputError(
                f"{path}: row {i} has a token id outside the model's {vocabulary}: these rollouts "
                "were made with another tokenizer"
            )
        if prompts.setdefault(index, x) != x:
            raise InputError(
                f"{path}: row {i} has another prompt than the rows before it with prompt_index {index}"
            )
    temperatures = sorted(set(columns["temperature"]))
    if len(temperatures) > 1 or not 0 < temperatures[0] < math.inf:
        shown = ", ".join(f"{t:g}" for t in temperatures)
        raise InputError(f"{path} has temperature {shown}: one positive number is expected")
    if "reward" in needed:
        for i, reward in enumerate(columns["reward"]):
            if not math.isfinite(reward):
                raise InputError(f"{path}: row {i} has reward {reward}, a finite number is expected")
    _check_sampler_logp(path, columns)


def _check_sampler_logp(path: Path, columns: dict[str, list[Any]]) -> None:
    rows = columns["sampler_logp"]
    if all(row is None for row in rows):
        return
    for i, (row, y) in enumerate(zip(rows, columns["response_ids"], strict=True)):
        if row is None or len(row) != len(y):
            found = 0 if row is None else len(row)
            raise InputError(f"{path}: row {i} has {found} sampler_logp for {len(y)} response tokens")
        # Half precision rounds a certain token's 0 to a little above it.
        if not all(logp is not None and -math.inf < logp < 0.01 for logp in row):
            raise InputError(
                f"{path}: row {i} has a sampler_logp that is no log-probability: finite numbers, at "
                "most 0, are expected (nats)"
            )
