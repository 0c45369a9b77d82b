"""Rollouts on disk: every column comes back; what cannot be probed is refused by row."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from funcprobe.adapters.rollouts import (
    SCHEMA,
    Rollouts,
    load_rollouts,
    sampler_logp,
    save_rollouts,
    to_batch,
)
from funcprobe.types import InputError

FULL = Rollouts(
    prompt_index=[4, 4, 1],
    prompt=["one", "one", "zwei\n"],
    response=["a", "", "ü"],
    prompt_ids=[[1, 2], [1, 2], [3]],
    response_ids=[[5, 6, 7], [8], [9, 0]],
    finish_reason=["stop", "length", "stop"],
    temperature=0.7,
    reward=[1.0, 0.25, -3.0],
    advantage=[0.5, -0.5, 0.1],
    sampler_logp=[[-0.1, -2.0, -1e-9], [0.0], [-3.5, -30.0]],
)
BARE = Rollouts(
    prompt_index=[0, 1],
    prompt=["", ""],
    response=["", ""],
    prompt_ids=[[1], [2]],
    response_ids=[[3], [4]],
    finish_reason=["unknown", "unknown"],
    temperature=1.0,
)


@pytest.mark.parametrize("rollouts", [FULL, BARE])
def test_every_column_comes_back(tmp_path, rollouts) -> None:
    save_rollouts(rollouts, tmp_path / "r.parquet")
    assert load_rollouts(tmp_path / "r.parquet", 10, rewards=False) == rollouts
    assert pq.read_schema(tmp_path / "r.parquet").equals(SCHEMA)


def test_the_needed_columns_are_enough_in_any_integer_type(tmp_path) -> None:
    """As another program may write them: int32, large lists, a column more, another order."""
    table = pa.table(
        {
            "temperature": pa.array([1.0, 1.0], pa.float32()),
            "response_ids": pa.array([[3], [4]], pa.large_list(pa.int32())),
            "prompt_ids": pa.array([[1], [2]], pa.list_(pa.int32())),
            "prompt_index": pa.array([0, 1], pa.int16()),
            "mine": ["x", "y"],
        }
    )
    pq.write_table(table, tmp_path / "r.parquet")
    assert load_rollouts(tmp_path / "r.parquet", 10, rewards=False) == BARE


def test_the_batch_keeps_rows_and_units_apart() -> None:
    batch = to_batch(FULL)
    assert batch.prompt_N.tolist() == [4, 4, 1]
    assert batch.tokens_NL.tolist() == [[1, 2, 5, 6, 7], [1, 2, 8, 0, 0], [3, 9, 0, 0, 0]]
    assert batch.response_length_N.tolist() == [3, 1, 2]
    expected = torch.tensor([[-0.1, -2.0, -1e-9], [0, 0, 0], [-3.5, -30.0, 0]], dtype=torch.float64)
    assert torch.equal(sampler_logp(FULL, batch), expected)
    assert sampler_logp(BARE, to_batch(BARE)) is None


def columns(**changes: list) -> dict[str, list]:
    found = FULL._asdict() | {"temperature": [0.7] * 3}
    return {k: v for k, v in (found | changes).items() if v is not None}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"response_ids": None}, "has no column response_ids: needed are prompt_index"),
        ({"reward": None}, "has no column reward"),
        ({"response_ids": [[5, 6, 7], [], [9, 0]]}, "row 1 has a response of zero tokens"),
        ({"response_ids": [[5, 6, 7], None, [9, 0]]}, "row 1 has no response_ids"),
        ({"prompt_ids": [[1, 2], [1, 2], []]}, "row 2 has a prompt of zero tokens"),
        ({"response_ids": [[5, 6, 10], [8], [9, 0]]}, "row 0 has a token id outside the model's 10"),
        ({"response_ids": [[5, 6, 7], [-1], [9, 0]]}, "row 1 has a token id outside"),
        ({"response_ids": [[5, None, 7], [8], [9, 0]]}, "row 0 has a token id outside"),
        ({"response_ids": [["a"], ["b"], ["c"]]}, "column response_ids is list<"),
        ({"prompt_index": ["a", "b", "c"]}, "column prompt_index is string, int64 is expected"),
        ({"prompt_index": [4, None, 1]}, "row 1 has no prompt_index"),
        ({"prompt_index": [4, 4, 4]}, "row 2 has another prompt than the rows before it"),
        ({"temperature": [0.7, 1.0, 0.7]}, "temperature 0.7, 1: one positive number"),
        ({"temperature": [0.0, 0.0, 0.0]}, "temperature 0: one positive number"),
        ({"temperature": [NAN, NAN, NAN]}, "temperature nan"),
        ({"temperature": [0.7, None, 0.7]}, "row 1 has no temperature"),
        ({"reward": [1.0, NAN, 0.0]}, "row 1 has reward nan, a finite number"),
        ({"reward": [1.0, 0.0, INF]}, "row 2 has reward inf"),
        ({"reward": [1.0, None, 0.0]}, "row 1 has no reward"),
        ({"sampler_logp": [[-0.1, -2.0], [0.0], [-3.5, -3.0]]}, "row 0 has 2 sampler_logp for 3"),
        ({"sampler_logp": [[-0.1, -2.0, -1.0], None, [-3.5, -3.0]]}, "row 1 has 0 sampler_logp for 1"),
        ({"sampler_logp": [[-0.1, NAN, -1.0], [0.0], [-3.5, -3.0]]}, "no log-probability"),
        ({"sampler_logp": [[-0.1, None, -1.0], [0.0], [-3.5, -3.0]]}, "no log-probability"),
        ({"sampler_logp": [[-0.1, -INF, -1.0], [0.0], [-3.5, -3.0]]}, "no log-probability"),
        ({"sampler_logp": [[-0.1, -2.0, -1.0], [0.3], [-3.5, -3.0]]}, "row 1 has a sampler_logp that"),
    ],
)
def test_what_cannot_be_probed(tmp_path, changes, said) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(columns(**changes)), path)
    with pytest.raises(InputError) as caught:
        load_rollouts(path, 10, rewards=True)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rewards_are_asked_for_only_where_they_are_needed(tmp_path) -> None:
    pq.write_table(pa.table(columns(reward=[NAN, None, 1.0])), tmp_path / "r.parquet")
    assert load_rollouts(tmp_path / "r.parquet", 10, rewards=False).reward is None


def test_files_that_are_no_rollouts(tmp_path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            load_rollouts(path, 10, rewards=False)
        return str(caught.value)

    assert "no such file" in said(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("prompt_index\n1\n")
    assert "cannot be read as Parquet" in said(tmp_path / "text.parquet")
    save_rollouts(FULL, tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    assert "cannot be read as Parquet" in said(tmp_path / "cut.parquet")
    pq.write_table(SCHEMA.empty_table(), tmp_path / "empty.parquet")
    assert "has no rows" in said(tmp_path / "empty.parquet")
    twice = pa.Table.from_arrays([pa.array([1])] * 2, names=["prompt_index"] * 2)
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "Multiple matches" in said(tmp_path / "twice.parquet")
