"""Full fine-tuning: a folder with a whole model and the state of an optimizer of all its parameters."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from funcprobe import (
    bind,
    collate,
    first_order_passes,
    response_mask,
    summarise,
    tangents,
    token_stats,
    update_batch,
    weighted_grad,
)
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.checkpoint.padding import as_trained, drop_padding_rows
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.inspection import inspect
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.along import update_gradients
from funcprobe.step.adam import update_direction
from funcprobe.tree import dot, multiply
from funcprobe.types import InputError
from support import builders
from support.checkpoints import PIECES, Checkpoint, character_tokenizer
from support.commands import refused
from support.optimizers import assert_attached
from support.policies import random_like
from support.small_lora import trainer_run

SHAPE = builders.SHAPE | {"vocab_size": len(PIECES), "bos_token_id": None}


def make_full(folder: Path, prompts: Path, rewards: Path, *, tied: bool = True) -> Checkpoint:
    """A Llama, all of it trained by two steps of AdamW in the Trainer's groups."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.01},
            {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        for _ in range(2):
            tokens = torch.randint(2, len(PIECES), (4, 8))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return Checkpoint(folder, folder, prompts, rewards)


@pytest.fixture(scope="module")
def full(tmp_path_factory, checkpoint) -> Checkpoint:
    """Not to be changed."""
    return make_full(tmp_path_factory.mktemp("full"), checkpoint.prompts, checkpoint.rewards)


def load(folder: Path, **given):
    return load_policy(PolicyConfig(checkpoint=str(folder), **given), torch.device("cpu"))


@pytest.mark.parametrize("tied", [True, False])
def test_all_parameters_are_the_registry(tmp_path, checkpoint, tied) -> None:
    folder = make_full(tmp_path / "m", checkpoint.prompts, checkpoint.rewards, tied=tied).base
    policy = load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    expected = dict(theirs.named_parameters())
    assert ("lm_head.weight" in expected) != tied  # tied weights appear once
    assert policy.params.keys() == expected.keys()
    assert all(torch.equal(policy.params[n], p) for n, p in expected.items())
    tokens = torch.tensor([[5, 12, 6]])
    with torch.no_grad():
        assert torch.equal(policy.model(tokens).logits, theirs(tokens).logits)
    count = sum(p.numel() for p in expected.values())
    said = " ".join(policy.lines)
    assert f"no adapter: all {count:,} parameters in {len(expected)} tensors are trained" in said
    assert policy.base == str(folder)


@pytest.mark.slow
def test_a_run(full, probe, tmp_path, capsys) -> None:
    found = probe("one", of=full)
    assert [c for c in found["checks"] if not c["passed"]] == []
    assert not [c for c in found["checks"] if "adapter" in c["name"]]
    manifest = json.loads((tmp_path / "runs" / "one" / "manifest.json").read_text())
    assert manifest["optimizer"]["route"].startswith("by position, the Trainer's [decay, no-decay]")
    assert manifest["optimizer"]["parameters"] == 20
    assert manifest["inputs"]["policy"]["base"].keys() >= {"config.json", "model.safetensors"}
    # The padding token occurs in responses. Its row has no second moment, hence 1 / eps in P.
    used = (pq.read_table(tmp_path / "runs" / "one" / "rollouts" / "update.parquet"))["response_ids"]
    assert any(0 in ids for ids in used.to_pylist())
    first = found["first_order"]
    assert first["se_over_U"]["value"] < 100 * abs(first["from_update"]["value"])


def test_inspect(full) -> None:
    found = inspect(full.base)
    assert found["names"]["coverage"] == {"exp_avg_sq": 20, "exp_avg": 20, "step": 20}
    assert found["names"]["base"] == str(full.base)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy.mode": "qlora"}, ("has a whole model", 'set policy.mode = "lora"')),
        ({"policy.base": "some/base"}, ("all of which was trained: remove policy.base = some/base",)),
        ({"policy.revision": "main"}, ("remove policy.revision = main",)),
        ({"policy.adapter": "ref"}, ("remove policy.adapter = ref",)),
        ({"policy.max_trainable": 100}, ("more than policy.max_trainable = 100", "raise it")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_an_adapter_are_refused(full, command, given, said) -> None:
    refused(command, full.settings() | given, *said)


def test_an_adapter_in_the_folder_is_the_policy(full, checkpoint, tmp_path) -> None:
    """A whole model beside an adapter, as some trainers leave it, is not the policy."""
    shutil.copytree(full.base, tmp_path / "both")
    for path in checkpoint.adapter.glob("adapter_*"):
        shutil.copy(path, tmp_path / "both")
    policy = load(tmp_path / "both")
    assert len(policy.params) == 12
    assert policy.base == str(checkpoint.base)


def test_weights_that_are_missing(full, tmp_path) -> None:
    shutil.copytree(full.base, tmp_path / "gone")
    (tmp_path / "gone" / "model.safetensors").write_bytes(b"123")
    with pytest.raises(InputError, match=r"cannot be loaded from .*gone .*copy the checkpoint again"):
        load(tmp_path / "gone")
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"gone has neither adapter_config.json nor a whole model"):
        load(tmp_path / "gone")


@pytest.mark.parametrize("tied", [True, False])
def test_the_direction_is_the_step_that_adamw_takes(tmp_path, checkpoint, tied) -> None:
    """Also where the padding token, whose input row torch gives no gradient, occurs as text."""
    folder = make_full(tmp_path / "m", checkpoint.prompts, checkpoint.rewards, tied=tied).base
    policy = load(folder, dtype="float64")
    state, _ = read_adam_state(
        folder / "optimizer.pt", policy.model, policy.params, accept_positional=True
    )
    prompts, responses = [[5, 0, 6]] * 2 + [[0, 3]] * 2, [[7, 0, 1], [3, 1], [4, 0, 0], [2, 6, 1]]
    U = collate(prompts, responses, [0, 0, 1, 1])
    coef_NR = random_like({"c": response_mask(U).double()}, seed=3)["c"] * response_mask(U)
    forward = as_trained(bind(policy.model).forward, policy.padding)
    Y = weighted_grad(policy.params, U, coef_NR, torch.zeros_like(coef_NR), forward, 64)
    v = update_direction(policy.params, Y, state, max_grad_norm=0.5)
    assert v.clip_coefficient < 1

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert model.get_input_embeddings().padding_idx == 0
    named = list(model.named_parameters())
    halves = [[p for n, p in named if ("norm" in n) == norm] for norm in (False, True)]
    optimizer = torch.optim.AdamW([{"params": half} for half in halves])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    before = {n: p.detach().clone() for n, p in named}
    logp_NLV = model(input_ids=U.tokens_NL).logits.log_softmax(-1)
    J = sum(
        coef_NR[i, t] * logp_NLV[i, start + t - 1, U.tokens_NL[i, start + t]]
        for i, (start, length) in enumerate(zip(U.prompt_length_N, U.response_length_N, strict=True))
        for t in range(int(length))
    )
    (-J).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    worst = {n: float(((p.detach() - before[n]) / 1e-3 - v.total[n]).abs().max()) for n, p in named}
    # The reference's norms compute in float32 inside (6e-8), over a dozen of them; v is of order 1.
    assert max(worst.values()) < 2e-5, worst
    # A padding row as any other would be seen.
    Y = weighted_grad(policy.params, U, coef_NR, 0 * coef_NR, bind(policy.model).forward, 64)
    other = update_direction(policy.params, Y, state, max_grad_norm=0.5).total
    name = "model.embed_tokens.weight"
    assert float((other[name] - v.total[name])[0].abs().max()) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_the_error_over_u_is_of_the_trainers_gradient(tmp_path, checkpoint, tied) -> None:
    """<P X, Y_n> against the gradient of each sequence alone, the padding token among the text."""
    folder = make_full(tmp_path / "m", checkpoint.prompts, checkpoint.rewards, tied=tied).base
    policy = load(folder, dtype="float64")
    state, _ = read_adam_state(folder, policy.model, policy.params, accept_positional=True)
    prompts, responses = [[5, 0, 6]] * 2 + [[0, 3]] * 2, [[7, 0, 1], [3, 1], [4, 0, 0], [2, 6, 1]]
    batch = collate(prompts, responses, [0, 0, 1, 1])
    U = update_batch(batch, torch.tensor([1.0, -1.0, 0.5, -0.5]).double(), "token_mean")
    forward = bind(policy.model).forward
    trained = as_trained(forward, policy.padding)
    Y = update_gradients(policy.params, U, trained)
    passes = first_order_passes(policy.params, batch, U, state, forward, Y=Y, update_forward=trained)
    found = summarise(policy.params, passes, batch, U, state)
    assert float(found.t_N.sum()) == pytest.approx(found.from_update, rel=1e-9)
    PX = multiply(found.direction.scale, found.X)
    for n, own in enumerate(torch.eye(4).double()):
        coef_NR = U.coef_NR * own[:, None]
        Y_n = weighted_grad(policy.params, batch, coef_NR, 0 * coef_NR, trained, 64)
        assert float(found.t_N[n]) == pytest.approx(dot(PX, Y_n), rel=1e-9)


@pytest.mark.parametrize("peft_layer", ["lora", "tokens", "whole"])
def test_no_mode_differentiates_the_padding_row_as_trained(tmp_path, peft_layer) -> None:
    """Also where peft looks the rows up itself, in an adapter of the embedding."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    given = {
        "lora": {"target_modules": ["embed_tokens", "q_proj"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [0, 5]},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }[peft_layer]
    config = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **given)
    model = get_peft_model(model, config).double().eval()
    padding = drop_padding_rows(model)
    probe = bind(model)
    batch = collate([[5, 0, 6]], [[7, 0, 1]], [0])
    p_NR, towards = response_mask(batch).double(), random_like(probe.params, seed=2)
    trained = as_trained(probe.forward, padding)
    gradient = weighted_grad(probe.params, batch, p_NR, 0 * p_NR, trained, 64)
    slope = tangents(probe.params, batch, towards, trained)[1].logp_NR.sum()
    assert float(slope) == pytest.approx(dot(gradient, towards), rel=1e-9)
    plain = tangents(probe.params, batch, towards, probe.forward)[1].logp_NR.sum()
    assert abs(float(plain - slope)) > 1e-4


def test_a_trainers_checkpoint(tmp_path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    live = trainer_run(model, tmp_path)
    folder = tmp_path / "checkpoint-2"
    character_tokenizer().save_pretrained(folder)
    policy = load(folder)
    state, report = read_adam_state(folder, policy.model, policy.params, accept_positional=True)
    assert_attached(state, model, live)
    assert report.format == "Hugging Face Trainer"


def test_the_gradient_of_the_entropy_has_the_padding_row(tmp_path, checkpoint) -> None:
    """By finite differences, and by the forward route: the parts of v's effect are inner products."""
    folder = make_full(tmp_path / "m", checkpoint.prompts, checkpoint.rewards).base
    policy = load(folder, dtype="float64")
    E = collate([[5, 0, 6], [0, 3]], [[7, 0, 1], [4, 0, 0]], [0, 1])
    probe = bind(policy.model)
    q_NR = response_mask(E).double()
    X = weighted_grad(policy.params, E, torch.zeros_like(q_NR), q_NR, probe.forward, 64)
    name = "model.embed_tokens.weight"
    towards = {n: torch.zeros_like(t) for n, t in policy.params.items()}
    towards[name][0] = torch.randn(16, generator=torch.Generator().manual_seed(1)).double()

    def entropy(eta: float) -> float:
        moved = {n: t + eta * towards[n] for n, t in policy.params.items()}
        return float((token_stats(moved, E, probe.forward, 64).entropy_NR * q_NR).sum())

    slope = (entropy(1e-7) - entropy(-1e-7)) / 2e-7
    assert abs(slope) > 1e-2
    assert float((X[name] * towards[name]).sum()) == pytest.approx(slope, rel=1e-5)
