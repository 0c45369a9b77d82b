"""Rollouts of many rows: read in batches into arrays, and equal to the lists that they stand for."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.adapters.rollouts import SCHEMA, load_rollouts, sampler_logp, to_batch, whole
from funcprobe.adapters.rollouts import files as module
from funcprobe.adapters.rollouts.files import read_columns
from funcprobe.adapters.rollouts.ragged import Ragged, joined, of_rows
from funcprobe.types import InputError

VOCABULARY, EOS = 50_000, (1,)


def rows(count: int, tokens: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "prompt_index": i // 4,
            "prompt_ids": [3 + i // 4, 4, 40_000],
            "response_ids": [*rng.integers(2, VOCABULARY, tokens - i % 3).tolist(), 1],
            "finish_reason": "stop",
            "temperature": 1.0,
            "sampler_logp": (-rng.exponential(2.0, tokens - i % 3 + 1)).tolist(),
            "note": {"other": "x" * 100},
        }
        for i in range(count)
    ]


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        types = [(n, SCHEMA.field(n).type) for n in found[0] if n in SCHEMA.names]
        table = pa.Table.from_pylist(found)
        for name, kind in types:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
        pq.write_table(table, path, row_group_size=70)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 16)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_columns_of_numbers_are_arrays_with_the_values_of_the_file(ending, tmp_path) -> None:
    made = rows(100)
    path = written(tmp_path / f"e.{ending}", made)
    found = load_rollouts(path, VOCABULARY, rewards=False, eos_ids=EOS)
    for name in ("prompt_ids", "response_ids", "sampler_logp"):
        column = getattr(found, name)
        assert isinstance(column, Ragged)
        assert column == [row[name] for row in made]
        assert list(column) == [row[name] for row in made]
        assert column[-1] == made[-1][name]
        assert type(column[0][0]) is type(made[0][name][0])
    batch, seventh = to_batch(found), made[7]
    ids = [*seventh["prompt_ids"], *seventh["response_ids"]]
    assert batch.tokens_NL[7].tolist()[: len(ids)] == ids
    logp_NR = sampler_logp(found, batch)
    assert logp_NR is not None
    assert logp_NR[7].tolist()[: len(ids) - 3] == seventh["sampler_logp"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_part_of_the_columns_is_read(ending, tmp_path) -> None:
    path = written(tmp_path / f"e.{ending}", rows(40))
    every = read_columns(path).values
    schema, others = (read_columns(path, part).values for part in ("schema", "others"))
    assert every.keys() == schema.keys() == others.keys()
    assert schema["note"] == () != every["note"]
    assert others["note"] == every["note"]
    assert others["response_ids"] == ()


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("response_ids", [5, VOCABULARY, 1], "a token id outside the model's"),
        ("response_ids", [-1, 1], "a token id outside the model's"),
        ("response_ids", [], "a response of zero tokens"),
        ("prompt_ids", [9], "another prompt than the rows before it with prompt_index 17"),
        ("response_ids", [5, 1, 6, 1], "tokens after its first end-of-sequence token"),
        ("response_ids", [5, 6], "finish_reason stop but no end-of-sequence token at its end"),
        ("finish_reason", "length", "finish_reason length but ends in an end-of-sequence token"),
        ("finish_reason", "eos", "finish_reason 'eos', stop, length or null is expected"),
        ("sampler_logp", [-1.0], r"1 sampler_logp for \d+ response tokens"),
        ("sampler_logp", None, "has no sampler_logp"),
    ],
)
def test_the_row_that_fails_is_named(ending, column, value, said, tmp_path) -> None:
    made = rows(100)
    made[70] |= {column: value}
    if column == "response_ids" and value:
        made[70] |= {"sampler_logp": [-1.0] * len(value)}
    path = written(tmp_path / f"e.{ending}", made)
    place = "row 70" if ending == "parquet" else "line 71"
    with pytest.raises(InputError, match=f"{place} has .*{said}|{place} has {said}|{place} {said}"):
        load_rollouts(path, VOCABULARY, rewards=False, eos_ids=EOS)


@pytest.mark.parametrize("value", [math.inf, 0.5, math.nan])
def test_a_log_probability_that_is_none_is_named(value, tmp_path) -> None:
    made = rows(100)
    made[70]["sampler_logp"][3] = value
    path = written(tmp_path / "e.parquet", made)
    with pytest.raises(InputError, match="row 70 has sampler_logp that is not a log-probability"):
        load_rollouts(path, VOCABULARY, rewards=False, eos_ids=EOS)


def test_a_mask_excuses_what_a_tool_wrote(tmp_path) -> None:
    columns: dict[str, Any] = {
        "response_ids": of_rows([[5, 1, 6, 1], [1]], "int"),
        "loss_mask": of_rows([[True, True, False, True], [True]], "bool"),
        "finish_reason": ["stop", None],
    }
    assert whole.ends_are_right(columns, EOS, masked=True)
    assert not whole.ends_are_right(columns, EOS, masked=False)
    columns["loss_mask"] = of_rows([[True, True, True, True], [True]], "bool")
    assert not whole.ends_are_right(columns, EOS, masked=True)


numbers = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "bool": st.booleans(),
}


@given(
    st.sampled_from(sorted(numbers)).flatmap(
        lambda kind: st.tuples(st.just(kind), st.lists(st.lists(numbers[kind], max_size=4), max_size=9))
    )
)
def test_any_lists_come_back(case: tuple[str, list[list[Any]]]) -> None:
    kind, lists = case
    found = of_rows(lists, kind)
    assert found is not None
    assert list(found) == lists
    assert found == lists == found
    assert [found[i] for i in range(len(lists))] == lists
    assert found[1:3] == lists[1:3]
    if lists:
        assert list(joined([found, found])) == lists * 2
        assert found != [*lists[:-1], [*lists[-1], lists]]
    flat = [i for i, row in enumerate(lists) for _ in row]
    assert found.row_of(np.arange(len(flat))).tolist() == flat


@pytest.mark.parametrize(
    ("lists", "kind"),
    [
        ([[1], None], "int"),
        ([[1, 2.0]], "int"),
        ([[True]], "int"),
        ([[2**63]], "int"),
        ([[2**53 + 1]], "float"),
        ([["1"]], "float"),
        ([[1]], "bool"),
        ([(1,)], "int"),
    ],
)
def test_what_is_not_of_the_kind_stays_a_list(lists, kind) -> None:
    assert of_rows(lists, kind) is None


def test_memory_is_that_of_the_numbers(tmp_path) -> None:
    """Token ids in four bytes, log-probabilities in eight; Python's objects would take forty each."""
    tokens = 400
    path = written(tmp_path / "e.parquet", rows(400, tokens))
    tracemalloc.start()
    found = load_rollouts(path, VOCABULARY, rewards=False, eos_ids=EOS)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    count = 400 * tokens
    assert held < 30 * count
    assert peak < 50 * count
    assert sum(map(len, found.response_ids)) > 0.9 * count
