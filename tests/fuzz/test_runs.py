"""Run folders of strangers: a line for a table or a document that no run writes, else a page."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from funcprobe.adapters.report.write import write_report
from funcprobe.adapters.results.saved import load_run
from funcprobe.types import InputError
from fuzz import of_runs
from fuzz.guard import Guard
from fuzz.mutation import mutated
from fuzz.table import targets
from support.saved_runs import copied, edited
from support.slow import first


@pytest.fixture
def folder(tmp_path):
    return copied(of_runs._run(), tmp_path / "one")


@pytest.mark.parametrize("name", first(1, ["one/results.json", "one/manifest.json", "one.whatif.json"]))
def test_changes_that_keep_the_types_are_read(name, tmp_path):
    """So that the fuzzer reaches what comes after the check of a document's structure."""
    target = targets()[name]
    read = Guard(tmp_path, target.memory).run
    said = [
        read(lambda d: target.read(d, tmp_path), target.file(mutated(target.seeds()[0], seed)))
        for seed in range(30)
    ]
    assert said.count(None) >= 3


def _without(name):
    return lambda table: table.drop_columns([name])


def _as(name, values, type_=None):
    def changed(table):
        column = pa.array([values] * len(table), type=type_)
        return table.set_column(table.column_names.index(name), name, column)

    return changed


TABLES = [
    ("tokens", _without("share"), "no column share"),
    ("tokens", _as("share", "x"), "share is of type string"),
    ("tokens", _as("text", None, pa.string()), "text has empty values"),
    ("sequences", _without("response_tokens"), "no column response_tokens"),
    ("sequences", _as("reward", "1"), "reward is of type string"),
    ("sequences", _as("prompt_index", None, pa.int64()), "prompt_index has empty values"),
    ("sequences", _as("response_tokens", -1), "response_tokens is -1"),
    ("sequences", _as("share", float("inf")), "share is inf"),
    ("modules", _without("layer"), "no column layer"),
    ("modules", _as("share", 1e308), r"share is 1e\+308"),
    ("rollouts/update", _without("response_ids"), "no column response_ids"),
    ("rollouts/update", _as("response_ids", "1"), "response_ids is of type string"),
    ("rollouts/update", lambda table: table.slice(0, 0), "has no responses"),
    ("rollouts/update", _as("loss_mask", [True]), "of different runs"),
    ("rollouts/eval", _as("finish_reason", "\x1b[31m"), "finish_reason is"),
    ("rollouts/eval", _as("reward", 1e308), "reward has a number above"),
]


@pytest.mark.parametrize(("name", "change", "said"), first(6, TABLES))
def test_a_table_that_no_run_writes(name, change, said, folder):
    path = folder / f"{name}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    before = {one: one.stat().st_mtime_ns for one in folder.rglob("*")}
    with pytest.raises(InputError, match=said):
        write_report(folder)
    assert {one: one.stat().st_mtime_ns for one in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "text", first(1, ["policy = 3", "sampling = [1]\nrollouts = ''", "a=" + "[" * 9999, "\0"])
)
def test_any_text_for_the_configuration(text, folder):
    """What a report shows of it, and no number, comes from there."""
    (folder / "config.toml").write_text(text)
    assert write_report(folder).is_file()


def test_an_interval_whose_bounds_are_exchanged(folder):
    edited(folder, entropy_interval__low=2.0, entropy_interval__high=1.0)
    with pytest.raises(InputError, match=r"entropy_interval.*upper bound 1 is below the lower, 2"):
        load_run(folder)


@pytest.mark.parametrize("number", [1e308, -(10**400)])
def test_a_number_that_no_run_writes(number, folder):
    edited(folder, entropy__value=number)
    with pytest.raises(InputError, match=r"above 1e\+150"):
        load_run(folder)


@pytest.mark.slow
def test_a_number_with_few_digits_is_drawn(folder):
    edited(folder, next_lr__value=5e-324, entropy__value=5e-324)
    assert write_report(folder).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"rules": []}, {"learning_rate": 0.0}])
def test_rules_without_the_run_s_own(change, folder):
    path = folder.with_name("one.whatif.json")
    document = json.loads(path.read_text())
    if "learning_rate" in change:
        change = {"learning_rate": document["learning_rate"] | {"value": 0.0}}
    path.write_text(json.dumps(document | change))
    assert "begin with the run's own" in load_run(folder).whatif_left_out
    shutil.rmtree(folder / "figures", ignore_errors=True)
    assert write_report(folder).is_file()
