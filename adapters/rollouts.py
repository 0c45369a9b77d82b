"""Sampled batches as they are stored: token by token, in Parquet, and as the core's Batch."""

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

    Raises InputError, one line, for a file that is not Parquet, missing columns, responses of zero
    tokens, ids outside the vocabulary, several temperatures, or log-probabilities that do not match.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:200]}): give rollouts "
            "as a run writes them"
        ) from error
    needed = (*REQUIRED, "reward") if rewards else REQUIRED
    if missing := [name for name in needed if name not in table.column_names]:
        raise InputError(f"{path} has no column {missing[0]}: needed are {', '.join(needed)}")
    columns: dict[str, Any] = {
        name: table[name].to_pylist() if name in table.column_names else [None] * len(table)
        for name in SCHEMA.names
    }
    _check(path, columns, needed, vocabulary)
    known: dict[str, Any] = {k: None if any(v is None for v in c) else c for k, c in columns.items()}
    count = len(table)
    return Rollouts(
        prompt_index=columns["prompt_index"],
        prompt=known["prompt"] or [""] * count,
        response=known["response"] or [""] * count,
        prompt_ids=columns["prompt_ids"],
        response_ids=columns["response_ids"],
        finish_reason=known["finish_reason"] or ["unknown"] * count,
        temperature=columns["temperature"][0],
        reward=known["reward"],
        sampler_logp=known["sampler_logp"],
    )


def _check(path: Path, columns: dict[str, list[Any]], needed: tuple[str, ...], vocabulary: int) -> None:
    if not columns["prompt_index"]:
        raise InputError(f"{path} has no rows: at least two prompts are needed")
    for name in needed:
        if None in columns[name]:
            raise InputError(f"{path}: row {columns[name].index(None)} has no {name}")
    for i, (x, y) in enumerate(zip(columns["prompt_ids"], columns["response_ids"], strict=True)):
        if not x or not y:
            part = "response" if x else "prompt"
            raise InputError(f"{path}: row {i} has a {part} of zero tokens: at least one is needed")
        if min(*x, *y) < 0 or max(*x, *y) >= vocabulary:
            raise InputError(
                f"{path}: row {i} has a token id outside the model's {vocabulary}: these rollouts "
                "were made with another tokenizer"
            )
        logp = columns["sampler_logp"][i]
        if logp is not None and len(logp) != len(y):
            raise InputError(
                f"{path}: row {i} has {len(logp)} sampler_logp for {len(y)} response tokens"
            )
    if len(temperatures := sorted(set(columns["temperature"]))) > 1:
        raise InputError(f"{path} mixes temperatures {temperatures}: one is expected")
