"""Every key of adapter_config.json is applied, without effect, or refused by its name."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from funcprobe.adapters.checkpoint.adapter import read_adapter_config
from funcprobe.adapters.checkpoint.adapter_fields import (
    APPLIED,
    REJECTED,
    WITHOUT_EFFECT,
    check_fields,
)
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.types import InputError
from support.checkpoints import edit_json

TOKENS = torch.tensor([[5, 12, 6, 13, 3]])
OFF = (None, False, "", [], {})


def load(folder, **given):
    return load_policy(PolicyConfig(checkpoint=str(folder), **given), torch.device("cpu"))


def test_every_field_of_this_peft_is_in_one_list() -> None:
    """A field of a newer peft must be decided on before it is silently taken as harmless."""
    fields = [field.name for field in dataclasses.fields(LoraConfig)]
    lists = {name: [name in known for known in (APPLIED, WITHOUT_EFFECT, REJECTED)] for name in fields}
    assert {name for name, places in lists.items() if sum(places) != 1} == set()
    of_others = {"merge_weights", "lorap_lr_ratio", "lorap_emb_lr"}
    assert (APPLIED | WITHOUT_EFFECT.keys() | REJECTED.keys()) - set(fields) == of_others


def test_what_peft_writes_by_default_is_accepted(tmp_path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert REJECTED.keys() <= written.keys()  # so that each was seen with the value that is off
    assert read_adapter_config(str(tmp_path), None).r == config.r


@pytest.mark.parametrize("key", sorted(REJECTED))
def test_what_changes_the_forward_is_refused_by_name(damaged, key) -> None:
    file = damaged.adapter / "adapter_config.json"
    for off in OFF:
        edit_json(file, **{key: off})
        check_fields(json.loads(file.read_text()), "here")
    edit_json(file, **{key: {"a": 1}})
    with pytest.raises(
        InputError, match=rf"^\S+: adapter_config.json has {key} = .'a': 1.: "
    ) as refused:
        load(damaged.adapter)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [True, 0, 1, "x", [1], {"a": None}])
def test_an_unknown_key_is_refused_by_name(damaged, value) -> None:
    edit_json(damaged.adapter / "adapter_config.json", use_later_lora=value)
    with pytest.raises(
        InputError, match=r"has use_later_lora = .*, which peft .* drops.*delete the key"
    ):
        load(damaged.adapter)


def test_an_unknown_key_that_is_off_is_harmless(damaged) -> None:
    before = load(damaged.adapter)
    for off in OFF:
        edit_json(damaged.adapter / "adapter_config.json", use_later_lora=off)
        after = load(damaged.adapter)
        assert before.params.keys() == after.params.keys()
    edit_json(damaged.adapter / "adapter_config.json", lorap_emb_lr=1e-6, merge_weights=True)
    load(damaged.adapter)


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "zork"])
def test_a_task_with_another_head_is_refused(damaged, task) -> None:
    edit_json(damaged.adapter / "adapter_config.json", task_type=task)
    with pytest.raises(InputError, match=f"has task_type = '{task}', a model with another head"):
        load(damaged.adapter)


WITHOUT = {
    "auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "unsloth_fixed": True},
    "peft_version": "0.99.0",
    "inference_mode": False,
    "lora_dropout": 0.3,
    "megatron_core": "my.core",
    "qalora_group_size": 4,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 3.0, "of_a_later_peft": 1},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "merge_weights": True,
    "lorap_lr_ratio": 4.0,
    "lorap_emb_lr": 1e-6,
}


def test_what_has_no_effect_has_none(damaged) -> None:
    assert WITHOUT.keys() == WITHOUT_EFFECT.keys()
    with torch.no_grad():
        before = load(damaged.adapter).model(TOKENS).logits
        for key, value in WITHOUT.items():
            edit_json(damaged.adapter / "adapter_config.json", **{key: value})
        assert torch.equal(load(damaged.adapter).model(TOKENS).logits, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": r".*layers\.1.*(q|o)_proj"},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    ],
    ids=["exclude_modules", "layers_to_transform", "layer_replication", "pattern", "rslora"],
)
def test_what_is_applied_gives_pefts_logits(damaged, fields) -> None:
    base = AutoModelForCausalLM.from_pretrained(damaged.base)
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **fields))
    model.peft_config["default"].base_model_name_or_path = str(damaged.base)
    model.save_pretrained(damaged.adapter, save_embedding_layers=False)
    plain = AutoModelForCausalLM.from_pretrained(damaged.base)
    plain.config.layer_types *= 2  # of which peft reads as many as there are layers
    with torch.no_grad():
        without = plain(TOKENS).logits
        theirs = PeftModel.from_pretrained(plain, damaged.adapter).eval()(TOKENS).logits
        ours = load(damaged.adapter).model(TOKENS).logits
    assert torch.equal(ours, theirs)
    assert float((ours - without).abs().max()) > 1e-3
