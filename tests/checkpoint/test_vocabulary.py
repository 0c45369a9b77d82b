"""Vocabularies that were resized in training, and tokens for which a model has no row."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.checkpoint.skeleton import skeleton
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.types import InputError
from support.checkpoints import PIECES, Checkpoint, character_tokenizer, edit_json
from support.commands import refused

ROWS = len(PIECES)
TOKENS = torch.tensor([[5, 12, 6, 13, 3]])
LORA = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "frozen": LORA,
    "trained": LORA | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": LORA | {"trainable_token_indices": [3, ROWS - 3]},
    "pissa": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "init_lora_weights": "pissa"},
}


def resized(
    checkpoint: Checkpoint, rows: int, *, tied: bool = False, save: bool = True, **lora
) -> torch.nn.Module:
    """An adapter whose run gave its base `rows` rows, of other values than the base's; the policy."""
    edit_json(checkpoint.base / "config.json", tie_word_embeddings=tied)
    if tied:
        weights = load_file(checkpoint.base / "model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, checkpoint.base / "model.safetensors", metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base.resize_token_embeddings(rows, mean_resizing=False)
        for module in {base.get_input_embeddings(), base.get_output_embeddings()}:
            module.weight.data += 0.3 * torch.randn_like(module.weight)
        model = get_peft_model(base, LoraConfig(**{"r": 2, "init_lora_weights": False} | lora))
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = str(checkpoint.base)
    model.save_pretrained(checkpoint.adapter, save_embedding_layers=save)
    return model.eval()


def load(checkpoint: Checkpoint, **given):
    return load_policy(PolicyConfig(checkpoint=str(checkpoint.adapter), **given), torch.device("cpu"))


@pytest.mark.parametrize(
    ("tied", "rows"), [(False, ROWS + 5), (True, ROWS + 5), (False, ROWS - 1), (True, ROWS)]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])
def test_the_logits_are_those_of_the_resized_policy(damaged, kind, tied, rows) -> None:
    trained = resized(damaged, rows, tied=tied, **KINDS[kind])
    character_tokenizer(PIECES[: min(rows, ROWS)]).save_pretrained(damaged.adapter)
    policy = load(damaged)
    tokens = TOKENS.clamp(max=rows - 1)
    with torch.no_grad():
        ours, theirs = policy.model(tokens).logits, trained(tokens).logits
    assert ours.shape == (1, 5, rows)
    assert torch.equal(ours, theirs)
    said = f"resized in training from {ROWS} to {rows} rows"
    assert any(said in line for line in policy.lines) == (rows != ROWS)
    names = {n for n, p in trained.named_parameters() if p.requires_grad}
    assert policy.params.keys() == names


def test_an_initialisation_that_changed_the_base_is_repeated_before(damaged) -> None:
    """The file has the embeddings without the initial factors: they are not subtracted twice."""
    trained = resized(damaged, ROWS + 5, **KINDS["pissa"])
    with torch.no_grad():
        ours, theirs = load(damaged).model(TOKENS).logits, trained(TOKENS).logits
    assert torch.allclose(ours, theirs, atol=1e-4)  # the decomposition of q_proj is repeated


def test_peft_agrees_on_a_base_that_is_resized_before(damaged) -> None:
    resized(damaged, ROWS + 5, **KINDS["frozen"])
    base = AutoModelForCausalLM.from_pretrained(damaged.base)
    base.resize_token_embeddings(ROWS + 5)
    theirs = PeftModel.from_pretrained(base, damaged.adapter).eval()
    with torch.no_grad():
        assert torch.equal(load(damaged).model(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [("lora", "lacks the resized model.embed_tokens.weight"), ("trained", "lacks the resized lm_head")],
)
def test_an_embedding_that_the_file_lacks(damaged, kind, lacks) -> None:
    lora = KINDS[kind] if kind == "lora" else LORA | {"modules_to_save": ["embed_tokens"]}
    resized(damaged, ROWS + 5, save=False, **lora)
    says = f"resized in training from {ROWS} to {ROWS + 5} rows, but the file {lacks}"
    with pytest.raises(InputError, match=says) as caught:
        load(damaged)
    assert "save_embedding_layers=True" in str(caught.value)


def test_new_tokens_that_the_file_lacks(damaged) -> None:
    lora = LORA | {"trainable_token_indices": [ROWS + 2]}
    resized(damaged, ROWS + 5, save=False, **lora)
    says = f"resized in training: trainable_token_indices has {ROWS + 2}, the base has {ROWS} rows"
    with pytest.raises(InputError, match=says):
        load(damaged)


def test_embeddings_of_two_sizes(damaged) -> None:
    resized(damaged, ROWS + 5, **KINDS["frozen"])
    file = damaged.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.lm_head.weight"] = weights["base_model.model.lm_head.weight"][1:].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"resized in training to {ROWS + 4} and {ROWS + 5} rows"):
        load(damaged)


@pytest.mark.parametrize("kind", ["trained", "lora"])
def test_the_skeleton_has_the_rows_too(damaged, kind) -> None:
    """funcprobe inspect reads no weights, but their shapes."""
    resized(damaged, ROWS + 5, **KINDS[kind])
    bones = skeleton(damaged.adapter, None, "default").params
    policy = load(damaged).params
    assert {n: t.shape for n, t in bones.items()} == {n: t.shape for n, t in policy.items()}


def test_an_embedding_that_is_not_finite(damaged) -> None:
    resized(damaged, ROWS + 5, **KINDS["frozen"])
    file = damaged.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.embed_tokens.weight"
    weights[name][ROWS + 1, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} contains a non-finite number"):
        load(damaged)


def test_other_embeddings_are_another_policy(damaged) -> None:
    """Stages of a run are kept under a hash of the policy; the frozen embeddings are part of it."""
    found = []
    for value in (0.0, 1.0):
        resized(damaged, ROWS + 5, **KINDS["frozen"])
        file = damaged.adapter / "adapter_model.safetensors"
        weights = load_file(file)
        weights["base_model.model.model.embed_tokens.weight"] += value
        save_file(weights, file, metadata={"format": "pt"})
        found.append(load(damaged).settings)
    assert found[0]["embeddings"] != found[1]["embeddings"]
    assert found[0]["adapter_config"] == found[1]["adapter_config"]


def with_more_tokens(checkpoint: Checkpoint, *tokens: str, **special: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(checkpoint.adapter)


def test_a_token_that_no_prompt_has_is_harmless(damaged, command, probe, tmp_path) -> None:
    with_more_tokens(damaged, "<image>")
    probe("more", of=damaged)
    log = (tmp_path / "runs" / "more" / "run.log").read_text()
    assert f"1 of the tokenizer's tokens have no row in the model, as '<image>' (id {ROWS}" in log
    damaged.prompts.write_text(damaged.prompts.read_text() + json.dumps({"prompt": "3<image>"}) + "\n")
    shutil.rmtree(tmp_path / "runs")
    says = f"prompt 7: the tokenizer's token '<image>' has id {ROWS}, but the model has {ROWS} rows"
    refused(command, damaged.settings(), says)


@pytest.mark.parametrize(
    ("special", "what"), [("eos_token", "end-of-sequence"), ("pad_token", "padding")]
)
def test_a_token_of_the_end_or_padding_needs_a_row(damaged, special, what) -> None:
    with_more_tokens(damaged, **{special: "<new>"})
    with pytest.raises(
        InputError, match=f"the {what} token '<new>' has id {ROWS}, .*resized in training"
    ):
        load(damaged)
