"""Groups as trainers build them, replayed: the moments are the live optimizer's, name by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from funcprobe.adapters.optimizer import AdamOverrides, names
from funcprobe.adapters.optimizer.groupings import Grouping
from funcprobe.types import InputError
from support.optimizers import assert_attached, read, take_steps
from support.small_lora import registry, trainable

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**lora):
    """Without keywords the whole model is trained."""
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    if not lora:
        return base
    return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **lora))


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2))


SAVED = "modules_to_save.default.weight"


def halves(model, first, decay=(0.1, 0.1), rates=(1e-3, 1e-3)):
    named = trainable(model).items()
    parts = [[p for n, p in named if first(n, p)], [p for n, p in named if not first(n, p)]]
    return [
        {"params": part, "weight_decay": wd, "lr": lr}
        for part, wd, lr in zip(parts, decay, rates, strict=True)
    ]


def unsloth(model):
    return halves(model, lambda n, _: not n.endswith(SAVED), rates=(1e-3, 1e-4))


def factory(model):
    """LLaMA-Factory's LoRA+: A, B, B without decay, the B of embeddings."""
    decay = {n for n in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in n}
    groups = [
        {"params": [], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [], "lr": 8e-3, "weight_decay": 0.1},
        {"params": [], "lr": 8e-3, "weight_decay": 0.0},
        {"params": [], "lr": 1e-6, "weight_decay": 0.1},
    ]
    for name, p in trainable(model).items():
        index = 0
        if "lora_embedding_B" in name:
            index = 3
        elif "lora_B" in name or p.ndim == 1:
            index = 1 if name in decay else 2
        groups[index]["params"].append(p)
    return groups


def axolotl(model):
    """decay, embeddings, no decay; each only if it has parameters."""
    decay = Trainer.get_decay_parameter_names(None, model)
    groups = [
        {"params": [], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [], "lr": 1e-5, "weight_decay": 0.0},
        {"params": [], "lr": 1e-3, "weight_decay": 0.0},
    ]
    for name, p in trainable(model).items():
        special = any(
            part in name for part in ("modules_to_save.default.weight", "embed_tokens", "lm_head")
        )
        groups[1 if special else 0 if name in decay else 2]["params"].append(p)
    return [group for group in groups if group["params"]]


def by_names(model):
    """DeepSpeed-Chat's and OpenRLHF's: GPT-2's ln_1 and ln_2 decay, which the Trainer's do not."""
    parts = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")
    return halves(model, lambda n, _: not any(part in n for part in parts), (0.1, 0.0))


def by_rank(model):
    return halves(model, lambda _, p: p.ndim >= 2, (0.1, 0.0))


def trainer_groups(model, decay=(0.1, 0.0)):
    names = Trainer.get_decay_parameter_names(None, model)
    return halves(model, lambda n, _: n in names, decay)


HEADS = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
BIASES = {"target_modules": ["q_proj"], "lora_bias": True}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
CASES = {
    "unsloth": (lambda: llama(**HEADS), unsloth, "Unsloth's groups"),
    "factory": (lambda: llama(**EMBEDDING), factory, "LLaMA-Factory's LoRA+"),
    "axolotl": (lambda: llama(**BIASES, modules_to_save=["lm_head"]), axolotl, "axolotl's"),
    "axolotl-two": (lambda: llama(target_modules=["q_proj", "lm_head"]), axolotl, "axolotl's"),
    "by-names": (gpt2, by_names, "OpenRLHF's"),
    "full-trainer": (llama, trainer_groups, "the Trainer's"),
    "full-by-rank": (llama, by_rank, "the Trainer's"),  # the same groups
    "full-axolotl": (llama, axolotl, "axolotl's"),
    "full-one": (gpt2, lambda model: [{"params": list(model.parameters())}], "one group in"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_groups_of_a_trainer(case, tmp_path):
    build, groups, route = CASES[case]
    model = build()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    take_steps(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    adam, report = read(tmp_path / "optimizer.pt", model, registry(model))
    assert_attached(adam, model, optimizer)
    assert report.route.startswith(f"by position, {route}")
    assert report.positional


def test_rates_that_ended_at_zero_keep_the_ratio_they_began_with(tmp_path):
    model = llama(**HEADS)
    optimizer = torch.optim.AdamW(unsloth(model))
    take_steps(model, optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"set optimizer\.lr"):
        read(tmp_path / "optimizer.pt", model, registry(model))
    overrides = AdamOverrides(lr=3e-3)
    adam, _ = read(tmp_path / "optimizer.pt", model, registry(model), overrides=overrides)
    assert [group.lr for group in adam.groups] == pytest.approx([3e-3, 3e-4], rel=1e-12, abs=0)


def test_shapes_choose_between_groups_of_equal_sizes(tmp_path):
    """Two trained matrices against two vectors: Unsloth's second group, or the Trainer's."""
    model = llama(**BIASES, modules_to_save=["embed_tokens", "lm_head"])
    same = (0.0, 0.0)  # weight decay shows nothing
    trainers = trainer_groups(model, same)
    unsloths = [group | {"weight_decay": 0.0} for group in unsloth(model)]
    for groups, route in ((unsloths, "Unsloth's"), (trainers, "the Trainer's")):
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        take_steps(model, optimizer)
        assert [len(group["params"]) for group in groups] == [6, 2]
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        adam, report = read(tmp_path / "optimizer.pt", model, registry(model))
        assert_attached(adam, model, optimizer)
        assert report.route.startswith(f"by position, {route}")


def test_two_orders_that_fit_are_not_guessed_between(tmp_path, monkeypatch):
    model = llama(target_modules=["q_proj"])
    order = list(trainable(model))
    swapped = [order[2], order[1], order[0], order[3]]  # the two lora_A, of one shape
    optimizer = torch.optim.AdamW(trainable(model).values())
    take_steps(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    ways = [Grouping("one way", [order]), Grouping("another way", [swapped])]
    monkeypatch.setattr(names, "groupings", lambda *_: ways)
    with pytest.raises(InputError, match="fit one way and another way, which order them differently"):
        read(tmp_path / "optimizer.pt", model, registry(model))
    monkeypatch.setattr(names, "groupings", lambda *_: [ways[0], ways[0]._replace(what="the same")])
    assert_attached(read(tmp_path / "optimizer.pt", model, registry(model))[0], model, optimizer)


def test_an_unknown_grouping_is_not_called_another_order(tmp_path):
    model = llama(**HEADS)
    params = list(trainable(model).values())
    optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    take_steps(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="no trainer that is known here groups them so") as caught:
        read(tmp_path / "optimizer.pt", model, registry(model))
    assert "another order" not in str(caught.value)
