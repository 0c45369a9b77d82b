"""What fuzzing and thought found in parsers stays found; and each target runs, for some seconds."""

import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from funcprobe.types import InputError
from fuzz.codecs import built, json_text, parquet, torch_file
from fuzz.guard import Guard
from fuzz.mutation import mutated
from fuzz.table import targets
from support.paths import ROOT


def bomb() -> bytes:
    """An archive of torch.save, compressed: 2 MiB of zeros in some kilobytes."""
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save({"state": {0: {"exp_avg": torch.zeros(1 << 19)}}, "param_groups": []}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part))
    return file.getvalue()


def repeated() -> bytes:
    """A Parquet file of 3 million equal values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    table = pa.table({"prompt": pa.nulls(3_000_000, pa.string())})
    pq.write_table(table, file, row_group_size=3_000_000)
    return file.getvalue()


def group(**changes: Any) -> dict[str, Any]:
    return {"state": {"#0": {"step": 1}}, "param_groups": [{"params": [0]} | changes]}


def shard_twice() -> bytes:
    from fuzz.of_optimizers import _dcp_files

    value = {"@": "float32", "shape": [64, 64]}
    items = {f"state.{i}.a": {"path": ["state", i, "a"], "value": value, "offset": 0} for i in range(9)}
    data = _dcp_files(items)
    metadata, _, shard = data.partition(b"<shard>")
    return metadata + b"<shard>" + shard[: len(shard) // 9]


def of_400_digits() -> bytes:
    from fuzz.of_optimizers import _sidecars

    loss = {"loss_type": "dr_grpo", "scale_rewards": "none"}
    return json_text(_sidecars()[0] | {"loss": loss, "sampling": {"max_completion_length": 10**400}})


def at_paths(path: list[Any]) -> bytes:
    """A checkpoint of two values, of which the second lies at `path`."""
    from fuzz.of_optimizers import _dcp_files

    value = {"@": "float32", "shape": [2]}
    items = {"state.0.a": {"path": ["state", 0, "a"], "value": value}}
    return _dcp_files(items | {"state.0.b": {"path": path, "value": value}})


def of_trl(**rewards: float) -> bytes:
    """Four rows of a log of TRL."""
    row = {"step": 6, "prompt": "1+1=", "completion": "2", "advantage": 0.5} | rewards
    return (json_text(row) + b"\n") * 4


def kept(name: str) -> bytes:
    """A file that the fuzzer made, of tests/fuzz/kept."""
    return (Path(__file__).parent / "kept" / name).read_bytes()


DEEP = b"[" * 400 + b"]" * 400
LOOP = b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = b"{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2}
BASE = {"model_type": "qwen2", "vocab_size": 14, "hidden_size": 16, "num_attention_heads": 2}

REGRESSIONS: dict[str, tuple[str, Any, str]] = {
    # Structures of a pickle that are larger than their file, or have no end.
    "a structure of 2**64 parts": ("optimizer", torch_file(group(lr={"@": "laughs"})), "nested more"),
    "a structure that contains itself": ("optimizer", torch_file(group(x={"@": "cycle"})), "itself"),
    "a tensor of 2**40 numbers": (
        "optimizer",
        torch_file(group(lr={"@": "float32", "how": "expanded"})),
        "has a tensor of shape",
    ),
    "a compressed torch file": ("optimizer", bomb(), "has a compressed part"),
    "adapter weights, compressed": ("adapter_model.bin", bomb(), "has a compressed part"),
    "adapter weights that are a list": ("adapter_model.bin", torch_file([1]), "not tensors by name"),
    "chunks that share their bytes": ("dcp:bytes", shard_twice, "lie on one another"),
    "a value without a path": ("dcp:bytes", partial(at_paths, []), "no path or the same"),
    "two values of one path": (
        "dcp:bytes",
        partial(at_paths, ["state", 0, "a"]),
        "no path or the same",
    ),
    # Texts.
    "a length of 400 digits": (
        "sidecar",
        of_400_digits,
        "for objective.constant",
    ),
    "TOML nested too deeply": ("config:bytes", b"a = " + DEEP, "is not TOML"),
    "TOML of 100 tables": ("config:bytes", b"a." * 150 + b"b = 1", "nested more than 100 deep"),
    "TOML with a long number": ("config:bytes", b"a = " + b"9" * 5000, "is not TOML"),
    "an override nested too deeply": ("set", b"run.name=" + DEEP, "run.name"),
    "an override with an escape": ("set", b"a\x1b[31m", "expected section.key=value"),
    "adapter_config.json nested": ("adapter_config:bytes", DEEP, "cannot be loaded"),
    "prompts nested": ("prompts.jsonl:bytes", b'{"prompt": ' + DEEP + b"}", "nested more than 100"),
    "prompts with a long number": (
        "prompts.jsonl:bytes",
        b'{"prompt": ' + b"1" * 5000 + b"}",
        "digits",
    ),
    "tools nested": (
        "prompts.jsonl:bytes",
        json_text({"prompt": [{"role": "user", "content": "1"}], "tools": DEEP.decode()}),
        "is not JSON",
    ),
    "no messages in a log": (
        "rollouts.jsonl:bytes",
        json_text({"step": 6, "prompt": [], "completion": "7", "advantage": 0.5, "r": 1.0}) * 2,
        "line 1",
    ),
    "rewards whose sum is beyond a double": (
        "rollouts.jsonl:bytes",
        of_trl(r=1e308, s=1e308),
        "reward inf",
    ),
    "rewards of both infinities": (
        "rollouts.jsonl:bytes",
        of_trl(r=1.0, s=1.0)
        .replace(b'"s": 1.0', b'"s": -Infinity')
        .replace(b'"r": 1.0', b'"r": Infinity'),
        "reward inf",
    ),
    # Parquet.
    "text that is not UTF-8": ("prompts.parquet:bytes", None, "cannot be read as Parquet"),
    "a histogram of another size": (
        "prompts.parquet:bytes",
        kept("histogram.parquet"),
        "cannot be read",
    ),
    "the same in rollouts": ("rollouts.parquet:bytes", kept("histogram.parquet"), "cannot be read"),
    "fewer rows than it says": ("rollouts.parquet:bytes", kept("rows.parquet"), "by its metadata"),
    "lists of any length": ("rollouts.parquet:bytes", kept("lists.parquet"), "cannot be read"),
    "one value, 3 million times": ("rollouts.parquet:bytes", repeated, "claim 3,000,000 values"),
    # Checkpoints.
    "a pattern without end": (
        "adapter_config",
        json_text(ADAPTER | {"target_modules": "(.*)*x"}),
        "repeats a repetition",
    ),
    "a pattern of many repetitions": (
        "adapter_config",
        json_text(ADAPTER | {"rank_pattern": {".*" * 9 + "x": 2}}),
        "repetitions in a row",
    ),
    "a task that is a list": (
        "adapter_config",
        json_text(ADAPTER | {"task_type": [1]}),
        "task_type = [1]",
    ),
    "layers without end": (
        "adapter_config",
        json_text(ADAPTER | {"layer_replication": [[0, 10**9]]}),
        "layer_replication",
    ),
    "a billion layers": ("config.json", json_text(BASE | {"num_hidden_layers": 10**9}), "layers of"),
    "a base with code": (
        "config.json",
        json_text({"model_type": "m", "auto_map": {"AutoConfig": "c.C"}}),
        "custom code",
    ),
    # Chat templates.
    "layers that take long to build": (
        "config.json",
        json_text(BASE | {"num_hidden_layers": 2000}),
        "asks for 2,000 layers",
    ),
    "a template without end": ("chat_template", LOOP, "takes more than"),
    "a template of 2**40 characters": ("chat_template", GROWS, "rejects the messages"),
    "a template of powers": ("chat_template", b"{{ 9 ** 9 ** 9 }}", "operator **"),
    "a template that repeats": ("chat_template", b"{{ 'a' * 9999999999 }}", "rejects the messages"),
}


def invalid_text() -> bytes:
    return parquet([{"prompt": "abcdefgh"}]).replace(b"abcdefgh", b"abc\xd5\xffdef")


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_was_found_is_refused_in_a_line(name, tmp_path, offline):
    target, data, said = REGRESSIONS[name]
    data = invalid_text() if data is None else data() if callable(data) else data
    parser = targets()[target]
    found = Guard(tmp_path, parser.memory).run(lambda d: parser.read(d, tmp_path), data)
    assert found is not None
    assert said in found


def test_an_index_of_weights_names_files_of_its_folder(tmp_path):
    from funcprobe.adapters.checkpoint.plausible import require_plausible

    for name in ("../../etc/passwd", "/etc/passwd", "a\0b", ".."):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="not a file of this folder"):
            require_plausible(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    )
    require_plausible(tmp_path)


def test_results_with_a_text_as_eta(tmp_path):
    from funcprobe.adapters.results import load

    (tmp_path / "results.json").write_text('{"schema_version": 1, "eta": "x", "b": [{"eta": []}]}')
    with pytest.raises(InputError, match="results"):
        load(tmp_path)


@pytest.mark.parametrize("where", ["https://example.invalid/x.csv", "/etc/passwd", "../x.csv"])
def test_a_folder_of_data_names_its_own_files(where, tmp_path):
    from funcprobe.adapters.sampling.sources import read_rows

    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files: '{where}'\n---\n# x\n")
    with pytest.raises(InputError, match="names data files outside its folder"):
        read_rows(str(tmp_path), "train")


@pytest.mark.slow
def test_the_guard_sees_what_it_is_for(tmp_path):
    """In a process of its own, as its ears cannot be taken off."""
    script = """
