"""Optimizer states as verl leaves them, made with torch's own FSDP on one process (gloo, CPU).

verl itself needs ray and a GPU. What is here repeats its calls, read in verl 0.9.1: the LoRA and wrap
policies of FSDPEngine, its optimizer, and FSDPCheckpointManager.save_checkpoint. Only
sync_module_states is off, which wants a GPU.
"""

import functools
import shutil
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import (
    _or_policy,
    lambda_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from funcprobe.adapters.optimizer import find_state, read_adam_state
from funcprobe.types import InputError, Params

OPTIM, MODEL = "optim_world_size_1_rank_0.pt", "model_world_size_1_rank_0.pt"
CPU, CUDA = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"  # as pickle writes a device
CUT = "cannot be read|.*torch checkpoint|.*truncated"
KINDS = ("flat", "original", "fsdp2")
LAYOUTS = [*KINDS, *(f"{k} tied" for k in KINDS), *(f"{k} norm" for k in KINDS), "flat 8-bit"]


def make_model(layout: str = "", seed: int = 0) -> torch.nn.Module:
    """With a layout of "norm", the last norm is trained: verl so continues an adapter that has it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings="tied" in layout,
        )
        base = Qwen2ForCausalLM(config)
        base.enable_input_require_grads()
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            target_modules=["q_proj", "v_proj", "down_proj"],
            modules_to_save=["model.norm"] if "norm" in layout else None,
            bias="none",
            init_lora_weights=False,
        )
        return get_peft_model(base, lora)


def registry(model: torch.nn.Module) -> Params:
    return {n: p.detach() for n, p in sorted(model.named_parameters()) if p.requires_grad}


def trains(module: torch.nn.Module) -> bool:
    """verl's leaf modules with a weight that trains: under LoRA, each is a unit of FSDP."""
    weight = getattr(module, "weight", None)
    return not list(module.named_children()) and weight is not None and weight.requires_grad


def wrapped(model: torch.nn.Module, layout: str, mesh: DeviceMesh) -> torch.nn.Module:
    if "fsdp2" not in layout:
        leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=trains)
        layers = functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={Qwen2DecoderLayer}
        )
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=functools.partial(_or_policy, policies=[leaves, layers]),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.float32),
            device_mesh=mesh,
            device_id=torch.device("cpu"),
            use_orig_params="original" in layout,
        )
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
    for name, module in list(model.named_modules()):
        ends = name.endswith(("embed_tokens", "lm_head")) and "tied" not in layout
        if ends or isinstance(module, Qwen2DecoderLayer):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def save_as_verl(folder: Path, layout: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Two steps, then verl's two files. Returns torch's gathered state, by name."""
    folder.mkdir(parents=True)
    model = wrapped(make_model(layout), layout, mesh)
    hyper: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.01, "betas": (0.9, 0.95)}
    if "8-bit" in layout:  # optimizer_impl = "bitsandbytes.optim", optimizer = "AdamW8bit"
        hyper["min_8bit_size"] = 40  # so that down_proj's lora_A, of 48, is 8-bit
        optimizer = bnb.optim.AdamW8bit(model.parameters(), **hyper)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **hyper)
    tokens = torch.tensor([[1, 2, 3, 4, 9]])
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    context = nullcontext()
    if "fsdp2" not in layout:
        context = FullyShardedDataParallel.state_dict_type(
            model,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )
    with context:
        torch.save(model.state_dict(), folder / MODEL)
        torch.save(optimizer.state_dict(), folder / OPTIM)
    if "8-bit" in layout:
        return {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """layout -> its `global_step_2` folder, and torch's gathered state."""
    found = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as verl does while it saves
            for layout in LAYOUTS:
                folder = tmp_path_factory.mktemp("verl") / "global_step_2"
                gathered = save_as_verl(folder / "actor", layout, mesh)
                found[layout] = SimpleNamespace(folder=folder, gathered=gathered)
    finally:
        dist.destroy_process_group()
    return found


@pytest.fixture
def actor(runs: dict[str, SimpleNamespace], tmp_path: Path) -> Any:
    """A copy of a layout's `actor` folder, to spoil."""

    def copy(layout: str) -> Path:
        return Path(shutil.copytree(runs[layout].folder / "actor", tmp_path / layout / "actor"))

    return copy


def assert_gathered(adam: Any, gathered: dict[str, Any]) -> None:
    assert {n for n, entry in gathered["state"].items() if entry} == adam.exp_avg.keys()
    for name in adam.exp_avg:
        assert torch.equal(adam.exp_avg[name], gathered["state"][name]["exp_avg"]), name
        assert torch.equal(adam.exp_avg_sq[name], gathered["state"][name]["exp_avg_sq"]), name
        assert type(adam.exp_avg[name]) is torch.Tensor
    assert set(adam.step.values()) == {2}


def refused(match: str, path: Path, model: torch.nn.Module, **options: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_adam_state(path, model, registry(model), **options)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


def edit(path: Path, change: Any) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


# What is read


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_every_layout_is_what_torch_gathers(layout: str, runs: dict[str, Any]) -> None:
    run = runs[layout]
    model = make_model(layout, seed=1)  # names and shapes come from it, no numbers
    adam, report = read_adam_state(run.folder, model, registry(model))
    assert_gathered(adam, run.gathered)
    assert adam.groups[0].names == tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert adam.groups[0][1:] == (3e-4, 0.9, 0.95, 1e-8, 0.01)
    assert report.path == run.folder / "actor" / OPTIM
    assert report.format == "verl"
    assert not report.positional
    count = 13 if "norm" in layout else 12
    assert report.coverage == dict.fromkeys(("exp_avg_sq", "exp_avg", "step"), count)
    assert f"names are those of {MODEL}, in its order" in report.notes


def test_eight_bit_and_flat(runs: dict[str, Any]) -> None:
    """Against the dequantised, flat tensors, in order; test_eight_bit.py has bitsandbytes itself."""
    model = make_model(seed=1)
    path = runs["flat 8-bit"].folder / "actor" / OPTIM
    adam, report = read_adam_state(path, model, registry(model))
    state = torch.load(path, weights_only=True)["state"]
    order = [n for n, p in model.named_parameters() if p.requires_grad]
    entries = [entry["__bnb_optimizer_quant_state__"] for entry in state.values()]
    for name, entry in zip(order, entries, strict=True):
        values = entry["state2"]
        if values.dtype is torch.uint8:
            values = entry["qmap2"][values.int()] * entry["absmax2"]  # one block
        assert torch.equal(adam.exp_avg_sq[name].flatten(), values)
        assert adam.exp_avg_sq[name].shape == registry(model)[name].shape
    assert any("2 of 12 tensors are 8-bit" in note for note in report.notes)


def test_where_it_is_found(runs: dict[str, Any], actor: Any) -> None:
    folder = runs["flat"].folder
    assert find_state(folder) == find_state(folder / "actor") == folder / "actor" / OPTIM
    copied = actor("flat")
    for adapter in (copied / "lora_adapter", copied / "huggingface" / "lora_adapter"):
        adapter.mkdir(parents=True)
        assert find_state(adapter) == copied / OPTIM
    (copied / "lora_adapter" / "optimizer.pt").touch()
    assert find_state(copied / "lora_adapter") == copied / "lora_adapter" / "optimizer.pt"


def test_the_adapter_alone_in_the_model_file(actor: Any, runs: dict[str, Any]) -> None:
    """checkpoint.save_contents with lora_only: only names with lora_ are kept."""
    folder, model = actor("flat"), make_model()

    def lora_only(state: dict[str, Any]) -> None:
        for name in [name for name in state if "lora_" not in name]:
            del state[name]

    edit(folder / MODEL, lora_only)
    adam, _ = read_adam_state(folder, model, registry(model))
    assert_gathered(adam, runs["flat"].gathered)


@pytest.mark.parametrize("layout", ["original", "fsdp2"])
def test_without_the_model_file_by_position(layout: str, actor: Any, runs: dict[str, Any]) -> None:
    folder, model = actor(layout), make_model()
    (folder / MODEL).unlink()
    refused("not verifiable.*accept_positional", folder, model)
    adam, report = read_adam_state(folder, model, registry(model), accept_positional=True)
    assert_gathered(adam, runs[layout].gathered)
    assert report.route == "by position, one group of all in named_parameters() order"
    assert report.positional


def test_dtensors_of_a_gpu(actor: Any, runs: dict[str, Any]) -> None:
    """A run on a GPU writes its device into the file; here by editing, for want of one."""
    folder, model = actor("fsdp2"), make_model()
    for file in (OPTIM, MODEL):
        with zipfile.ZipFile(folder / file) as whole:
            parts = {name: whole.read(name) for name in whole.namelist()}
        with zipfile.ZipFile(folder / file, "w") as whole:
            for name, data in parts.items():
                pickled = name.endswith("data.pkl")
                assert not pickled or data.count(CPU) > 1
                whole.writestr(name, data.replace(CPU, CUDA) if pickled else data)
    adam, _ = read_adam_state(folder, model, registry(model))
    assert_gathered(adam, runs["fsdp2"].gathered)


def test_what_the_refusal_of_shards_recommends(runs: dict[str, Any], tmp_path: Path) -> None:
    model = make_model()
    for layout in ("flat", "fsdp2"):
        gathered = runs[layout].gathered
        torch.save(gathered, tmp_path / "optimizer.pt")
        adam, report = read_adam_state(tmp_path / "optimizer.pt", model, registry(model))
        assert_gathered(adam, gathered)
        assert not report.positional


# What is refused


def test_shards(actor: Any) -> None:
    folder, model = actor("flat"), make_model()
    for rank in (0, 1):
        shutil.copy(folder / OPTIM, folder / f"optim_world_size_2_rank_{rank}.pt")
    assert find_state(folder) == folder / OPTIM  # a whole one is there, too
    (folder / OPTIM).unlink()
    refused("in 2 shards.*train on one GPU", folder, model)
    refused("in 2 shards.*full_state_dict=True", folder / "optim_world_size_2_rank_1.pt", model)
    refused("in 2 shards", folder.parent, model)


def test_flat_without_its_model(actor: Any) -> None:
    folder, model = actor("flat"), make_model()
    names = list(torch.load(folder / MODEL, weights_only=True))
    lora = [name for name in names if "lora_" in name]
    edit(folder / MODEL, lambda state: state.pop(lora[3]))
    refused(f"12 flat tensors.*{MODEL} beside it has 11: give both files", folder, model)
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-3000])
    refused(f"{MODEL} beside it: ({CUT})", folder, model)
    torch.save([1, 2], folder / MODEL)
    refused(f"{MODEL} beside it is not a model's state", folder, model)
    (folder / MODEL).unlink()
    refused(f"12 flat tensors.*there is no {MODEL} beside it", folder, model)


