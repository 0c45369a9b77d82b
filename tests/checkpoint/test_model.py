"""Loading a policy: what is loaded is what was trained, in the type asked for."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from funcprobe.adapters.checkpoint.model import check_registry, load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.types import InputError
from support.checkpoints import Checkpoint, character_tokenizer, edit_json

CPU = torch.device("cpu")
TOKENS = torch.tensor([[5, 12, 6, 13, 3]])


def load(checkpoint: Checkpoint, /, **changes):
    return load_policy(
        PolicyConfig.model_validate({"checkpoint": str(checkpoint.adapter), **changes}), CPU
    )


def reference(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """Logits by peft's own loader."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base, dtype=dtype)
    model = PeftModel.from_pretrained(base, checkpoint.adapter).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_the_logits_are_those_of_pefts_own_loader(checkpoint, dtype, attention) -> None:
    policy = load(checkpoint, dtype=dtype, attention=attention)
    with torch.no_grad():
        logits = policy.model(TOKENS).logits
    expected = reference(checkpoint, getattr(torch, dtype))
    assert logits.dtype == expected.dtype == getattr(torch, dtype)
    # Another attention kernel sums in another order: a few roundings of the largest logit.
    tolerance = 0 if attention == "auto" else 8 * torch.finfo(logits.dtype).eps
    assert float((logits - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_float64_is_the_same_policy(checkpoint) -> None:
    policy = load(checkpoint, dtype="float64")
    tensors = (*policy.model.parameters(), *policy.model.buffers())  # rotary frequencies are buffers
    assert {t.dtype for t in tensors} == {torch.float64}
    with torch.no_grad():
        logits = policy.model(TOKENS).logits
    # The float32 weights are carried over exactly; the reference rounds about a hundred times.
    assert torch.allclose(logits, reference(checkpoint, torch.float32).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("asked", "used"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_attention_asked_for_is_the_one_loaded(checkpoint, asked, used) -> None:
    policy = load(checkpoint, attention=asked)
    assert policy.model.config._attn_implementation == policy.attention == used
    assert f"{used} attention" in policy.lines[0]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_damaged_adapter_is_named_by_its_tensor(damaged, value) -> None:
    file = damaged.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    # Where it meets nothing but zeros, no logit would show it.
    name = next(n for n in weights if "lora_A" in n)
    weights[name][0, 0] = value
    weights[name.replace("lora_A", "lora_B")][:] = 0
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} contains a non-finite number: the file is damaged"):
        load(damaged)


def test_the_registry_is_the_adapters_file(checkpoint) -> None:
    policy = load(checkpoint)
    weights = load_file(checkpoint.adapter / "adapter_model.safetensors")
    expected = {n.replace(".weight", ".default.weight"): t for n, t in weights.items()}
    assert list(policy.params) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(policy.params[name], tensor)
        assert tensor.any()
    assert (policy.eos_ids, policy.pad_id) == ((1,), 0)
    assert not policy.model.training
    frozen = [n for n, p in policy.model.named_parameters() if not p.requires_grad]
    assert len(frozen) + len(policy.params) == len(list(policy.model.parameters()))
    said = " ".join(policy.lines)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    assert f"{sum(p.numel() for p in base.parameters()):,} parameters" in said
    assert "12 tensors, 384 trainable parameters" in said


def test_loading_leaves_the_random_state_alone(checkpoint) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = load(checkpoint), load(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one.params[n], two.params[n]) for n in one.params)


def test_loading_starts_no_gpu_but_the_policys(checkpoint, monkeypatch) -> None:
    """Of the CPU's policy none: neither asked for their random states, nor warned of."""
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: pytest.fail("a GPU was started"))
    load(checkpoint)


def test_loading_leaves_the_random_states_of_started_gpus_alone(checkpoint, monkeypatch) -> None:
    kept: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: kept.append(given))
    load(checkpoint)
    assert kept == [("state 0", 0), ("state 1", 1)]


def test_an_adapter_in_a_subfolder(damaged) -> None:
    """As TRL saves its reference policy: a second adapter, which peft writes to ref/."""
    base = AutoModelForCausalLM.from_pretrained(damaged.base)
    model = PeftModel.from_pretrained(base, damaged.adapter)
    before = load(damaged).params
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():
        if ".ref." in name:
            p.data = 2 * before[name.replace(".ref.", ".default.")]
    model.save_pretrained(damaged.adapter)
    ref, own = load(damaged, adapter="ref"), load(damaged)
    assert own.params.keys() == before.keys()
    assert all(torch.equal(own.params[n], t) for n, t in before.items())
    assert {n.replace(".ref.", ".default.") for n in ref.params} == before.keys()
    for name, tensor in ref.params.items():
        assert torch.equal(tensor, 2 * before[name.replace(".ref.", ".default.")])


@pytest.fixture
def verl(damaged):
    """verl's layout (earlier FSDP workers, its merger), from its sources: it does not run here."""
    step = damaged.adapter.parent / "global_step_7"
    actor = step / "actor"
    (actor / "lora_adapter").mkdir(parents=True)
    (actor / "huggingface").mkdir()
    for file in damaged.adapter.iterdir():
        kind = "lora_adapter" if file.name.startswith("adapter_") else "huggingface"
        if file.name != "optimizer.pt":
            shutil.copy(file, actor / kind)
    (actor / "model_world_size_1_rank_0.pt").touch()
    (step / "data.pt").touch()
    for path in damaged.base.glob("token*"):
        path.unlink()  # so that those of verl are the ones that are read
    return step


