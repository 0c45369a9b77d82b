"""Who makes the predicted change, in a run: what it writes, that it adds up, what it costs."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from funcprobe.adapters import run
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results import load
from funcprobe.adapters.results.attribution_words import causes
from funcprobe.adapters.results.table_columns import FILES
from funcprobe.adapters.results.tables import print_results
from support.checkpoints import sets
from support.paths import ROOT

ETAS = {"measure.etas": [1e-6], "measure.second_order": "none"}


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """Runs in one place, whose stages they share."""
    place = tmp_path_factory.mktemp("runs")
    (place / "c.toml").touch()

    def call(name: str, level: str, **changes: Any) -> Path:
        given = checkpoint.settings() | ETAS | {"run.folder": str(place), "run.name": name}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        settings = sets(given | {"attribution.level": level})[1::2]
        return run.run(read_config(place / "c.toml", settings), Narrator())[1]

    return call


@pytest.fixture(scope="module")
def tokens(made) -> Path:
    return made("tokens", "tokens")


@pytest.fixture(scope="module")
def off(made) -> Path:
    return made("off", "off")


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def table(folder: Path, name: str) -> dict[str, list[Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pydict()


def of(rows: dict[str, list[Any]], batch: str, column: str) -> list[Any]:
    return [x for x, side in zip(rows[column], rows["batch"], strict=True) if side == batch]


def test_every_level_writes_its_files_and_costs_its_passes(made, tokens, off):
    summary = made("summary", "summary")
    files = {
        folder.name: {path.name for path in folder.glob("*.parquet")}
        for folder in (tokens, summary, off)
    }
    assert files == {
        "tokens": {"modules.parquet", "sequences.parquet", "tokens.parquet"},
        "summary": {"modules.parquet", "sequences.parquet"},
        "off": set(),
    }
    one, none = document(tokens), document(off)
    assert none["attribution"] is None
    stage = next(s for s in one["cost"]["stages"] if s["stage"] == "attribution")
    assert stage["passes"] == {"U": 1.0}
    first = {s["stage"]: s["passes"] for s in one["cost"]["stages"]}["first order"]
    clipped = one["clip_coefficient"] < 1  # then v depends on the norm of Y: one more pass
    assert first == {"E": 2.0, "U": 1.0 + clipped}
    assert first == {s["stage"]: s["passes"] for s in none["cost"]["stages"]}["first order"]
    # All that "summary" shares with "tokens" is a stage.
    reused = {s["stage"]: s["results_computed"] for s in document(summary)["cost"]["stages"]}
    assert reused["attribution"] == reused["first order"] == reused["gradient on U"] == 0
    assert document(summary)["attribution"] == one["attribution"] | {"level": "summary"}


def test_without_attribution_nothing_else_is_another_number(tokens, off):
    """But for X, whose sum over blocks rounds otherwise."""
    one, none = document(tokens), document(off)
    for name in ("entropy", "entropy_interval", "counts", "loss", "clip_coefficient", "next_lr"):
        assert one[name] == none[name]
    first, other = one["first_order"], none["first_order"]
    for name in ("derivative", "se_given_U", "interval_given_U"):
        assert first[name] == other[name]
    # Sums of 12 sequences' gradients in another order: some roundings.
    assert first["bars_dot"]["value"] == pytest.approx(other["bars_dot"]["value"], rel=1e-12)
    for row, same in zip(one["sweep"], none["sweep"], strict=True):
        assert row["measured"] == same["measured"]


def test_every_family_sums_to_the_derivative(tokens):
    """In results.json, and from the rows of every file."""
    found, first = document(tokens)["attribution"], document(tokens)["first_order"]
    derivative = pytest.approx(first["derivative"]["value"], rel=1e-9)
    assert [family["name"] for family in found["families"]] == [
        *("parts of v", "momentum, decay and tokens of U", "tensors", "tokens of E")
    ]
    for family in found["families"]:
        assert family["sum"] == derivative
        assert family["relative"] < 1e-9
        assert family["residual"] == family["sum"] - first["derivative"]["value"]
        assert family["sum_absolute"] >= abs(family["sum"]) * (1 - 1e-9)
    parts = [found[name]["share"] for name in ("momentum", "decay", "update")]
    names = ("from_momentum", "from_weight_decay", "from_update")
    assert parts == pytest.approx([first[name]["value"] for name in names], rel=1e-12)
    modules, sequences, by_token = (table(tokens, n) for n in ("modules", "sequences", "tokens"))
    assert sum(modules["share"]) == derivative
    assert sum(modules["momentum"]) == pytest.approx(parts[0], rel=1e-9)
    for rows in (sequences, by_token):
        assert sum(of(rows, "E", "share")) == derivative
        assert sum(of(rows, "U", "share")) == pytest.approx(parts[2], rel=1e-9)
        assert sum(of(rows, "U", "marginal")) == pytest.approx(found["marginals"]["share"], rel=1e-9)
        terms = [sum(of(rows, "E", term)) for term in ("direct", "score", "control")]
        assert sum(terms) == derivative
        assert terms == pytest.approx([found[t]["share"] for t in ("direct", "score", "control")])
    for name in ("layers", "projections", "factors"):
        assert sum(group["total"]["share"] for group in found[name]) == derivative
    assert sum(prompt["share"] for prompt in found["U_prompts"]) == pytest.approx(parts[2], rel=1e-9)


def test_rows_are_those_of_the_rollouts(tokens):
    sequences, by_token = table(tokens, "sequences"), table(tokens, "tokens")
    for batch, file in (("U", "update"), ("E", "eval")):
        drawn = pq.read_table(tokens / f"rollouts/{file}.parquet").to_pydict()
        for column in ("prompt_index", "prompt", "response"):
            assert of(sequences, batch, column) == drawn[column]
        flat = [token for response in drawn["response_ids"] for token in response]
        assert of(by_token, batch, "token_id") == flat
        places = list(
            zip(of(by_token, batch, "sequence"), of(by_token, batch, "position"), strict=True)
        )
        assert places == [(i, k) for i, y in enumerate(drawn["response_ids"]) for k in range(len(y))]
        assert of(by_token, batch, "prompt_index") == [drawn["prompt_index"][i] for i, _ in places]
        if batch == "U":
            assert of(sequences, batch, "reward") == drawn["reward"]
            assert of(by_token, batch, "advantage") == [drawn["advantage"][i] for i, _ in places]
    U = {c: of(by_token, "U", c) for c in ("advantage", "coef_logp", "entropy", "logp", "direct")}
    tokens_of_U = len(U["logp"])
    expected = [advantage / tokens_of_U for advantage in U["advantage"]]  # "dapo"
    assert U["coef_logp"] == pytest.approx(expected, rel=1e-12)
    assert min(U["entropy"]) > 0 > max(U["logp"])
    assert set(U["direct"]) == {None}
    E = {c: of(by_token, "E", c) for c in ("advantage", "marginal", "coef_logp", "direct")}
    assert {*E["advantage"], *E["marginal"], *E["coef_logp"]} == {None}
    assert None not in E["direct"]
    influence = of(sequences, "E", "influence")
    units = len(influence)
    se = (units / (units - 1) * sum(x**2 for x in influence)) ** 0.5
    assert se == pytest.approx(document(tokens)["first_order"]["se_given_U"]["value"], rel=1e-9)


def documented(name: str) -> dict[str, str]:
    """Column -> unit, from the table of one file in docs/results.md."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = text.split(f"### {name}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (`.+?`) \| (.*?) \| .+ \|$", section, re.MULTILINE)
    return {column: unit for names, unit in rows for column in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("name", FILES)
def test_columns_are_the_documented_ones(tokens, name):
    written = pq.read_schema(tokens / name)
    assert documented(name).keys() == set(written.names)
    for column, unit in documented(name).items():
        field = written.field(column)
        assert field.metadata[b"about"]
        assert field.metadata[b"unit"].decode() == unit.replace("entropy", "nats per token"), column


def test_errors_are_of_as_many_blocks_as_E_has_draws(tokens):
    found = document(tokens)["attribution"]
    assert found["blocks"] == 12
    modules = table(tokens, "modules")
    assert all(
        low <= x <= high
        for low, x, high in zip(
            modules["share_low"], modules["share"], modules["share_high"], strict=True
        )
    )
    assert all(se > 0 for se in modules["update_se"])
    for part in ("momentum", "update", "decay"):
        assert found[part]["se"] > 0
        low, high = found[part]["interval"]["low"], found[part]["interval"]["high"]
        assert found[part]["indistinguishable_from_0"] is (low <= 0 <= high)
    assert found["marginals_less_shares"]["share"] == pytest.approx(
        found["marginals"]["share"] - found["update"]["share"], rel=1e-9
    )


def test_the_printed_end_names_the_causes(tokens, off):
    console = Console(width=120, record=True, file=io.StringIO())
    results = load(tokens)
    print_results(results, console, verbose=True)
    printed = " ".join(console.export_text().split())
    first, *_ = lines = causes(results)
    assert first.startswith("Causes of the predicted change: ")
    assert "prompt " in first
    for line in lines:
        assert line in printed
    assert causes(load(off)) == []
    assert printed.index(first) < printed.index("cost: ")


def test_in_float32_per_sequence_by_a_linear_rule(made):
    changes = {"entropy__per": "sequence", "optimizer__rule": "precondition"}
    folder = made("sequence", "summary", policy__dtype="float32", **changes)
    found = document(folder)["attribution"]
    assert found["unit"] == "nats per sequence per unit of learning rate"
    relative = [family["relative"] for family in found["families"]]
    # The bound of float32 runs is 1e-4 of the sum of absolute shares; a few hundred shares have 1e-6.
    assert 1e-12 < max(relative) < 1e-5
    assert found["momentum"]["share"] == found["decay"]["share"] == 0.0
    assert found["marginals_differ"] is False
    unit = pq.read_schema(folder / "modules.parquet").field("share").metadata[b"unit"]
    assert unit == b"nats per sequence per unit of learning rate"
    assert "all of it is this batch" in causes(load(folder))[0]
