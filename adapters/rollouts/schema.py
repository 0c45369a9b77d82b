"""Sampled batches as stored on disk, and as the core's Batch."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from funcprobe.policy.layout import collate, response_mask
from funcprobe.types import Batch, InputError

from ..strict_json import is_text
from .checks import (
    check_counts,
    check_ends,
    check_entropy_coef,
    check_generations,
    check_of_tokens,
    check_step,
    check_temperature,
    check_tokens,
)
from .columns import ABOUT, ALIASES, OF_LOSS, OF_STEP, OF_TOKENS, SCHEMA
from .files import Columns, read_columns, write_json, write_parquet
from .ragged import Ragged

REQUIRED = ("prompt_index", "prompt_ids", "response_ids", "temperature")
# Columns that are read of E, and of U besides those of its step.
_OF_E = (*REQUIRED, "finish_reason", "sampler_logp", "old_logp", "step")
_OF_U = (*_OF_E, *OF_LOSS)


class Rollouts(NamedTuple):
    """Sequences and what is known of each; a column that is unknown is None."""

    prompt_index: list[int]
    prompt: list[str]
    response: list[str]
    prompt_ids: Sequence[list[int]]
    response_ids: Sequence[list[int]]
    finish_reason: list[str]  # stop, length or unknown
    temperature: float
    reward: list[float] | None = None  # NaN: not applicable
    advantage: list[float] | None = None
    sampler_logp: Sequence[list[float]] | None = None  # if another program sampled; NaN in U: unknown
    step: int | None = None  # that the responses make, if it is known
    old_logp: Sequence[list[float]] | None = None  # None: those of theta itself
    ref_logp: Sequence[list[float]] | None = None
    loss_mask: Sequence[list[bool]] | None = None  # None: all response tokens are in the loss
    microbatch: list[int] | None = None
    process: list[int] | None = None
    generated_tokens: list[float] | None = None  # of each row's generation
    entropy_coef: float | None = None


def to_batch(rollouts: Rollouts) -> Batch:
    """The core's Batch; equal prompt indices form one sampling unit."""
    return collate(rollouts.prompt_ids, rollouts.response_ids, rollouts.prompt_index)


def sampler_logp(rollouts: Rollouts, batch: Batch) -> Float[Tensor, "N R"] | None:
    """The sampler log-probabilities, [N, R] in nats; None if the rollouts have none."""
    if rollouts.sampler_logp is None:
        return None
    return padded(rollouts.sampler_logp, batch)


def padded(rows: Sequence[Sequence[float]], batch: Batch) -> Float[Tensor, "N R"]:
    """A number for every response token as [N, R], float64; 0 past the end of a response."""
    mask_NR = response_mask(batch)
    values_NR = torch.zeros(mask_NR.shape, dtype=torch.float64)
    flat = rows.flat if isinstance(rows, Ragged) else [x for row in rows for x in row]
    values_NR[mask_NR] = torch.tensor(flat, dtype=torch.float64)
    return values_NR


def save_rollouts(rollouts: Rollouts, path: Path) -> None:
    """Write SCHEMA, as JSON lines if the path ends in .jsonl or .json, else as Parquet."""
    count = len(rollouts.response_ids)
    columns: dict[str, Any] = {
        k: v if isinstance(v, list | Ragged) else [v] * count for k, v in rollouts._asdict().items()
    }
    columns["finish_reason"] = [None if x == "unknown" else x for x in rollouts.finish_reason]
    for name in ("reward", "advantage"):
        columns[name] = [None if x is None or math.isnan(x) else x for x in columns[name]]
    (write_json if path.suffix in {".jsonl", ".json"} else write_parquet)(columns, SCHEMA, path)


def load_rollouts(
    path: Path | str,
    vocabulary: int,
    *,
    rewards: bool,
    advantages: bool = False,
    eos_ids: Collection[int] = (),
) -> Rollouts:
    """Read SCHEMA from Parquet or JSON lines; see `parse_rollouts`."""
    return parse_rollouts(
        read_columns(Path(path), "schema"),
        vocabulary,
        rewards=rewards,
        advantages=advantages,
        eos_ids=eos_ids,
    )