@pytest.mark.parametrize("inside", [".", "actor", "actor/lora_adapter"])
def test_verls_folders(damaged, verl, inside) -> None:
    expected = load(damaged)
    policy = load(damaged, checkpoint=str(verl / inside))
    assert policy.params.keys() == expected.params.keys()
    assert all(torch.equal(policy.params[n], t) for n, t in expected.params.items())
    assert policy.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert str(verl / "actor" / "lora_adapter") in policy.lines[1]


def test_verls_shards_alone(damaged, verl) -> None:
    shutil.rmtree(verl / "actor" / "lora_adapter")
    with pytest.raises(InputError, match=r"verl's shards but no lora_adapter/: run verl.model_merger"):
        load(damaged, checkpoint=str(verl / "actor"))


def test_several_adapters_are_not_guessed_between(damaged, verl) -> None:
    output = damaged.adapter.parent
    shutil.copytree(damaged.adapter, output / "checkpoint-4")
    says = r"2 of its folders do .checkpoint-2, checkpoint-4.: set policy.checkpoint to one"
    with pytest.raises(InputError, match=says):
        load(damaged, checkpoint=str(output))
    shutil.copytree(verl / "actor" / "lora_adapter", verl / "lora_adapter")
    with pytest.raises(
        InputError, match=r"2 of its folders do .lora_adapter, actor/lora_adapter.: set"
    ):
        load(damaged, checkpoint=str(verl))
    # One alone is not guessed to be the policy either: it may be the reference.
    (output / "only").mkdir()
    shutil.copytree(damaged.adapter, output / "only" / "ref")
    with pytest.raises(InputError, match=r"1 of its folders do .ref.: set policy.checkpoint"):
        load(damaged, checkpoint=str(output / "only"))
    load(damaged, checkpoint=str(output / "only"), adapter="ref")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tied_adapters_are_refused(damaged, dtype) -> None:
    """peft makes two parameters of one memory: an optimizer moves it twice, by two gradients."""
    edit_json(damaged.base / "config.json", tie_word_embeddings=True)
    weights = load_file(damaged.base / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, damaged.base / "model.safetensors", metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(damaged.base)
    targets = ["embed_tokens", "lm_head"]
    config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(damaged.base)
    model.save_pretrained(damaged.adapter)
    with pytest.raises(InputError, match=r"embed_tokens.lora_embedding_A.*share memory"):
        load(damaged, dtype=dtype)


def test_another_base_of_the_same_shape_can_be_given(damaged, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(damaged.base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path="/gone")
    policy = load(damaged, base=str(other))
    assert policy.base == str(other)
    found = dict(policy.model.named_parameters())["base_model.model.model.norm.weight"]
    assert torch.equal(found, weights["model.norm.weight"])


def test_weights_that_the_base_does_not_use_are_named(damaged) -> None:
    weights = load_file(damaged.base / "model.safetensors")
    weights["model.mtp.weight"] = torch.ones(3)
    save_file(weights, damaged.base / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors in its files are not used, as model.mtp.weight" in load(damaged).lines[-1]
    assert "not used" not in " ".join(load(damaged).lines[:-1])


def test_trust_remote_code_is_off_and_is_passed_on(damaged) -> None:
    """A base with code of its own: refused by default, run where it is asked for."""
    code = "from transformers import Qwen2Config\nclass C(Qwen2Config):\n    model_type = 'mine'\n"
    (damaged.base / "mine.py").write_text(code)
    edit_json(damaged.base / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})
    with pytest.raises(InputError, match="contains custom code"):
        load(damaged)
    # Its model class is not registered for that configuration, so this is as far as it goes.
    with pytest.raises(InputError, match="Unrecognized configuration class"):
        load(damaged, trust_remote_code=True)


def test_without_an_adapter_parameter_there_is_nothing_to_probe() -> None:
    with pytest.raises(InputError, match=r"no LoRA parameters .nothing trainable"):
        check_registry({}, 10)
    with pytest.raises(InputError, match=r"no LoRA parameters .1 trainable tensors, as lm_head"):
        check_registry({"lm_head.weight": torch.zeros(2)}, 10)
    check_registry({"a.lora_A.default.weight": torch.zeros(10)}, 10)
    with pytest.raises(InputError, match="11 parameters"):
        check_registry({"a.lora_A.default.weight": torch.zeros(11)}, 10)


def test_learned_positions_end(command, tmp_path, checkpoint) -> None:
    """GPT-2 has a table of 16 positions: more tokens are refused before anything is sampled."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=14, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=1)
    )
    base.save_pretrained(tmp_path / "gpt2")
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gpt2")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    character_tokenizer().save_pretrained(tmp_path / "adapter")
    given = {
        "policy.checkpoint": str(tmp_path / "adapter"),
        "optimizer.rule": "sgd",
        "prompts.source": str(checkpoint.prompts),
        "run.device": "cpu",
    }
    (tmp_path / "c.toml").touch()
    for most, status in ((11, 0), (12, 2)):  # the longest prompt has 5 tokens
        settings = given | {"sampling.max_new_tokens": most, "sampling.B_U": 4}
        parts = [x for k, v in settings.items() for x in ("--set", f"{k}={json.dumps(v)}")]
        outcome = command("run", "c.toml", "--dry-run", *parts)
        assert outcome.status == status, outcome.err
    assert "may have 17 tokens, the model has 16 positions" in outcome.err
