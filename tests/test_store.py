"""Files appear whole or not at all, and a stage is computed again when its inputs change."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from funcprobe.adapters import store
from funcprobe.adapters.store import Stages, fingerprint, fingerprint_path, run_folder
from funcprobe.types import InputError, TokenStats

LIKE = TokenStats(torch.zeros(0), torch.zeros(0))


def stats(seed: int = 0) -> TokenStats:
    generator = torch.Generator().manual_seed(seed)
    logp_NR = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return TokenStats(logp_NR, logp_NR.T.exp())  # the second not contiguous


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


class Counted:
    """A computation that counts how often it is made."""

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def __call__(self, *paths: Path) -> Any:
        self.calls += 1
        for path in paths:
            path.write_text(self.value)
        return self.value


def test_a_stage_of_tensors_is_computed_once_for_the_same_inputs(tmp_path) -> None:
    compute = Counted(stats())
    for fresh, calls in ((False, 1), (False, 1), (True, 2), (False, 2)):
        found = Stages(tmp_path, fresh).tensors("s", {"x": torch.ones(2), "eta": 1e-3}, LIKE, compute)
        assert compute.calls == calls
        assert isinstance(found, TokenStats)
        for a, b in zip(found, stats(), strict=True):
            assert torch.equal(a, b)
    for inputs in ({"x": torch.ones(2), "eta": 2e-3}, {"x": torch.ones(3), "eta": 1e-3}):
        Stages(tmp_path).tensors("s", inputs, LIKE, compute)
    Stages(tmp_path).tensors("other", {"x": torch.ones(2), "eta": 1e-3}, LIKE, compute)
    assert compute.calls == 5
    Stages(None).tensors("s", {"x": torch.ones(2), "eta": 1e-3}, LIKE, compute)
    assert compute.calls == 6
    assert len(files(tmp_path)) == 4


def test_a_dict_comes_back_under_its_own_names(tmp_path) -> None:
    value = {"b": torch.ones(2), "a": torch.zeros(3)}
    for _ in range(2):
        found = Stages(tmp_path).tensors("s", 1, dict.fromkeys(value, torch.zeros(0)), lambda: value)
        assert found.keys() == value.keys()
        assert all(torch.equal(found[name], value[name]) for name in value)


def test_a_stage_that_is_a_file_is_computed_once_for_the_same_inputs(tmp_path) -> None:
    compute = Counted("content")
    for fresh, calls in ((False, 1), (False, 1), (True, 2)):
        with Stages(tmp_path, fresh).file("s", [1], "txt", compute) as path:
            assert path.read_text() == "content"
            assert path.parent == tmp_path
        assert compute.calls == calls
    with Stages(None).file("s", [1], "txt", compute) as path:
        assert path.read_text() == "content"
    assert not path.exists()
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_no_file(tmp_path, monkeypatch, error) -> None:
    def half(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise error

    def compute(path: Path) -> None:
        half("", path)

    with pytest.raises(type(error)), Stages(tmp_path).file("s", 1, "txt", compute):
        pass
    assert files(tmp_path) == []
    monkeypatch.setattr(store, "save_file", half)
    with pytest.raises(type(error)):
        Stages(tmp_path).tensors("s", 1, LIKE, stats)
    assert files(tmp_path) == []


def test_a_write_that_breaks_off_leaves_the_older_file(tmp_path) -> None:
    with Stages(tmp_path).file("s", 1, "txt", Counted("old")):
        pass
    with (
        pytest.raises(ZeroDivisionError),
        Stages(tmp_path, fresh=True).file("s", 1, "txt", lambda _: 1 / 0),
    ):
        pass
    with Stages(tmp_path).file("s", 1, "txt", Counted("new")) as path:
        assert path.read_text() == "old"


def test_a_damaged_stage_is_named(tmp_path) -> None:
    Stages(tmp_path).tensors("s", 1, LIKE, stats)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="delete it, or use --fresh") as caught:
        Stages(tmp_path).tensors("s", 1, LIKE, stats)
    assert str(path) in str(caught.value)
    Stages(tmp_path, fresh=True).tensors("s", 1, LIKE, stats)
    Stages(tmp_path).tensors("s", 1, LIKE, stats)


def fill(target: Path, text: str) -> None:
    (target / "manifest.json").write_text(text)
    (target / f"{text}.txt").touch()


def test_a_run_folder_appears_at_the_end_and_replaces_the_older(tmp_path) -> None:
    final = tmp_path / "runs" / "one"
    for text in ("first", "second"):
        with run_folder(final) as target:
            fill(target, text)
            assert not (final / f"{text}.txt").exists()
        assert files(final) == sorted(["manifest.json", f"{text}.txt"])
        assert final.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in final.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("older", [True, False])
def test_a_run_folder_that_breaks_off(tmp_path, error, older) -> None:
    final = tmp_path / "one"
    if older:
        with run_folder(final) as target:
            fill(target, "first")
    before = files(tmp_path)

    def fail() -> None:
        with run_folder(final) as target:
            fill(target, "second")
            raise error

    with pytest.raises(error):
        fail()
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["one"] if older else [])


def test_the_older_run_folder_comes_back_where_the_new_cannot_take_its_place(
    tmp_path, monkeypatch
) -> None:
    final = tmp_path / "one"
    with run_folder(final) as target:
        fill(target, "first")
    replace, calls = Path.replace, []

    def second_fails(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"), run_folder(final) as target:
        fill(target, "second")
    assert files(tmp_path) == ["one/first.txt", "one/manifest.json"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="is not a run folder"), run_folder(tmp_path / "one"):
        pass
    with pytest.raises(InputError, match="File name too long"):
        store.require_writable(tmp_path / ("x" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_fingerprint_sees_type_shape_bytes_and_names_and_no_order() -> None:
    x = torch.arange(6.0)
    same = [{"a": x, "b": 1}, {"b": 1, "a": x.clone()}, {"a": x.view(2, 3).T.T.reshape(6), "b": 1}]
    assert len({fingerprint(value) for value in same}) == 1
    flipped = x.clone()
    flipped[0] = -0.0
    others = [
        {"a": x.double(), "b": 1},
        {"a": x.view(2, 3), "b": 1},
        {"a": x.view(torch.int32), "b": 1},
        {"a": flipped, "b": 1},
        {"c": x, "b": 1},
        {"a": x, "b": 2},
        {"a": x},
    ]
    assert len({fingerprint(value) for value in [same[0], *others]}) == len(others) + 1
    assert fingerprint({"a": torch.ones(2, dtype=torch.bfloat16)}) != fingerprint({"a": torch.ones(2)})
    with pytest.raises(TypeError, match="no fingerprint"):
        fingerprint(object())


def test_a_fingerprint_of_files_follows_their_content(tmp_path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "folder").mkdir()
    one = fingerprint_path(tmp_path)
    assert one.keys() == {"a"}
    assert fingerprint_path(tmp_path / "a") == one
    (tmp_path / "a").write_text("2")
    assert fingerprint_path(tmp_path) != one


@given(st.floats())
def test_json_holds_no_number_that_json_lacks(tmp_path_factory, value) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    if math.isfinite(value):
        store.write_json({"x": value}, path)
        assert path.read_text().endswith("}\n")
    else:
        with pytest.raises(ValueError, match="JSON compliant"):
            store.write_json({"x": value}, path)
        assert not path.exists()


def test_parameters_come_back_by_name(tmp_path) -> None:
    params = {"a": torch.randn(2, 3).T, "b": torch.ones(1, dtype=torch.float64)}
    store.save_params(params, tmp_path / "p.safetensors")
    found = load_file(tmp_path / "p.safetensors")
    assert found.keys() == params.keys()
    assert all(torch.equal(found[n], params[n]) and found[n].dtype == params[n].dtype for n in params)
