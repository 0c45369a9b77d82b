"""Files appear whole or not at all, and a stage is computed again when its inputs change."""

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from funcprobe.adapters import store
from funcprobe.adapters.store import Stages, fingerprint, fingerprint_path, run_folder
from funcprobe.adapters.store.sealed import about
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
        assert Stages(tmp_path, fresh).file("s", [1], "txt", compute, Path.read_text) == "content"
        assert compute.calls == calls
    paths = []
    assert Stages(None).file("s", [1], "txt", compute, lambda path: paths.append(path) or 5) == 5
    assert not paths[0].exists()
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_no_file(tmp_path, monkeypatch, error) -> None:
    write_bytes = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        raise error

    def compute(path: Path) -> None:
        half(path, b"content")

    with pytest.raises(type(error)):
        Stages(tmp_path).file("s", 1, "txt", compute, Path.read_text)
    assert files(tmp_path) == []
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(type(error)):
        Stages(tmp_path).tensors("s", 1, LIKE, stats)
    assert files(tmp_path) == []


def test_a_write_that_breaks_off_leaves_the_older_file(tmp_path) -> None:
    Stages(tmp_path).file("s", 1, "txt", Counted("old"), Path.read_text)
    with pytest.raises(ZeroDivisionError):
        Stages(tmp_path, fresh=True).file("s", 1, "txt", lambda _: 1 / 0, Path.read_text)
    assert Stages(tmp_path).file("s", 1, "txt", Counted("new"), Path.read_text) == "old"


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def sealed(tensors: dict[str, torch.Tensor]) -> bytes:
    """As a stranger would write it: all of it right but for what is inside."""
    place = Stages(Path()).place("s", 1)
    return store.seal(tensors, place.about)


