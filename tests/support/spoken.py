"""A run folder whose responses say what a test wants."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from support.saved_runs import copied

SHARES = ("share", "marginal", "direct", "score", "control")


class Said(NamedTuple):
    """A response, by its tokens."""

    tokens: Sequence[str]
    special: Sequence[int] = ()
    """Places of special tokens."""
    prompt: str = "1+2="
    prompt_index: int = 0


def speaking(folder: Path, target: Path, said: Sequence[Said], **columns: Sequence[float]) -> Path:
    """A copy in which the responses of U, and of E, are these, with other numbers drawn at random.

    `columns` of tokens.parquet, all responses' in a row, as share=[...]; both batches have them.
    """
    draw = np.random.default_rng(1)
    copied(folder, target)
    lengths = [len(one.tokens) for one in said]
    texts = [text for one in said for text in one.tokens]
    special = [i in one.special for one in said for i in range(len(one.tokens))]
    rows, count = len(texts), len(said)
    made: dict[str, list[pa.Table]] = {"tokens": [], "sequences": []}
    for batch in "UE":
        tokens = _drawn(folder / "tokens.parquet", batch, rows, draw)
        numbers = {
            name: columns.get(name, draw.standard_t(2, rows) * 10.0 ** draw.integers(-8, 1))
            for name in (*SHARES, "logp", "entropy", "coef_logp")
            if tokens[name].null_count == 0
        }
        position = [i for length in lengths for i in range(length)]
        sequence = np.repeat(np.arange(count), lengths)
        prompts = [said[i].prompt_index for i in sequence]
        responses = _drawn(folder / "sequences.parquet", batch, count, draw)
        advantages = responses["advantage"].to_pylist()
        fixed = {
            "text": texts,
            "token": texts,
            "special": special,
            "position": position,
            "sequence": sequence,
            "prompt_index": prompts,
            "advantage": [advantages[i] for i in sequence],
        }
        made["tokens"].append(_with(tokens, numbers | fixed))
        of_response = [
            {name: float(np.sum(numbers[name][sequence == i])) for name in SHARES if name in numbers}
            for i in range(count)
        ]
        made["sequences"].append(
            _with(
                responses,
                {
                    "sequence": np.arange(count),
                    "prompt_index": [one.prompt_index for one in said],
                    "prompt": [one.prompt for one in said],
                    "response": ["".join(one.tokens) for one in said],
                    "response_tokens": lengths,
                    **{n: [one[n] for one in of_response] for n in of_response[0]},
                },
            )
        )
    for name, tables in made.items():
        pq.write_table(pa.concat_tables(tables), target / f"{name}.parquet")
    return target


def tokens_of(folder: Path, batch: str, sequence: int) -> list[dict[str, Any]]:
    """The rows of tokens.parquet of a response, in their order."""
    rows = pq.read_table(folder / "tokens.parquet").to_pylist()
    return [row for row in rows if row["batch"] == batch and row["sequence"] == sequence]


def _drawn(path: Path, batch: str, rows: int, draw: np.random.Generator) -> pa.Table:
    table = pq.read_table(path)
    table = table.filter(pc.equal(table["batch"], batch))
    return table.take(draw.integers(0, len(table), rows))


def _with(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    for name, values in columns.items():
        at = table.column_names.index(name)
        field = table.schema.field(name)
        table = table.set_column(at, field, pa.array(values, type=field.type))
    return table
