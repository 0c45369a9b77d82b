"""States that FSDP and torch.distributed.checkpoint write, by the real libraries on the CPU."""

import contextlib
import copy
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from funcprobe.adapters.optimizer import AdamOverrides, find_state, open_state, read_adam_state
from funcprobe.adapters.optimizer import dcp as dcp_reader
from funcprobe.adapters.optimizer.dcp_metadata import Slice
from funcprobe.types import InputError
from support.optimizers import assert_attached, refused, take_steps
from support.small_lora import make_model, registry, trainable


def two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """In another order than the names', and with other numbers for each group."""
    named = list(trainable(model).items())[::-1]
    groups = [
        {"params": [p for n, p in named if "lora" not in n], "lr": 1.6e-2, "weight_decay": 0.0},
        {"params": [p for n, p in named if "lora" in n], "betas": (0.8, 0.9)},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def plain() -> SimpleNamespace:
    model = make_model("norms")
    optimizer = two_groups(model)
    take_steps(model, optimizer)
    return SimpleNamespace(model=model, optimizer=optimizer)


@pytest.fixture(scope="module")
def gloo() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
def sharded(gloo: None, request: pytest.FixtureRequest) -> SimpleNamespace:
    """FSDP 1 and 2 over one process. The oracle is the same run without it."""
    model = make_model("norms")
    names = list(trainable(model))
    if request.param == 1:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert list(trainable(wrapped)) == ["_fsdp_wrapped_module." + name for name in names]
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = two_groups(wrapped)
    take_steps(wrapped, optimizer)
    return SimpleNamespace(version=request.param, model=wrapped, optimizer=optimizer)


def save_by_accelerate(run: SimpleNamespace, folder: Path, kind: str, **options: Any) -> None:
    """accelerate's own function; its Accelerator takes FSDP on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=run.version, state_dict_type=kind, cpu_offload=False, use_orig_params=True
    )
    try:
        state = PartialState(cpu=True)
        save_fsdp_optimizer(plugin, state, run.optimizer, run.model, str(folder), **options)
    finally:
        PartialState._reset_state()


def assert_read(path: Path, plain: SimpleNamespace, **options: Any):
    adam, report = read_adam_state(path, plain.model, registry(plain.model), **options)
    assert_attached(adam, plain.model, plain.optimizer)
    assert [group.lr for group in adam.groups] == [1.6e-2, 1e-3]  # the first gives eta its unit
    assert not report.positional
    assert report.route == "by name (the file's keys)"
    return report


def names_of(plain: SimpleNamespace) -> list[str]:
    return list(trainable(plain.model))


# FSDP


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "file", "format_"),
    [
        ("FULL_STATE_DICT", "optimizer.bin", "FSDP full state"),
        ("SHARDED_STATE_DICT", "optimizer_0", "torch.distributed.checkpoint"),
    ],
)
def test_accelerate_fsdp(kind, file, format_, sharded, plain, tmp_path: Path) -> None:
    save_by_accelerate(sharded, tmp_path, kind)
    model = {"model": {"layers.0.state.weight": torch.ones(3)}}  # as accelerate saves the model beside
    dcp.save(model, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    assert find_state(tmp_path) == tmp_path / file
    assert assert_read(tmp_path, plain).format == format_
    assert assert_read(tmp_path / file, plain).path == tmp_path / file


def test_accelerate_fsdp_without_dcp(sharded, plain, tmp_path: Path) -> None:
    if sharded.version == 1:
        pytest.skip("a full state over one process")
    save_by_accelerate(sharded, tmp_path, "SHARDED_STATE_DICT", use_dcp=False)
    path = tmp_path / "optimizer_0_rank0.bin"
    moments = torch.load(path, weights_only=True)["state"][names_of(plain)[0]]
    assert type(moments["exp_avg"]).__name__ == "DTensor"
    assert_read(tmp_path, plain)
    adam, _ = read_adam_state(path, plain.model, registry(plain.model))
    assert {type(moment) for moment in adam.exp_avg.values()} == {torch.Tensor}


def test_accelerate_save_state(tmp_path: Path) -> None:
    model = make_model("norms")
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-3)
    accelerator = Accelerator(cpu=True)
    try:
        prepared = accelerator.prepare(model, optimizer)
        take_steps(*prepared)
        accelerator.save_state(str(tmp_path))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert find_state(tmp_path) == tmp_path / "optimizer.bin"
    with pytest.raises(InputError, match="not verifiable"):
        read_adam_state(tmp_path, model, registry(model))
    adam, report = read_adam_state(tmp_path, model, registry(model), accept_positional=True)
    assert_attached(adam, model, optimizer)
    assert report.format == "accelerate"
    assert report.route == "by position, one group in named_parameters() order"


# What dcp.save writes, one process


def nested(plain: SimpleNamespace) -> dict[str, Any]:
    return get_optimizer_state_dict(plain.model, plain.optimizer)


def flattened(plain: SimpleNamespace) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return get_optimizer_state_dict(plain.model, plain.optimizer, options=options)


MODEL = {"model": {"a.state.b": torch.ones(2), "param_groups_of": torch.ones(1)}}
LAYOUTS = {
    "nested": nested,
    "flattened": flattened,
    "beside the model": lambda plain: {"optimizer": nested(plain), **MODEL},
    "flattened beside the model": lambda plain: {"optim": flattened(plain), **MODEL},
    "in an app": lambda plain: {"app": {"optim": nested(plain), **MODEL}, "step": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, plain: SimpleNamespace, tmp_path: Path) -> None:
    dcp.save(LAYOUTS[layout](plain), checkpoint_id=tmp_path / "step-3", no_dist=True)
    assert_read(tmp_path / "step-3", plain)
    assert_read(tmp_path, plain)


def test_flattened_by_hand_without_a_planners_paths(plain: SimpleNamespace, tmp_path: Path) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(flattened(plain), checkpoint_id=tmp_path, planner=planner, no_dist=True)
    assert_read(tmp_path, plain)


def test_positions(tmp_path: Path) -> None:
    model = make_model("norms")
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-3)
    take_steps(model, optimizer)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    adam, report = read_adam_state(tmp_path, model, registry(model), accept_positional=True)
    assert_attached(adam, model, optimizer)
    assert report.positional
    assert report.format == "torch.distributed.checkpoint"


@settings(max_examples=25)
@given(data=st.data())
def test_any_state_is_read_bit_for_bit(data: st.DataObject) -> None:
    """Names, shapes, types, steps and groups; more than ten groups, whose numbers sort as text."""
    name = st.text("ab01._", min_size=1, max_size=6).filter(lambda n: not n.isdecimal())
    names = data.draw(st.lists(name, min_size=1, max_size=14, unique=True))
    shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    state = {}
    for i, name in enumerate(names):
        shape, dtype = data.draw(shapes), data.draw(dtypes)
        moments = {key: torch.randn(shape).to(dtype) for key in ("exp_avg", "exp_avg_sq")}
        step = data.draw(st.sampled_from([i, float(i), torch.tensor(float(i))]))
        state[name] = moments | {"step": step}
    size = data.draw(st.integers(1, len(names)))
    parts = [names[i : i + size] for i in range(0, len(names), size)]
    groups = [{"lr": 0.5 + i, "betas": (0.8, 0.9), "params": part} for i, part in enumerate(parts)]
    with tempfile.TemporaryDirectory() as folder:
        content = {"state": state, "param_groups": groups}
        dcp.save(copy.deepcopy(content), checkpoint_id=folder, no_dist=True)
        saved = open_state(Path(folder))
    assert saved.groups == groups
    assert list(saved.state) == [name for part in parts for name in part]
    for name, entry in saved.state.items():
        for key, value in state[name].items():
            assert type(entry[key]) is type(value)
            assert getattr(entry[key], "dtype", None) == getattr(value, "dtype", None)
            assert torch.equal(torch.as_tensor(entry[key]), torch.as_tensor(value))


def test_more_groups_than_digits(tmp_path: Path) -> None:
    """Sorted as text, the tenth would come second."""
    moments = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1), "step": 1}
    groups = [{"lr": float(i), "params": [f"w{i}"]} for i in range(12)]
    state = {f"w{i}": dict(moments) for i in range(12)}
    content = {"state": state, "param_groups": copy.deepcopy(groups)}
    dcp.save(content, checkpoint_id=tmp_path, no_dist=True)
    assert open_state(tmp_path).groups == groups


# Shards

TWO_PROCESSES = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))  # 5 and 1 rows do not halve
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(model.parameters())
for k in range(3):
    optimizer.zero_grad()
    model(torch.arange(6.0).view(2, 3).cos() * (k + rank + 1)).square().sum().backward()
    optimizer.step()
state = get_optimizer_state_dict(model, optimizer)
dcp.save({"optimizer": state}, checkpoint_id=folder + "/optimizer_0")
torch.save(state, f"{folder}/optimizer_0_rank{rank}.bin")
full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    torch.save(full, folder + "/full.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-c", TWO_PROCESSES, str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return folder


@pytest.mark.slow
def test_shards_of_two_processes(two_processes: Path) -> None:
    saved = open_state(two_processes / "optimizer_0")
    full = torch.load(two_processes / "full.pt", weights_only=True)  # gathered by torch
    assert len({f.name for f in (two_processes / "optimizer_0").glob("*.distcp")}) == 2
    assert set(saved.state) == set(full["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name, entry in full["state"].items():
        for key, value in entry.items():
            assert type(saved.state[name][key]) is torch.Tensor
            assert torch.equal(saved.state[name][key], value), (name, key)
            assert value.abs().sum() > 0
    assert saved.groups == full["param_groups"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_processes_file_is_refused(rank: int, two_processes: Path) -> None:
    with pytest.raises(InputError, match=r"state\.0\.weight\.exp_avg is one process's shard"):
        open_state(two_processes / f"optimizer_0_rank{rank}.bin")


def cut(folder: Path, key: str, cuts: list[list[int]]) -> None:
    """Make `key` of the parts saved under `key/0`, `key/1`, ...: DCP's own records, other chunks."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    tensors, storage = metadata.state_dict_metadata, metadata.storage_data
    bounds = [list(itertools.pairwise(points)) for points in cuts]
    whole = copy.deepcopy(tensors[f"{key}/0"])
    whole.size, whole.chunks = torch.Size(points[-1] for points in cuts), []
    for i, box in enumerate(itertools.product(*bounds)):
        offsets = torch.Size(a for a, _ in box)
        whole.chunks.append(ChunkStorageMetadata(offsets, torch.Size(b - a for a, b in box)))
        part = f"{key}/{i}"
        (old,) = [index for index in storage if index.fqn == part]
        storage[MetadataIndex(key, offsets)] = storage.pop(old)
        place = (*metadata.planner_data.pop(part)[:-1], key.rpartition(".")[2])
        del tensors[part]
    tensors[key], metadata.planner_data[key] = whole, place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@settings(max_examples=25)
@given(points=st.lists(st.sets(st.integers(1, 5), max_size=3), min_size=1, max_size=3))
def test_chunks_of_any_cut(points: list[set[int]]) -> None:
    cuts = [[0, *sorted(inner), 6] for inner in points]
    whole = torch.randn([6] * len(cuts))
    boxes = itertools.product(*(itertools.pairwise(p) for p in cuts))
    entry = {
        f"exp_avg/{i}": whole[tuple(slice(a, b) for a, b in box)].clone() for i, box in enumerate(boxes)
    }
    content = {"state": {"w": entry}, "param_groups": [{"lr": 1.0, "params": ["w"]}]}
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(content, checkpoint_id=folder, no_dist=True)
        cut(Path(folder), "state.w.exp_avg", cuts)
        saved = open_state(Path(folder))
    assert torch.equal(saved.state["w"]["exp_avg"], whole)


# What is refused


@pytest.fixture
def folder(plain: SimpleNamespace, tmp_path: Path) -> Path:
    dcp.save({"optimizer": nested(plain)}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    return tmp_path / "optimizer_0"


def edit(folder: Path, change) -> None:
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


def test_a_malicious_metadata_is_not_run(folder: Path, plain, tmp_path: Path) -> None:
    edit(folder, lambda metadata: setattr(metadata, "planner_data", Payload(tmp_path / "made")))
    refused(r"requests posix\.system", folder, plain.model)
    refused(r"requests posix\.system", tmp_path, plain.model)
    assert not (tmp_path / "made").exists()
    with (folder / ".metadata").open("rb") as file:  # torch's own way, so that the payload is one
        pickle.load(file)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch", "load"), ("torch", "hub.load"), ("builtins", "eval"), ("torch", "ops")],
)
def test_no_other_global(module: str, name: str, folder: Path, plain) -> None:
    text = [bytes([0x8C, len(part)]) + part.encode() for part in (module, name)]
    (folder / ".metadata").write_bytes(b"\x80\x04" + b"".join(text) + b"\x93.")
    refused(rf"requests {module}\.{name}, only DCP's own", folder, plain.model)


@pytest.mark.parametrize(
    "claim", [b"Nr" + (2**24).to_bytes(4, "little"), b"\x96" + (1).to_bytes(8, "little") + b"a"]
)
def test_operations_that_could_claim_memory(claim: bytes, folder: Path, plain) -> None:
    """LONG_BINPUT with an index past the file's length, BYTEARRAY8: flipped bits took 22 GB."""
    (folder / ".metadata").write_bytes(b"\x80\x05" + claim + b".")
    refused(r"\.metadata is damaged or truncated", folder, plain.model)


def test_a_malicious_value_is_not_run(plain, tmp_path: Path) -> None:
    content = nested(plain)
    content["param_groups"][0]["lr"] = Payload(tmp_path / "made")
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    refused(r"param_groups\.0\.lr in __0_0\.distcp: .* requests posix\.system", tmp_path, plain.model)
    assert not (tmp_path / "made").exists()


def test_a_malicious_value_elsewhere_is_not_even_read(plain, tmp_path: Path) -> None:
    content = {"optim": nested(plain), "loader": Payload(tmp_path / "made")}
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_read(tmp_path, plain)
    assert not (tmp_path / "made").exists()


def test_truncated_data(folder: Path, plain) -> None:
    """The last bytes first, then half: each names what is lost there."""
    (file,) = folder.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    message = refused("__0_0.distcp is truncated, optimizer", folder, plain.model)
    assert any(name in message for name in names_of(plain))
    file.write_bytes(whole[: len(whole) // 2])
    refused("truncated", folder, plain.model)
    file.unlink()
    refused(r"__0_0.distcp, with optimizer\..*, cannot be read", folder, plain.model)


def test_truncated_metadata(folder: Path, plain) -> None:
    whole = (folder / ".metadata").read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        (folder / ".metadata").write_bytes(whole[:length])
        refused(r"\.metadata is damaged", folder, plain.model)
    (folder / ".metadata").unlink()
    refused("has no .metadata", folder, plain.model)
    refused("has no .metadata", folder.parent, plain.model)
    (folder / "__0.metadata").write_bytes(whole)
    refused("has a .metadata file for each process", folder, plain.model)


@pytest.mark.parametrize(
    "place", [Slice("\0", 0, 1), Slice("{}", 2**70, 1), Slice("{}", 0, 2**70), Slice("{}", 0, 2**62)]
)
def test_a_place_that_no_file_has_is_refused(folder: Path, place: Slice) -> None:
    (file,) = folder.glob("*.distcp")
    place = place._replace(file=place.file.format(file.name))
    with pytest.raises(InputError, match=r"\.metadata is damaged: w is at Slice\(.*: copy"):
        dcp_reader._load(folder, "w", place)


@settings(max_examples=150)
@given(data=st.data())
def test_flipped_bytes_raise_nothing_else(data: st.DataObject, template: Path) -> None:
    """In either file: it is read, or refused in one line."""
    with tempfile.TemporaryDirectory() as copied:
        folder = Path(shutil.copytree(template, copied, dirs_exist_ok=True))
        file = folder / data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        with contextlib.suppress(InputError):
            open_state(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, so that flips hit its structure; `w` in two chunks."""
    folder = tmp_path_factory.mktemp("template")
    entry = {"exp_avg/0": torch.ones(2, 3), "exp_avg/1": torch.ones(1, 3), "step": torch.tensor(3.0)}
    content = {
        "state": {"w": entry},
        "param_groups": [{"lr": 1.0, "betas": (0.9, 0.9), "params": ["w"]}],
    }
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    cut(folder, "state.w.exp_avg", [[0, 2, 3], [0, 3]])
    return folder


def place(metadata: Any, chunk: ChunkStorageMetadata, row: int) -> None:
    """Where the chunk says that it lies."""
    storage, offset = metadata.storage_data, torch.Size([row, 0])
    old = MetadataIndex("state.w.exp_avg", chunk.offsets)
    storage[MetadataIndex("state.w.exp_avg", offset)] = storage[old]
    chunk.offsets = offset


@pytest.mark.parametrize(
    "change", ["none", "empty", "missing", "twice", "other size", "overlap", "moved", "negative"]
)
def test_chunks_that_do_not_make_the_tensor(change: str, template: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "w"))
    assert torch.equal(open_state(folder).state["w"]["exp_avg"], torch.ones(3, 3))

    def damage(metadata: Any) -> None:
        tensor = metadata.state_dict_metadata["state.w.exp_avg"]
        first, second = tensor.chunks
        if change in ("none", "empty"):
            tensor.chunks = []
            tensor.size = torch.Size([3 if change == "none" else 0, 3])
        elif change == "missing":
            tensor.chunks = [first]
        elif change == "twice":
            tensor.chunks = [first, first]
        elif change == "other size":
            tensor.size = torch.Size([4, 3])
        else:
            place(metadata, second, {"overlap": 1, "moved": 1, "negative": -3}[change])
            if change == "overlap":
                tensor.size = torch.Size([2, 3])
            if change == "negative":  # which Python's own indices would take
                place(metadata, first, 1)

    edit(folder, damage)
    said = r"the chunks of state\.w\.exp_avg do not form its size"
    if change == "twice":
        said = r"\.metadata has values that lie on one another in __0_0\.distcp"
    with pytest.raises(InputError, match=said):
        open_state(folder)


def test_chunks_of_another_shape(template: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "w"))
    storage = {}

    def swap(metadata: Any) -> None:
        a, b = [i for i in metadata.storage_data if i.fqn == "state.w.exp_avg"]
        storage.update(metadata.storage_data)
        metadata.storage_data[a], metadata.storage_data[b] = storage[b], storage[a]

    edit(folder, swap)
    with pytest.raises(InputError, match=r"has shape \(1, 3\) for state\.w\.exp_avg, expected"):
        open_state(folder)


def test_files_outside_the_folder_and_compressed_ones(folder: Path, plain) -> None:
    def first(metadata: Any) -> Any:
        return next(iter(metadata.storage_data.values()))

    edit(folder, lambda metadata: setattr(first(metadata), "relative_path", "../x"))
    refused(r"points outside its folder, to \.\./x", folder, plain.model)
    edit(folder, lambda metadata: setattr(first(metadata), "relative_path", "__0_0.distcp"))
    edit(folder, lambda metadata: setattr(first(metadata), "transform_descriptors", ["zstd"]))
    refused(r"is compressed \(zstd\)", folder, plain.model)


def test_missing_and_exchanged_tensors(folder: Path, plain) -> None:
    b, a = (next(n for n in names_of(plain) if part in n) for part in ("lora_B", "lora_A"))
    key = "optimizer.state.{}.exp_avg_sq".format

    def exchange(metadata: Any) -> None:
        tensors, storage = metadata.state_dict_metadata, metadata.storage_data
        at = {i.fqn: i for i in storage}
        tensors[key(a)], tensors[key(b)] = tensors[key(b)], tensors[key(a)]
        storage[at[key(a)]], storage[at[key(b)]] = storage[at[key(b)]], storage[at[key(a)]]

    edit(folder, exchange)
    refused(rf"exp_avg_sq of {a} has shape", folder, plain.model)
    edit(folder, lambda metadata: metadata.state_dict_metadata.pop(key(a)))
    edit(folder, lambda metadata: metadata.state_dict_metadata.pop(key(b)))
    message = refused("exp_avg_sq 15, exp_avg 17", folder, plain.model)
    assert a in message
    assert b in message


def test_folders_without_one_optimizer(folder: Path, plain, tmp_path: Path) -> None:
    dcp.save(MODEL, checkpoint_id=tmp_path / "model", no_dist=True)
    refused("contains no optimizer's param_groups, only model", tmp_path / "model", plain.model)
    both = {"actor": nested(plain), "critic": nested(plain)}
    dcp.save(both, checkpoint_id=tmp_path / "both", no_dist=True)
    refused(r"contains several optimizers \(actor, critic\)", tmp_path / "both", plain.model)
    shutil.copytree(folder, tmp_path / "optimizer_1")
    shutil.rmtree(tmp_path / "both")
    refused(r"several optimizer states \(optimizer_0, optimizer_1\)", tmp_path, plain.model)


def test_before_the_first_step(tmp_path: Path) -> None:
    model = make_model()
    state = torch.optim.AdamW(list(trainable(model).items())).state_dict()
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    refused("no state: it was saved before the first step", tmp_path, model)


def test_another_optimizer(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.RAdam(trainable(model).values())
    take_steps(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    refused("a variant of AdamW", tmp_path, model)


def test_overrides(folder: Path, plain) -> None:
    overrides = AdamOverrides(lr=3.2e-2)
    adam, _ = read_adam_state(folder, plain.model, registry(plain.model), overrides=overrides)
    assert [group.lr for group in adam.groups] == [3.2e-2, 2e-3]
