"""Models that also read images, used for text alone: the logits are the whole model's, to the bit."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import funcprobe
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.checkpoint.skeleton import skeleton
from funcprobe.adapters.config.batches import SamplingConfig
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.types import InputError
from support.architectures import SHAPE, three_routes
from support.checkpoints import PIECES, character_tokenizer, sets
from support.policies import random_like

TEXT = SHAPE | {"vocab_size": len(PIECES) + 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"image_size": 28, "patch_size": 14}
IMAGE = len(PIECES)  # ids that stand for images: no text has them


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    text = TEXT | {"head_dim": 16, "sliding_window": 16, "layer_types": layers}
    ids = {"image_token_index": IMAGE, "boi_token_index": IMAGE + 1, "eoi_token_index": IMAGE + 2}
    config = Gemma3Config(
        text_config=text, vision_config=VISION | PATCHES, mm_tokens_per_image=4, **ids
    )
    return Gemma3ForConditionalGeneration(config)


def mistral3():
    text = TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
    vision = VISION | PATCHES | {"model_type": "pixtral", "head_dim": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return Mistral3ForConditionalGeneration(config)


def qwen25():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 14}
    ids = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1}
    ids |= {"vision_start_token_id": IMAGE + 2, "vision_end_token_id": IMAGE + 3}
    text = TEXT | {"rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )


BUILD = {"gemma3": gemma3, "mistral3": mistral3, "qwen2.5-vl": qwen25}
OF_TEXT = r".*language_model.*\.(q_proj|v_proj)"
TOKENS = torch.tensor([[5, 12, 6, 13, 3]])


def saved(build, folder, **lora):
    """A base and an adapter on disk; the policy as it was trained."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        base = build()
        base.save_pretrained(folder / "base")
        given = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | lora
        model = get_peft_model(base, LoraConfig(**given))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    character_tokenizer().save_pretrained(folder / "adapter")
    return model.eval()


def load(folder, **given):
    config = PolicyConfig(checkpoint=str(folder / "adapter"), **given)
    return load_policy(config, torch.device("cpu"))


@pytest.mark.parametrize("name", BUILD)
def test_the_logits_are_the_whole_models(tmp_path, name) -> None:
    trained = saved(BUILD[name], tmp_path, target_modules=OF_TEXT)
    policy = load(tmp_path)
    with torch.no_grad():
        ours, theirs = policy.model(TOKENS).logits, trained(TOKENS).logits
    assert torch.equal(ours, theirs)
    assert policy.params.keys() == {n for n, p in trained.named_parameters() if p.requires_grad}
    # Sampling with padded prompts leaves nothing behind that changes the next forward.
    sampling = SamplingConfig(max_new_tokens=4, generation_batch=2)
    sample_responses(policy, [[5, 12, 6], [5]], sampling, 3)
    with torch.no_grad():
        assert torch.equal(policy.model(TOKENS).logits, theirs)
    assert skeleton(tmp_path / "adapter", None, "default").params.keys() == policy.params.keys()


@pytest.mark.parametrize("name", BUILD)
def test_derivatives(tmp_path, name) -> None:
    saved(BUILD[name], tmp_path, target_modules=OF_TEXT)
    policy = load(tmp_path, dtype="float64")
    three_routes(funcprobe.bind(policy.model, max_tokens=64), random_like(policy.params)).require_equal(
        1e-7
    )


@pytest.mark.parametrize("name", BUILD)
def test_an_adapter_of_the_vision_part_is_refused(tmp_path, name) -> None:
    saved(BUILD[name], tmp_path, target_modules="all-linear")
    with pytest.raises(InputError, match=r"of its \d+ tensors change what the model does with images"):
        load(tmp_path)


def test_an_adapter_of_the_text_part_as_a_model_of_its_own(tmp_path) -> None:
    """As of Gemma3ForCausalLM on the weights of the whole model: its names lack language_model."""
    saved(gemma3, tmp_path, target_modules=OF_TEXT)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace("language_model.", ""): t for name, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"trained on its text part as a model of its own"):
        load(tmp_path)


def test_the_whole_model_trained_is_its_text_part(tmp_path) -> None:
    model = qwen25()
    model.save_pretrained(tmp_path / "adapter")
    character_tokenizer().save_pretrained(tmp_path / "adapter")
    names = set(load(tmp_path).params)
    assert {n for n, _ in model.named_parameters() if "visual" not in n} == names
    assert any("visual" in n for n, _ in model.named_parameters())


@pytest.mark.slow
def test_a_run(tmp_path, command, checkpoint) -> None:
    saved(gemma3, tmp_path, target_modules=OF_TEXT)
    given = checkpoint.settings() | {"policy.checkpoint": str(tmp_path / "adapter")}
    given |= {"optimizer.rule": "sgd", "optimizer.lr": 1e-3, "measure.etas": [1e-4]}
    (tmp_path / "c.toml").touch()
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "runs" / "probe" / "results.json").read_text())
    assert [c["name"] for c in found["checks"] if not c["passed"]] == []
