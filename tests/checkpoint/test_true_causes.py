"""Refusals that name the cause: Git LFS pointers, and bases that are adapters themselves."""

import json
import shutil

import pytest
import torch

from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.optimizer import open_state
from funcprobe.types import InputError
from support.checkpoints import edit_json
from support.commands import refused

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"

pytestmark = pytest.mark.usefixtures("offline")


def load(folder, **given):
    return load_policy(PolicyConfig(checkpoint=str(folder), **given), torch.device("cpu"))


@pytest.mark.parametrize(
    "file",
    [
        "checkpoint-2/adapter_model.safetensors",
        "checkpoint-2/adapter_config.json",
        "checkpoint-2/tokenizer.json",
        "checkpoint-2/optimizer.pt",
        "base/model.safetensors",
        "base/config.json",
        "prompts.jsonl",
    ],
)
def test_a_pointer_is_named(command, damaged, file) -> None:
    path = damaged.base.parent / file
    path.write_bytes(POINTER)
    refused(command, damaged.settings(), f"{path} is a Git LFS pointer", "run git lfs pull")


def test_pointers_of_other_files(command, damaged, tmp_path) -> None:
    given = damaged.settings()
    for name in ("prompts.parquet", "rows.parquet", "rows.jsonl"):
        (tmp_path / name).write_bytes(POINTER)
    refused(command, given | {"prompts.source": str(tmp_path / "prompts.parquet")}, "LFS pointer")
    for name in ("rows.parquet", "rows.jsonl"):
        refused(command, given | {"rollouts.update": str(tmp_path / name)}, f"{name} is a Git LFS")
    (damaged.adapter / "adapter_model.safetensors").rename(damaged.adapter / "kept")
    (damaged.adapter / "adapter_model.bin").write_bytes(POINTER)
    refused(command, given, "adapter_model.bin is a Git LFS pointer")


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_pointers_of_a_base_in_other_forms(damaged, weights) -> None:
    (damaged.base / "model.safetensors").unlink()
    (damaged.base / weights).write_bytes(POINTER)
    if weights.startswith("model-"):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": weights}}
        (damaged.base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{weights} is a Git LFS pointer"):
        load(damaged.adapter)


def test_a_folder_of_an_optimizers_state(tmp_path) -> None:
    (tmp_path / "zero" / "layer").mkdir(parents=True)
    for name in ("fp32", "exp_avg", "exp_avg_sq", "step"):
        (tmp_path / "zero" / "layer" / f"{name}.pt").write_bytes(POINTER)
    (tmp_path / "mp_rank_00_optim_states.pt").write_bytes(POINTER)
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        open_state(tmp_path)


def test_a_pointer_that_is_not_read_is_no_reason(damaged) -> None:
    """Of two formats of the same weights, one may have been pulled."""
    (damaged.base / "pytorch_model.bin").write_bytes(POINTER)
    (damaged.adapter / "adapter_model.bin").write_bytes(POINTER)
    load(damaged.adapter)
    weights = damaged.base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    with pytest.raises(InputError, match="the base model cannot be loaded"):
        load(damaged.adapter)


def test_a_base_that_is_an_adapter_is_named(damaged) -> None:
    """As after a second stage of training on the first one's checkpoint."""
    first = damaged.adapter.parent / "first"
    shutil.copytree(damaged.adapter, first)
    edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path=str(first))
    says = rf"base {first} is itself an adapter .*merge_and_unload.* set policy.base to the merged"
    with pytest.raises(InputError, match=says):
        load(damaged.adapter)
    load(damaged.adapter, base=str(damaged.base))
    # transformers would take its base and both adapters, silently, even where weights are beside it.
    for path in (*damaged.base.glob("config.json"), damaged.base / "model.safetensors"):
        shutil.copy(path, first)
    with pytest.raises(InputError, match="is itself an adapter"):
        load(damaged.adapter)
