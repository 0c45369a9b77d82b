"""results.json and manifest.json as typed objects: what loads, what is refused, what docs/ holds."""

import json
import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from funcprobe.adapters.results import Manifest, Results, load, load_manifest
from funcprobe.adapters.results.__main__ import schemas
from funcprobe.types import InputError
from support.paths import ROOT


def edited(folder: Path, target: Path, change, name: str = "results.json") -> Path:
    """A run folder with a changed copy of one file."""
    document = json.loads((folder / name).read_text())
    change(document)
    target.mkdir(exist_ok=True)
    (target / name).write_text(json.dumps(document))
    return target


def test_a_run_folder_loads_as_it_was_written(run_one):
    results, manifest = load(run_one), load_manifest(str(run_one))
    for name, found in (("results.json", results), ("manifest.json", manifest)):
        assert found.model_dump(mode="json") == json.loads((run_one / name).read_text())
    assert results.first_order.derivative.unit == "nats per token per unit of learning rate"
    assert manifest.seed == 0


def test_the_sweep_as_a_table(run_one):
    results = load(run_one)
    frame = results.to_dataframe()
    assert frame.attrs["unit"] == "nats per token"
    assert list(frame["eta"]) == [row.eta for row in results.sweep]
    assert frame["is_next_lr"].sum() == 1
    for column, of in (
        ("predicted", lambda row: row.predicted.value),
        ("predicted_se_total", lambda row: row.se_total.value),
        ("predicted_high", lambda row: row.interval_total.high),
        ("second_order", lambda row: row.second_order.value),
        ("measured", lambda row: row.measured.value),
        ("measured_low", lambda row: row.measured_interval_given_U.low),
        ("difference_high", lambda row: row.difference_interval.high),
        ("ess", lambda row: row.ess.value),
    ):
        assert list(frame[column]) == [of(row) for row in results.sweep]
        assert frame[column].dtype == float
    assert frame["resampled"].dtype == float
    assert frame["resampled"].isna().all()


def test_an_untrusted_row_has_no_interval_in_the_table(run_one, tmp_path):
    def spoil(document):
        document["sweep"][0] |= {"verdict": "resample", "measured_interval_given_U": None}

    frame = load(edited(run_one, tmp_path, spoil)).to_dataframe()
    assert math.isnan(frame["measured_low"][0])
    assert not math.isnan(frame["measured_low"][1])


def test_files_from_before_versions_load(run_one, tmp_path):
    edited(run_one, tmp_path, lambda document: document.pop("schema_version"))
    edited(run_one, tmp_path, lambda document: document.pop("schema_version"), "manifest.json")
    assert load(tmp_path) == load(run_one)
    assert load_manifest(tmp_path) == load_manifest(run_one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(schema_version=2),
            r"schema_version 2, this funcprobe reads 1: use the",
        ),
        (lambda d: d.update(schema_version="1"), r"schema_version '1', this funcprobe reads 1"),
        (
            lambda d: d.pop("entropy"),
            r"differs from what a run writes: entropy: Field required; repeat the run$",
        ),
        (lambda d: d.update(colour="red"), r"colour: Extra inputs are not permitted; repeat"),
        (lambda d: d["sweep"][1].pop("ess"), r"sweep\.1\.ess: Field required;"),
        (lambda d: d["sweep"][0].update(verdict="fine"), r"sweep\.0\.verdict: Input should be 'trust'"),
        (
            lambda d: d["entropy"].update(value="1.0"),
            r"entropy\.value: Input should be a valid number;",
        ),
        (lambda d: d["entropy"].update(value=True), r"entropy\.value: Input should be a valid number;"),
        (lambda d: d["counts"].update(E_tokens=12.0), r"counts\.E_tokens: Input should be a valid int"),
        (
            lambda d: d["checks"][0].update(passed="yes"),
            r"checks\.0\.passed: Input should be a valid b",
        ),
        (lambda d: d.update(schema_version=True), r"schema_version True, this funcprobe reads 1"),
        (lambda d: d.update(schema_version=1.0), r"schema_version 1\.0, this funcprobe reads 1"),
        (lambda d: d.update(schema_version="1" * 999), r"schema_version '1{30,60}\.*, this funcprobe"),
        (lambda d: d.update({"two\nlines": 1}), r"two lines: Extra inputs are not permitted"),
        (
            lambda d: d.update(entropy=1.0, norms=[]),
            r"entropy: Input should be an object \(and 1 more\);",
        ),
    ],
)
def test_another_structure_is_refused_in_a_line(run_one, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as refused:
        load(edited(run_one, tmp_path, change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\): give a run folder"),
        (b"{", r"is not JSON \(Expecting property name"),
        (b"\xff{}", r"is not JSON \('utf-8' codec can't decode"),
        (b'{"entropy": NaN}', r"is not JSON \(NaN is not a JSON number\)"),
        (b'{"entropy": 1e999}', r"results.json, entropy, is inf, a finite number is expected"),
        (b'{"entropy": 1, "entropy": 2}', r"is not JSON \(key 'entropy' occurs twice\)"),
        (b"[]", r"contains a list, an object is expected"),
        (b"[" * 10**6, r"is not JSON \(maximum recursion depth"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_the_schemas_in_docs_are_those_of_the_models():
    for name, text in schemas().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, (
            "run python -m funcprobe.adapters.results docs"
        )


def models(model: type[BaseModel], found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """The model, and all that its fields hold."""
    if model in found:
        return found
    found.add(model)
    for field in model.model_fields.values():
        stack = [field.annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                models(kind, found)
            stack += getattr(kind, "__args__", ())
    return found


def test_every_entry_is_described():
    for model in models(Results, set()) | models(Manifest, set()):
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