import os, pickle, socket, subprocess, sys
sys.path.insert(0, "tests")
from pathlib import Path
from fuzz.guard import Guard, Violation
def write(path):
    try:
        open(path, "w")
    except OSError:
        pass
guard = Guard(Path(sys.argv[1]))
guard.watch()
deeds = {
    "code": lambda data: pickle.loads(b"cos\\ngetcwd\\n."),
    "process": lambda data: subprocess.run(["true"]),
    "network": lambda data: socket.socket().connect_ex(("127.0.0.1", 9)),
    "file": lambda data: os.path.isdir("/nowhere") or write("/nowhere/x"),
    "memory": lambda data: bytearray(os.urandom(1 << 20)) * 200,
}
for name, deed in deeds.items():
    try:
        guard.run(deed, b"")
    except Violation:
        print(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["code", "process", "network", "file", "memory"], done.stderr


QUICK = ("config", "dcp", "sidecar", "answer", "rollouts.jsonl", "trainer_state", "optimizer")


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_structures_near_good_ones(name, seeds, tmp_path):
    """Several changes, one after the other; the fuzzer goes further."""
    target = targets()[name]
    data = target.seeds()[0]
    for seed in seeds:
        data = mutated(data, seed)
    Guard(tmp_path, target.memory).run(lambda d: target.read(d, tmp_path), target.file(data))


@pytest.mark.slow
def test_seeds_are_read(tmp_path):
    """Of every target, or the fuzzer would begin with what is rejected, and get no further."""
    for name, target in targets().items():
        place = tmp_path / name.replace(":", "-").replace("/", "-")
        place.mkdir()
        guard = Guard(place, target.memory)
        for seed in target.seeds():
            file = target.file(seed)
            assert guard.run(lambda d, t=target, p=place: t.read(d, p), file) is None, name


def test_structures_become_files():
    found = built({"a": {"@": "float32", "shape": [2, 3]}, "#1": [{"@": "tuple", "items": [1]}]})
    assert found["a"].shape == (2, 3)
    assert found[1] == [(1,)]
    with zipfile.ZipFile(io.BytesIO(torch_file({"a": 1}))) as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())
    header = struct.unpack("<Q", b"\x02" + bytes(7))
    assert header == (2,)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="pip install '.[fuzz]'")
def test_every_target_for_some_seconds(tmp_path):
    """Ten minutes each are for `python -m tests.fuzz`."""
    names = list(targets())
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *names, "--seconds", "5", "--keep", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(" executions") == len(names)
