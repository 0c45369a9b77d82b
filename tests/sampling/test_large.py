"""Data sets of very many rows: the same rows as if all were read, the same draws, the same prompts."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from funcprobe.adapters.sampling import large
from funcprobe.adapters.sampling.large import LargeRows, OfDataset, open_rows
from funcprobe.adapters.sampling.sources import read_rows
from funcprobe.adapters.stages import large_prompts
from funcprobe.adapters.stages.eval_source import load_eval
from funcprobe.adapters.trainers import ProbeCallback, live
from funcprobe.types import InputError
from support.trainers import grpo_trainer, outcome, plain_trainer, probe_config

ROWS = [
    {"prompt": f"{i}+{i * 7 % 11}=", "n": i, "x": i / 3, "s": "\u2028\u00e4" if i % 5 == 0 else None}
    for i in range(60)
]


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE", 10)
    monkeypatch.setattr(large, "BATCH", 7)
    monkeypatch.setattr(large, "CHUNK", 64)
    monkeypatch.setattr(large_prompts, "FIRST", 3)


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / kind
    if kind.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=13)
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    elif kind.endswith(".csv"):
        Dataset.from_list(rows).to_csv(path)
    elif kind == "array.json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
        ends = ["\r\n", "\n", "\n \t\n", "\n\n", "\n\u3000\n"]
        text = "\ufeff\n" + "".join(line + ends[i % 5] for i, line in enumerate(lines))
        path.write_bytes(text.rstrip("\n" if kind == "a.jsonl" else "").encode())
    return str(path)


KINDS = ["a.jsonl", "b.json", "a.parquet", "a.csv", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_in_any_order(kind, tmp_path) -> None:
    source = written(tmp_path, kind, ROWS)
    every, found = read_rows(source, "train"), open_rows(source, "train")
    assert isinstance(found, LargeRows)
    assert len(found) == len(every) == 60
    index = [random.Random(3).randrange(60) for _ in range(40)]
    assert found.take(index) == [every[i] for i in index]
    assert found.take(range(60)) == every
    assert found.take([]) == []


@pytest.mark.parametrize("kind", [*KINDS, "array.json"])
def test_of_few_rows_all_are_read(kind, tmp_path) -> None:
    source = written(tmp_path, kind, ROWS[:10])
    assert open_rows(source, "train") == read_rows(source, "train")


def test_an_array_of_json_is_read_whole(tmp_path) -> None:
    source = written(tmp_path, "array.json", ROWS)
    assert open_rows(source, "train") == ROWS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": }', "line 9: Expecting value; expected one JSON object per line"),
        (b"3", "line 9: int, expected a JSON object"),
        (b'{"prompt": "\xff"}', "line 9: expected UTF-8 text"),
        (b"[" * 100_000, "line 9: nested too deeply"),
    ],
)
def test_a_damaged_line_is_named_when_it_is_drawn(line, said, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([lines[0], b"", *lines[1:7], line, *lines[7:]]))
    found = open_rows(str(path), "train")
    assert found.take([6, 8]) == [ROWS[6], ROWS[7]]
    with pytest.raises(InputError, match=said) as refused:
        found.take([7])
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
def test_a_file_that_changes_is_refused(kind, tmp_path) -> None:
    source = written(tmp_path, kind, ROWS)
    found = open_rows(source, "train")
    os.utime(source, ns=(1, 1))
    with pytest.raises(InputError, match="changed after its rows were counted"):
        found.take([0])
    Path(source).unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        found.take([0])


def test_nothing_is_left_of_a_csv_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(large.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    found = open_rows(written(tmp_path, "a.csv", ROWS), "train")
    assert list((tmp_path / "scratch").iterdir())
    del found
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_prompts_are_those_of_the_whole(kind, checkpoint, tmp_path, monkeypatch) -> None:
    """Token by token; those that are drawn, in the order in which they are."""
    rows = [{k: row[k] for k in ("prompt", "n")} for row in ROWS]
    policy = live.live_policy(plain_trainer(checkpoint, tmp_path / "out"), 10**6)
    if kind == "messages":
        policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    config = probe_config(checkpoint, prompts={"source": written(tmp_path, "a.jsonl", rows)})
    drawn = load_eval(config, policy)
    monkeypatch.setattr(large, "LARGE", 100)
    whole = load_eval(config, policy)
    assert isinstance(drawn.prompt_ids, large_prompts.LargePrompts)
    assert drawn.lines[0] == "prompts: 60 rows, of which those that are drawn are read and checked"
    assert drawn.lines[1:] == whole.lines
    index = [7, 59, 7, 0]
    assert large_prompts.taken(drawn.prompt_ids, index) == [whole.prompt_ids[i] for i in index]
    assert drawn.prompt_ids[5:8] == whole.prompt_ids[5:8]
    assert [ids for some in drawn.prompt_ids.every() for ids in some] == whole.prompt_ids


def test_a_prompt_of_another_kind_is_refused_when_it_is_drawn(checkpoint, tmp_path) -> None:
    policy = live.live_policy(plain_trainer(checkpoint, tmp_path / "out"), 10**6)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    rows = [{"prompt": "<eos>1" if i == 30 else "1+1="} for i in range(60)]
    config = probe_config(checkpoint, prompts={"source": written(tmp_path, "a.jsonl", rows)})
    found = load_eval(config, policy).prompt_ids
    assert large_prompts.taken(found, [29, 31])
    said = "row 31 of .*a.jsonl is text taken as it is, the first are text to be rendered"
    with pytest.raises(InputError, match=said):
        large_prompts.taken(found, [30])
    rows[40] = {"prompt": ""}
    config = probe_config(checkpoint, prompts={"source": written(tmp_path, "b.json", rows)})
    with pytest.raises(InputError, match=r"row 41 of .*b.json: .* contains an empty string"):
        large_prompts.taken(load_eval(config, policy).prompt_ids, [1, 40])


@pytest.mark.slow
def test_a_probe_draws_what_it_draws_of_the_whole(checkpoint, tmp_path, monkeypatch) -> None:
    """From a file, and from the trainer's own data set; no row is read that is not drawn."""
    rows = [{"prompt": row["prompt"], "tools": None} for row in ROWS]
    read: list[int] = []

    class Counted(OfDataset):
        def take(self, indices: Any) -> Any:
            read.extend(indices)
            return super().take(indices)

    def probed(most: int, source: str) -> Any:
        monkeypatch.setattr(large, "LARGE", most)
        monkeypatch.setattr("funcprobe.adapters.trainers.prompts.LARGE", most)
        monkeypatch.setattr("funcprobe.adapters.trainers.prompts.OfDataset", Counted)
        own = Dataset.from_list(rows)
        make = grpo_trainer if source == "toy" else plain_trainer
        trainer = make(checkpoint, tmp_path, max_steps=1)
        trainer.train_dataset = own if source == "toy" else trainer.train_dataset
        config = probe_config(
            checkpoint, prompts={"source": source}, sampling={"B_E": 4}, run={"max_tokens": 64}
        )
        trainer.add_callback(ProbeCallback(trainer, every=1, config=config))
        return outcome(trainer).probed

    for source in (written(tmp_path, "a.parquet", rows), "toy"):
        read.clear()
        few = probed(10, source)
        assert [e["funcprobe/predicted"] != 0 for e in few] == [True]
        assert few == (probed(100, source) if source != "toy" else few)
        if source == "toy":
            assert 0 < len(set(read)) < 10
            assert few == probed(100, source)


@pytest.mark.slow
def test_a_run_is_that_on_the_whole_file(checkpoint, command, tmp_path, monkeypatch) -> None:
    from support.checkpoints import sets

    path = written(tmp_path, "a.parquet", [{"prompt": row["prompt"]} for row in ROWS])
    Path("c.toml").touch()
    found = []
    for most in (10, 100):
        monkeypatch.setattr(large, "LARGE", most)
        given = checkpoint.settings() | {"prompts.source": path, "run.folder": f"runs-{most}"}
        outcome = command("run", "c.toml", *sets(given | {"measure.etas": [1e-4]}))
        assert outcome.status == 0, outcome.err
        (folder,) = (p for p in Path(f"runs-{most}").iterdir() if (p / "results.json").is_file())
        results = json.loads((folder / "results.json").read_text())
        del results["cost"]
        found.append((results, (folder / "rollouts/eval.parquet").read_bytes()))
        manifest = json.loads((folder / "manifest.json").read_text())
        found[-1] += ({k: v for k, v in manifest["inputs"].items() if k != "prompts"},)
    assert found[0] == found[1]