DAMAGE = {
    "cut off": (lambda data: data[:-1], "its checksum is another"),
    "cut in its header": (lambda data: data[:40], "no checksum"),
    "empty": (lambda _: b"", "no checksum"),
    "a number changed": (lambda data: flipped(data, len(data) - 3), "its checksum is another"),
    "a header changed": (lambda data: flipped(data, data.index(b"000001") + 5), "its checksum"),
    "longer": (lambda data: data + b"0", "its checksum is another"),
    "a huge header": (lambda data: b"\xff" * 8 + data[8:], "its checksum"),
    "no checksum": (lambda data: data.replace(b"sha256", b"sha257"), "no checksum"),
    "text": (lambda _: b"not safetensors at all", "no checksum"),
    "one tensor": (lambda _: sealed({"000000": torch.ones(3, 4)}), "has 1 tensors, 2 are expected"),
    "other names": (lambda _: sealed({"a": torch.ones(3), "b": torch.ones(3)}), "2 are expected"),
    "another shape": (
        lambda _: sealed({f"{i:06d}": torch.ones(9, dtype=torch.float64) for i in range(2)}),
        r"a tensor of torch.float64 \(9,\), torch.float64 \(3, 4\)",
    ),
    "another dtype": (
        lambda _: sealed({f"{i:06d}": torch.ones(3, 4) for i in range(2)}),
        "a tensor of torch.float32",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_stage_is_computed_again_and_said(tmp_path, how) -> None:
    damage, reason = DAMAGE[how]
    compute, said = Counted(stats()), []
    stages = Stages(tmp_path, say=said.append)
    stages.tensors("s", 1, stats(), compute)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    found = stages.tensors("s", 1, stats(), compute)
    assert compute.calls == 2
    assert all(torch.equal(a, b) for a, b in zip(found, stats(), strict=True))
    assert len(said) == 1
    assert said[0].startswith(f"warning: stored stage {path} ")
    assert said[0].endswith("it is computed again")
    assert re.search(reason, said[0])
    assert path.read_bytes() == whole
    stages.tensors("s", 1, stats(), compute)
    assert (compute.calls, len(said)) == (2, 1)


def test_a_stage_under_the_name_of_another_is_computed_again(tmp_path) -> None:
    """Of other inputs, of another stage of the same inputs; a result, a value and a file."""
    said: list[str] = []
    stages = Stages(tmp_path, say=said.append)

    def swapped(one: tuple[str, int], other: tuple[str, int]) -> None:
        stages.place(*one).path.replace(stages.place(*other).path)

    stages.tensors("s", 1, LIKE, lambda: stats(1))
    swapped(("s", 1), ("s", 2))
    assert torch.equal(stages.tensors("s", 2, LIKE, lambda: stats(2))[0], stats(2)[0])
    swapped(("s", 2), ("other", 2))
    assert torch.equal(stages.tensors("other", 2, LIKE, lambda: stats(3))[0], stats(3)[0])
    stages.remember("size", 1, [5])
    swapped(("size", 1), ("size", 2))
    assert stages.recall("size", 2) is None
    stages.file("f", 1, "txt", Counted("one"), Path.read_text)
    swapped(("f", 1), ("f", 2))
    assert stages.file("f", 2, "txt", Counted("two"), Path.read_text) == "two"
    stages.tensors("s", 3, LIKE, stats)
    swapped(("s", 3), ("f", 3))
    assert stages.file("f", 3, "txt", Counted("three"), Path.read_text) == "three"
    assert [re.search(r"its (stage|key) is", line)[1] for line in said] == [
        *("key", "stage", "key", "key", "stage")
    ]


def test_a_stored_file_that_its_reader_rejects_is_made_again(tmp_path) -> None:
    said: list[str] = []

    def read(path: Path) -> str:
        if path.read_text() == "old":
            raise InputError("of an earlier version")
        return path.read_text()

    Stages(tmp_path).file("s", 1, "txt", Counted("old"), Path.read_text)
    for _ in range(2):
        found = Stages(tmp_path, say=said.append).file("s", 1, "txt", Counted("new"), read)
        assert found == "new"
    assert len(said) == 1
    assert "is not as expected: of an earlier version; it is computed again" in said[0]


def test_a_stage_that_cannot_be_read_is_computed_again(tmp_path) -> None:
    said: list[str] = []
    stages = Stages(tmp_path, say=said.append)
    stages.place("s", 1).path.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):  # where it would be written
        stages.tensors("s", 1, LIKE, stats)
    assert "cannot be read (Is a directory)" in said[0]
    assert files(tmp_path) == []


def test_a_value_comes_back_and_says_its_run(tmp_path) -> None:
    stages = Stages(tmp_path, run="mine")
    assert stages.recall("size", 1) is None
    for value in ([1, None, 2.5], {"a": "b"}):
        stages.remember("size", 1, value)
        assert stages.recall("size", 1) == value
    stages._replace(writes=False).remember("size", 1, 0)
    assert stages.recall("size", 1) == value
    assert stages._replace(fresh=True).recall("size", 1) is None
    path = stages.place("size", 1).path
    found = about(path)
    assert (found["stage"], found["run"]) == ("size", "mine")
    for content in (
        b"",
        b"\xff" * 100,
        (3).to_bytes(8, "little") + b"[" * 9,
        b"\x02" + b"\0" * 7 + b"[]",
    ):
        path.write_bytes(content)
        assert about(path) == {}
    assert about(tmp_path / "none") == {}


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


def test_a_fingerprint_of_code_is_that_of_what_computes(tmp_path) -> None:
    """In a checkout, where the shell stands beside the core, and installed, where it is in it."""
    code = {"core.py": "1", "step/adamw.py": "2"}
    shell = {"run.py": "3", "sampling/drawn.py": "4", "report/page.py": "5"}

    def written(core: str, beside: str, **changes: str) -> str:
        where = Path(tempfile.mkdtemp(dir=tmp_path))
        texts = {f"{core}/{k}": v for k, v in code.items()}
        texts |= {f"{beside}/{k}": v for k, v in shell.items()} | changes
        for name, text in texts.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text(text)
        return store.fingerprint_code(where / core, where / beside, ["report"])

    checkout = written("core", "adapters")
    assert written("funcprobe", "funcprobe/adapters") == checkout
    assert written("core", "adapters", **{"adapters/report/page.py": "6"}) == checkout
    for changed in ("core/step/adamw.py", "adapters/run.py", "adapters/sampling/drawn.py"):
        assert written("core", "adapters", **{changed: "6"}) != checkout


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