@pytest.mark.parametrize("layout", ["flat", "original"])
def test_shuffled(layout: str, actor: Any) -> None:
    folder, model = actor(layout), make_model()
    order = [n for n, p in model.named_parameters() if p.requires_grad]

    def shuffle(state: dict[str, Any]) -> None:
        keys = list(state["state"])
        entries = [state["state"][key] for key in keys[::-1]]
        state["state"] = dict(zip(keys, entries, strict=True))

    edit(folder / OPTIM, shuffle)
    # Reversed, the first is down_proj's lora_B, whose shape is not q_proj's lora_A's, but its size is.
    first = order[1] if layout == "flat" else order[0]
    refused(rf"exp_avg of {first} \(position \d+\) has shape", folder, model)


@pytest.mark.parametrize("layout", KINDS)
def test_missing_and_truncated(layout: str, actor: Any) -> None:
    folder, model = actor(layout), make_model()
    order = [n for n, p in model.named_parameters() if p.requires_grad]

    def drop(state: dict[str, Any]) -> None:
        for key in list(state["state"])[:2]:
            del state["state"][key]["exp_avg_sq"]

    edit(folder / OPTIM, drop)
    refused(f"exp_avg_sq 10, .*missing: {order[0]}, {order[1]};", folder, model)
    edit(folder / OPTIM, lambda state: [state["state"].pop(k) for k in list(state["state"])[:2]])
    match = "10 flat tensors.*has 12" if layout == "flat" else f"missing: {order[0]}, {order[1]};"
    refused(match, folder, model)
    path = folder / OPTIM
    path.write_bytes(path.read_bytes()[:-3000])
    refused(CUT, path, model)


