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
from .checks import check_ends, check_sampler_logp, check_step, check_temperature, check_tokens
from .files import Columns, read_columns, write_json, write_parquet

_ABOUT = {
    "prompt_index": "int, required: index of the prompt and so of the group; equal for equal prompts",
    "prompt": "text, optional: the prompt as text; not used in computations",
    "response": "text, optional: the response as text; not used in computations",
    "prompt_ids": "ints, required: the prompt as given to the policy, without padding",
    "response_ids": "ints, required: the sampled tokens, up to and including the first EOS",
    "finish_reason": "text, optional: stop (ends in an EOS) or length (cut off); checked against "
    "response_ids; null for another reason, such as a stop string",
    "temperature": "float, required: of sampling from softmax(logits / temperature); equal in all rows",
    "reward": 'float: required for U unless objective.advantage = "rollouts"; null: not applicable',
    "advantage": 'float, optional: required for U with objective.advantage = "rollouts"',
    "sampler_logp": "floats, optional: log-probability of every response token under the program "
    "that sampled it (nats, at this temperature); in E it gives the importance ratios",
    "step": "int, optional: the optimizer step that these responses make, one more than the steps "
    "taken by the policy that sampled them; equal in all rows, and checked against the checkpoint",
}
_TYPES = {
    "prompt_index": pa.int64(),
    "prompt": pa.string(),
    "response": pa.string(),
    "prompt_ids": pa.list_(pa.int64()),
    "response_ids": pa.list_(pa.int64()),
    "finish_reason": pa.string(),
    "temperature": pa.float64(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "sampler_logp": pa.list_(pa.float64()),
    "step": pa.int64(),
}
SCHEMA = pa.schema([pa.field(n, t, metadata={"about": _ABOUT[n]}) for n, t in _TYPES.items()])
"""One row per response, in Parquet (.parquet) or as JSON lines (.jsonl, .json); the metadata "about" of
a field states its meaning, and whether it is optional. In JSON lines null is the same as missing. Other
columns are allowed and ignored."""

REQUIRED = ("prompt_index", "prompt_ids", "response_ids", "temperature")
_OF_E = (*REQUIRED, "finish_reason", "sampler_logp", "step")  # columns that are read of E

# Names of these columns in other programs. Under such a name a column would be ignored silently.
_ALIASES = {
    "prompt_index": ("group", "group_id", "group_index", "prompt_id", "uid"),
    "prompt_ids": ("prompt_token_ids", "input_ids"),
    "response_ids": ("completion_ids", "response_token_ids", "output_ids", "token_ids"),
    "reward": ("rewards", "score", "scores"),
    "advantage": ("advantages",),
    "finish_reason": ("finish_reasons", "stop_reason"),
    "sampler_logp": ("logprobs", "logps", "sampler_logps", "sampling_logps", "old_logps"),
}


class Rollouts(NamedTuple):
    """Sequences and what is known of each; a column that is unknown is None."""

    prompt_index: list[int]
    prompt: list[str]
    response: list[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    finish_reason: list[str]  # stop, length or unknown
    temperature: float
    reward: list[float] | None = None  # NaN: not applicable
    advantage: list[float] | None = None
    sampler_logp: list[list[float]] | None = None  # if another program sampled
    step: int | None = None  # that the responses make, if it is known


def to_batch(rollouts: Rollouts) -> Batch:
    """The core's Batch; equal prompt indices form one sampling unit."""
    return collate(rollouts.prompt_ids, rollouts.response_ids, rollouts.prompt_index)


def sampler_logp(rollouts: Rollouts, batch: Batch) -> Float[Tensor, "N R"] | None:
    """The sampler log-probabilities, [N, R] in nats; None if the rollouts have none."""
    if rollouts.sampler_logp is None:
        return None
    mask_NR = response_mask(batch)
    logp_NR = torch.zeros(mask_NR.shape, dtype=torch.float64)
    flat = [x for row in rollouts.sampler_logp for x in row]
    logp_NR[mask_NR] = torch.tensor(flat, dtype=torch.float64)
    return logp_NR


def save_rollouts(rollouts: Rollouts, path: Path) -> None:
    """Write SCHEMA, as JSON lines if the path ends in .jsonl or .json, else as Parquet."""
    count = len(rollouts.response_ids)
    columns: dict[str, Any] = {
        k: [None] * count if v is None else v for k, v in rollouts._asdict().items()
    }
    columns["temperature"] = [rollouts.temperature] * count
    columns["step"] = [rollouts.step] * count
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
        read_columns(Path(path)), vocabulary, rewards=rewards, advantages=advantages, eos_ids=eos_ids
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

    Only what is used is checked beyond its type: in E no reward and no advantage, in U no sampler_logp.

    Raises InputError, one line that names the row, for missing, misnamed or ill-typed columns, no
    rows, an index with two prompts, zero tokens, ids outside the vocabulary, several temperatures, a
    required reward or advantage that is not a finite number, several steps, log-probabilities that do
    not match, and, if `eos_ids` are given, for a response whose end contradicts finish_reason, or with
    tokens after its first EOS.
    """
    if not file.place:
        raise InputError(f"{file.path} has no rows: at least two prompts are needed")
    needed = REQUIRED + ("reward",) * rewards + ("advantage",) * advantages
    _require_columns(
        file, needed, _OF_E + ("reward",) * rewards + ("advantage",) * (rewards or advantages)
    )
    columns = {field.name: _typed(file, field) for field in SCHEMA}
    for name in needed:
        _require_whole(file, name, columns[name])
    of_E = not (rewards or advantages)
    for name in ("sampler_logp",) * of_E + ("advantage",) * rewards:
        if any(value is not None for value in columns[name]):
            _require_whole(file, name, columns[name])
    if not of_E:
        _require_finite(file, "reward", columns["reward"], nan=not rewards)
        _require_finite(file, "advantage", columns["advantage"])
    check_tokens(file, columns, vocabulary)
    check_ends(file, columns, eos_ids)
    check_temperature(file, columns["temperature"])
    if of_E:
        check_sampler_logp(file, columns)
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
        sampler_logp=None if None in columns["sampler_logp"] else columns["sampler_logp"],
        step=columns["step"][0],
    )


def _require_columns(file: Columns, needed: Sequence[str], read: Sequence[str]) -> None:
    there = file.values.keys()
    for name in read:
        if name in there:
            continue
        if alias := next((a for a in _ALIASES.get(name, ()) if a in there), None):
            raise InputError(
                f"{file.path} has no column {name} but a column {alias}: rename it, or remove it if it "
                f"is not {name} ({_ABOUT[name]})"
            )
    if missing := [name for name in needed if name not in there]:
        raise InputError(
            f"{file.path} has no column {missing[0]}: {', '.join(needed)} are needed; its columns are: "
            f"{', '.join(there) or 'none'}"
        )


def _typed(file: Columns, field: pa.Field) -> list[Any]:
    """The column in the field's type; InputError for the first value of another type."""
    values = file.values.get(field.name, [None] * len(file.place))
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
}


def _known(values: list[float | None]) -> list[float] | None:
    if all(value is None for value in values):
        return None
    return [math.nan if value is None else value for value in values]


def _require_whole(file: Columns, name: str, values: list[Any]) -> None:
    if None not in values:
        return
    remedy = "fill it in, or drop the whole column" if name == "sampler_logp" else "fill it in"
    if name == "reward":
        remedy = 'drop the row, or set objective.advantage = "rollouts" to use the column advantage'
    raise InputError(f"{file.path}: {file.place[values.index(None)]} has no {name}: {remedy}")


def _require_finite(file: Columns, name: str, values: list[float | None], *, nan: bool = False) -> None:
    """InputError for a number that is not finite, or if `nan`, infinite; None is missing."""
    for place, value in zip(file.place, values, strict=True):
        if value is not None and not (math.isfinite(value) or (nan and math.isnan(value))):
            raise InputError(f"{file.path}: {place} has {name} {value}, a finite number is expected")