def parse_rollouts(
    file: Columns,
    vocabulary: int,
    *,
    rewards: bool,
    advantages: bool = False,
    eos_ids: Collection[int] = (),
) -> Rollouts:
    """Columns of SCHEMA -> Rollouts; `rewards`, `advantages`: whether these are required (for U).

    Only what is used is checked beyond its type: of E no reward, no advantage, and none of the columns
    that only a loss depends on.

    Raises InputError, one line that names the row, for missing, misnamed or ill-typed columns, no
    rows, an index with two prompts, zero tokens, ids outside the vocabulary, several temperatures, a
    required reward or advantage that is not a finite number, several steps, log-probabilities or masks
    that do not match, an E of an earlier policy than that of its step, and, if `eos_ids` are given, for
    a response whose end contradicts finish_reason, or with tokens of the policy after its first EOS.
    """
    if not file.place:
        raise InputError(f"{file.path} has no rows: at least two prompts are needed")
    needed = REQUIRED + ("reward",) * rewards + ("advantage",) * advantages
    of_E = not (rewards or advantages)
    used = _OF_E if of_E else _OF_U + ("reward",) * rewards + ("advantage",)
    _require_columns(file, needed, used)
    columns: dict[str, Any] = {field.name: _typed(file, field) for field in SCHEMA}
    for name in needed:
        _require_whole(file, name, columns[name])
    optional = ("sampler_logp",) if of_E else (*OF_TOKENS, *OF_STEP)
    for name in optional + ("advantage",) * rewards:
        if any(value is not None for value in columns[name]):
            _require_whole(file, name, columns[name])
    if not of_E:
        _require_finite(file, "reward", columns["reward"], nan=not rewards)
        _require_finite(file, "advantage", columns["advantage"])
    check_tokens(file, columns, vocabulary)
    check_temperature(file, columns["temperature"])
    for name in ("sampler_logp",) if of_E else OF_TOKENS:
        check_of_tokens(file, name, columns, unknown=not of_E and name == "sampler_logp")
    if of_E:
        _require_own_samples(file, columns)
    else:
        check_counts(file, columns)
        check_generations(file, columns)
        check_entropy_coef(file, columns["entropy_coef"])
    check_ends(file, columns, eos_ids, masked=not of_E)
    check_step(file, columns["step"])
    return Rollouts(
        prompt_index=columns["prompt_index"],
        prompt=[x or "" for x in columns["prompt"]],
        response=[x or "" for x in columns["response"]],
        prompt_ids=columns["prompt_ids"],
        response_ids=columns["response_ids"],
        finish_reason=[x or "unknown" for x in columns["finish_reason"]],
        temperature=columns["temperature"][0],
        reward=_known(columns["reward"]),
        advantage=_known(columns["advantage"]),
        sampler_logp=_whole(columns["sampler_logp"]),
        step=columns["step"][0],
        old_logp=_whole(columns["old_logp"]),
        ref_logp=_whole(columns["ref_logp"]),
        loss_mask=_whole(columns["loss_mask"]),
        microbatch=_whole(columns["microbatch"]),
        process=_whole(columns["process"]),
        generated_tokens=_whole(columns["generated_tokens"]),
        entropy_coef=columns["entropy_coef"][0],
    )


def _require_columns(file: Columns, needed: Sequence[str], read: Sequence[str]) -> None:
    there = file.values.keys()
    for name in read:
        if name in there:
            continue
        if alias := next((a for a in ALIASES.get(name, ()) if a in there), None):
            raise InputError(
                f"{file.path} has no column {name} but a column {alias}: rename it, or remove it if it "
                f"is not {name} ({ABOUT[name]})"
            )
    if missing := [name for name in needed if name not in there]:
        raise InputError(
            f"{file.path} has no column {missing[0]}: {', '.join(needed)} are needed; its columns are: "
            f"{', '.join(there) or 'none'}"
        )


def _typed(file: Columns, field: pa.Field) -> Sequence[Any]:
    """The column in the field's type; InputError for the first value of another type."""
    values = file.values.get(field.name, [None] * len(file.place))
    if isinstance(values, Ragged):  # read as what SCHEMA has
        return values
    of_list = pa.types.is_list(field.type)
    one = field.type.value_type if of_list else field.type
    good, single, several = _KINDS[one]
    typed: list[Any] = []
    for place, value in zip(file.place, values, strict=True):
        parts = value if of_list and isinstance(value, list) else [value]
        if value is not None and (isinstance(value, list) != of_list or not all(map(good, parts))):
            bad = next((x for x in parts if not good(x)), value)
            raise InputError(
                f"{file.path}: {place} has {bad!r:.60} in {field.name}, "
                f"{f'a list of {several}' if of_list else single} is expected"
            )
        typed.append(value)
    if not pa.types.is_floating(one):
        return typed
    return [[*map(float, x)] if isinstance(x, list) else x if x is None else float(x) for x in typed]


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    # An integer beyond 2^53 is not exact as a double.
    return isinstance(value, float) or (type(value) is int and abs(value) <= 2**53)


_KINDS = {
    pa.int64(): (_is_integer, "an integer", "integers"),
    pa.float64(): (_is_number, "a number", "numbers"),
    pa.string(): (is_text, "Unicode text", "texts"),
    pa.bool_(): (lambda value: isinstance(value, bool), "true or false", "true and false"),
}


def _require_own_samples(file: Columns, columns: dict[str, list[Any]]) -> None:
    """InputError for an E with old_logp alone: it may be of a policy before that of its step."""
    if columns["sampler_logp"][0] is None and any(row is not None for row in columns["old_logp"]):
        raise InputError(
            f"{file.path} has old_logp and no sampler_logp: an earlier policy may have sampled these "
            "responses, so that E needs importance ratios; rename old_logp to sampler_logp"
        )


def _whole(values: Any) -> Any:
    return None if None in values else values


def _known(values: list[float | None]) -> list[float] | None:
    if all(value is None for value in values):
        return None
    return [math.nan if value is None else value for value in values]


def _require_whole(file: Columns, name: str, values: Sequence[Any]) -> None:
    if None not in values:
        return
    whole = (*REQUIRED, "advantage")
    remedy = "fill it in" if name in whole else "fill it in, or drop the whole column"
    if name == "reward":
        remedy = 'drop the row, or set objective.advantage = "rollouts" to use the column advantage'
    raise InputError(f"{file.path}: {file.place[values.index(None)]} has no {name}: {remedy}")


def _require_finite(file: Columns, name: str, values: list[float | None], *, nan: bool = False) -> None:
    """InputError for a number that is not finite, or if `nan`, infinite; None is missing."""
    for place, value in zip(file.place, values, strict=True):
        if value is not None and not (math.isfinite(value) or (nan and math.isnan(value))):
            raise InputError(f"{file.path}: {place} has {name} {value}, a finite number is expected")