def test_another_adapter_and_another_optimizer(actor: Any, tmp_path: Path) -> None:
    folder, model = actor("original"), make_model()
    other = get_peft_model(model.unload(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    refused("state for parameters that are not trainable: .*down_proj", folder, other)
    state = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
    torch.save(state, folder / OPTIM)
    refused("state of SGD with momentum; expected AdamW", folder, make_model())
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, folder / OPTIM)
    refused("no state: it was saved before the first step", folder, make_model())


def test_under_the_trainers_file_name(actor: Any) -> None:
    """Then it is read by position, like any of torch's; flat, its positions are not the model's."""
    model = make_model()
    for layout, match in (("original", "not verifiable"), ("flat", "contains 15 tensors")):
        folder = actor(layout)
        refused(match, (folder / OPTIM).rename(folder / "optimizer.pt"), model)


def test_what_verl_does_not_write_under_its_file_name(actor: Any, runs: dict[str, Any]) -> None:
    folder, model = actor("original"), make_model()

    def split(state: dict[str, Any]) -> None:
        (group,) = state["param_groups"]
        second = group | {"params": group["params"][20:], "lr": 1.0}
        state["param_groups"] = [group | {"params": group["params"][:20]}, second]

    edit(folder / OPTIM, split)  # one group's numbers may not stand for both
    refused("contains 39 tensors in groups of 20 and 19", folder, model)
    torch.save(runs["original"].gathered, folder / OPTIM)
    adam, _ = read_adam_state(folder, model, registry(model))
    assert_gathered(adam, runs["original"].gathered)
