"""The command line: every input that cannot be used ends in one line, exit status 2 and no folder."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import PIECES, Checkpoint, Outcome, edit_json, make_checkpoint, sets
from safetensors.torch import load_file, save_file

from funcprobe.adapters import run as run_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.sampling import generate as sampling_module

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> dict[str, Checkpoint]:
    """Checkpoints that do not belong to `checkpoint`."""
    folder = tmp_path_factory.mktemp("other")
    return {
        "wider": make_checkpoint(folder / "wider", hidden=32),
        "deeper": make_checkpoint(folder / "deeper", layers=3),
        "shallower": make_checkpoint(folder / "shallower", layers=1),
        "fewer tokens": make_checkpoint(folder / "vocabulary", pieces=PIECES[:10]),
    }


def left_in(runs: Path) -> list[str]:
    """Everything below the runs folder but whole stages."""
    found = [path.relative_to(runs).as_posix() for path in runs.rglob("*")]
    return [p for p in found if not p.startswith(".stages") or p.startswith(".stages/.")]


def refused(command: Command, given: dict[str, Any], *said: str, verb: str = "run") -> Outcome:
    """Runs it and asserts what every refusal has in common."""
    Path("c.toml").touch()
    outcome = command(verb, "c.toml", *sets(given | {"run.folder": "runs"}))
    assert outcome.status == 2
    assert outcome.out == ""
    *narrated, last = outcome.err.splitlines()
    assert last.startswith("funcprobe: ")
    assert not [line for line in narrated if line.startswith(("funcprobe:", "Traceback", " "))]
    for words in said:
        assert words in last
    assert left_in(Path("runs")) == []
    return outcome


# A. Inputs that cannot be used


def resized(**sizes: int) -> Callable[[Checkpoint], None]:
    return lambda c: edit_json(c.base / "config.json", **sizes)


def adapter_config(**changes: Any) -> Callable[[Checkpoint], None]:
    return lambda c: edit_json(c.adapter / "adapter_config.json", **changes)


def write(part: str, name: str, content: bytes | str) -> Callable[[Checkpoint], None]:
    def damage(c: Checkpoint) -> None:
        data = content.encode() if isinstance(content, str) else content
        (getattr(c, part) / name).write_bytes(data)

    return damage


def cut(part: str, name: str, keep: int) -> Callable[[Checkpoint], None]:
    def damage(c: Checkpoint) -> None:
        path = getattr(c, part) / name
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def remove(part: str, *names: str) -> Callable[[Checkpoint], None]:
    return lambda c: [(getattr(c, part) / name).unlink() for name in names] and None


def tensors(part: str, name: str, change: Callable[[dict[str, torch.Tensor]], Any]):
    def damage(c: Checkpoint) -> None:
        path = getattr(c, part) / name
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return damage


def optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Checkpoint], None]:
    def damage(c: Checkpoint) -> None:
        state = torch.load(c.adapter / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, c.adapter / "optimizer.pt")

    return damage


def both(*damages: Callable[[Checkpoint], None]) -> Callable[[Checkpoint], None]:
    return lambda c: [damage(c) for damage in damages] and None


ADAPTER, BASE = "adapter_model.safetensors", "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

DAMAGES: dict[str, tuple[Callable[[Checkpoint], None], tuple[str, ...]]] = {
    "no adapter_config.json": (remove("adapter", "adapter_config.json"), ("adapter_config.json",)),
    "adapter_config.json of another form": (
        write("adapter", "adapter_config.json", "[]"),
        ("the adapter's configuration cannot be loaded",),
    ),
    "adapter_config.json damaged": (write("adapter", "adapter_config.json", "{"), ("JSONDecodeError",)),
    "rank that is no number": (adapter_config(r="two"), ("does not match base",)),
    "target modules that are no list": (adapter_config(target_modules=5), ("does not match base",)),
    "target modules that the base lacks": (adapter_config(target_modules=["zzz"]), ("zzz",)),
    "another rank": (adapter_config(r=3), ("has shape (2, 16), the base expects (3, 16)",)),
    "no LoRA": (
        write(
            "adapter", "adapter_config.json", '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}'
        ),
        ("no LoRA parameters", "peft_type = PROMPT_TUNING", "give a checkpoint with a LoRA adapter"),
    ),
    "no base named": (adapter_config(base_model_name_or_path=None), ("set policy.base",)),
    "base of a number": (adapter_config(base_model_name_or_path=7), ("from 7", "set policy.base")),
    "base folder gone": (
        adapter_config(base_model_name_or_path="/nowhere/base"),
        ("base model /nowhere/base: no such folder", "set policy.base"),
    ),
    "base not in reach": (adapter_config(base_model_name_or_path="some/base"), ("from some/base",)),
    "no adapter weights": (remove("adapter", ADAPTER), (f"has neither {ADAPTER} nor",)),
    "adapter weights cut short": (cut("adapter", ADAPTER, 300), ("weights cannot be loaded",)),
    "adapter weights empty": (cut("adapter", ADAPTER, 0), ("weights cannot be loaded",)),
    "adapter lacks a tensor": (
        tensors("adapter", ADAPTER, lambda t: t.pop(A0)),
        ("1 tensors do not match", A0, "the file lacks it"),
    ),
    "adapter with one too many": (
        tensors("adapter", ADAPTER, lambda t: t.update({"base_model.model.extra": torch.ones(1)})),
        ("base_model.model.extra", "no such parameter"),
    ),
    "adapter not finite": (
        tensors("adapter", ADAPTER, lambda t: t[A0].view(-1)[3:4].fill_(float("nan"))),
        (A0, "non-finite"),
    ),
    "base without weights": (remove("base", BASE), ("no file named model.safetensors",)),
    "base weights cut short": (cut("base", BASE, 9000), ("the base model cannot be loaded",)),
    "base lacks a tensor": (
        tensors("base", BASE, lambda t: t.pop("model.norm.weight")),
        ("its files lack 1", "model.norm.weight"),
    ),
    "base not finite": (
        tensors("base", BASE, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        ("not finite", "float64"),
    ),
    "base not finite in one row": (  # not seen before it is sampled
        tensors("base", BASE, lambda t: t["model.embed_tokens.weight"][13].fill_(float("nan"))),
        ("probabilities are not finite",),
    ),
    "base of another size than its configuration": (
        resized(hidden_size=32),
        ("has shape", "from its config.json", "configuration and weights match"),
    ),
    "base configuration of another form": (resized(num_key_value_heads=0), ("cannot be loaded",)),
    "base configuration that contradicts itself": (resized(num_hidden_layers=4), ("layer_types",)),
    "base without configuration": (remove("base", "config.json"), ("set policy.base",)),
    "base of an unknown kind": (write("base", "config.json", '{"model_type": "zork"}'), ("zork",)),
    "base with code of its own": (
        write("base", "config.json", '{"model_type": "m", "auto_map": {"AutoConfig": "c.C"}}'),
        ("contains custom code",),
    ),
    "base quantised": (
        lambda c: edit_json(c.base / "config.json", quantization_config={"quant_method": "gptq"}),
        ("is quantised", "the unquantised model"),
    ),
    "no tokenizer": (
        both(remove("base", *TOKENIZER), remove("adapter", *TOKENIZER)),
        ("special tokens only", "tokenizer files"),
    ),
    "tokenizer damaged": (write("adapter", "tokenizer.json", "{"), ("tokenizer cannot be loaded",)),
    "tokenizer of another form": (
        write("adapter", "tokenizer.json", '{"added_tokens": []}'),
        ("tokenizer cannot be loaded",),
    ),
    "no end of sequence": (
        both(
            lambda c: edit_json(c.adapter / "tokenizer_config.json", eos_token=None),
            lambda c: edit_json(c.base / "config.json", eos_token_id=None),
            lambda c: edit_json(c.base / "generation_config.json", eos_token_id=None),
        ),
        ("end-of-sequence",),
    ),
    "no optimizer state": (remove("adapter", "optimizer.pt"), ("save_only_model", 'rule = "sgd"')),
    "optimizer state cut short": (cut("adapter", "optimizer.pt", 3000), ("optimizer.pt",)),
    "optimizer state empty": (cut("adapter", "optimizer.pt", 0), ("truncated",)),
    "optimizer state in another order": (
        optimizer(lambda s: s["param_groups"][0]["params"].reverse()),
        ("optimizer.pt", "another order"),
    ),
    "optimizer state with other counts": (
        optimizer(lambda s: s["param_groups"][0]["params"].append(99)),
        ("contains 13 tensors in groups of 13 and 0, the adapter has 12",),
    ),
    "no prompts": (lambda c: c.prompts.write_text(""), ("has no rows",)),
    "prompts of another encoding": (
        lambda c: c.prompts.write_bytes(b'{"prompt": "\xff"}\n'),
        ("expected UTF-8",),
    ),
    "prompts damaged": (lambda c: c.prompts.write_text("{"), ("line 1",)),
    "reward module with a syntax error": (
        lambda c: c.rewards.write_text("def length(:"),
        ("SyntaxError",),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(command, damaged, name) -> None:
    damage, said = DAMAGES[name]
    damage(damaged)
    refused(command, damaged.settings(), *said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy.checkpoint": "/nowhere/x"}, ("/nowhere/x: no such folder", "set policy.checkpoint")),
        ({"policy.checkpoint": "some/adapter"}, ("some/adapter", "hub id that this machine can reach")),
        ({"policy.adapter": "ref"}, ("ref: no such folder",)),
        (
            {"policy.max_trainable": 383},
            ("384 parameters in 12 tensors", "policy.max_trainable = 383", "raise it"),
        ),
        ({"optimizer.state": "/nowhere/o.pt"}, ("/nowhere/o.pt: cannot be read",)),
        ({"optimizer.state": "."}, ("no optimizer state",)),
        ({"sampling.B_U": 7}, ("has 6 prompts, sampling.B_U = 7", "lower B_U or give more")),
        ({"prompts.prompt_column": "promt"}, ("'promt'", "did you mean 'prompt'?")),
        ({"prompts.source": "/nowhere/p.jsonl"}, ("file not found: /nowhere/p.jsonl",)),
        ({"prompts.source": "some/data"}, ("some/data", "cannot be loaded")),
        ({"prompts.source": "toy"}, ('but prompts.source is "toy"', "set prompts.source")),
        ({"prompts.max_prompt_tokens": 4}, ("prompt 2 has 5 tokens", "max_prompt_tokens")),
        ({"prompts.chat": True}, ("chat template",)),
        ({"reward.function": "zork"}, ("unknown reward 'zork'",)),
        ({"reward.function": "zork.x:f"}, ("No module named 'zork'",)),
        ({"run.device": "cudda"}, ('run.device = "cudda"', '"cuda:N"')),
        ({"run.device": "cuda:99"}, ("CUDA devices", '"cpu"')),
        ({"run.device": "cpu:1"}, ('run.device = "cpu:1"',)),
        ({"sampling.top_p": 0.9}, ("top_p = 0.9", "wrong distribution", "rollouts.eval")),
        ({"measure.etas": [0.0]}, ("eta is 0, a positive",)),
        ({"measure.etas": [1e-5, 1e-5]}, ("occurs twice",)),
        ({"sampling.temprature": 1}, ("did you mean temperature?",)),
        ({"rollouts.eval": "/nowhere/e.parquet"}, ("/nowhere/e.parquet: no such file",)),
        # What shows only in the numbers:
        ({"run.max_tokens": 6}, ("may have 11 tokens, a microbatch 6", "raise run.max_tokens")),
        ({"measure.etas": [1e300]}, ("sweep at eta = 1e+300, measured", "measure.etas")),
        ({"measure.etas": [5e-324], "measure.next_lr": False}, ("eta = 4.94066e-324 is 0",)),
        ({"optimizer.weight_decay": 1e300}, ("optimizer.weight_decay", "less than or equal to 1000")),
        ({"optimizer.lr": 1e300}, ("sweep at eta = 1e+300", "optimizer.lr")),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_setting_that_does_not_fit(command, checkpoint, given, said) -> None:
    refused(command, checkpoint.settings() | given, *said)


@pytest.mark.parametrize("name", ["wider", "deeper", "shallower"])
def test_the_adapter_of_another_base(command, checkpoint, other, name) -> None:
    base = str(other[name].base)
    said = {"wider": "has shape", "deeper": "the file lacks it", "shallower": "no such parameter"}[name]
    refused(
        command,
        checkpoint.settings() | {"policy.base": base},
        said,
        f"base {base} is not the model this adapter was trained on: set policy.base",
    )


def test_a_vocabulary_that_does_not_match(command, checkpoint, other) -> None:
    given = checkpoint.settings() | {"policy.base": str(other["fewer tokens"].base)}
    refused(command, given, "token '=' has id 13, but the model has 10 rows", "use the tokenizer")


@pytest.mark.parametrize(("name", "said"), [("wider", "has shape"), ("deeper", "contains 18 tensors")])
def test_the_optimizer_state_of_another_adapter(command, checkpoint, other, name, said) -> None:
    path = str(other[name].adapter / "optimizer.pt")
    refused(command, checkpoint.settings() | {"optimizer.state": path}, path, said, "another adapter")


class Bomb:
    """A pickle of this creates a file when it is loaded by a careless reader."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


def test_code_in_the_optimizer_file_is_not_run(command, damaged) -> None:
    path = damaged.adapter / "optimizer.pt"
    for content in (Bomb(), {"state": Bomb(), "param_groups": []}):
        torch.save(content, path)
        refused(command, damaged.settings(), "only tensors and numbers are read")
        path.write_bytes(pickle.dumps(content))
        refused(command, damaged.settings(), "optimizer.pt")
        assert not Path("was_run").exists()
    pickle.loads(path.read_bytes())
    assert Path("was_run").exists()  # the bomb was live


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nan", "returned nan for response 0, expected a finite number"),
        ("raises", "raised ZeroDivisionError: no such luck"),
        ("short", "returned 1 values, expected a list of 12 numbers"),
        ("equal", "every advantage is 0 and v has no gradient part"),
        ("absent", "its functions are: equal, length, nan, raises, short"),
    ],
)
def test_a_reward_that_cannot_be_used(command, checkpoint, function, said) -> None:
    given = checkpoint.settings() | {"reward.function": f"{checkpoint.rewards}:{function}"}
    refused(command, given, said)


def test_one_prompt_is_no_sample_of_prompts(command, damaged) -> None:
    damaged.prompts.write_text('{"prompt": "1+1="}\n')
    given = damaged.settings()
    first = refused(command, given | {"sampling.B_U": 2}, "has 1 prompts")
    assert "lower B_U" in first.err


@pytest.mark.parametrize(
    ("folder", "name", "said"),
    [
        ("a_file", "probe", "a_file: Not a directory"),
        ("a_file/below", "probe", "a_file: Not a directory"),
        ("/proc/funcprobe", "probe", "/proc: "),
        (".", "occupied", "exists and is not a run folder"),
    ],
)
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_run_folder_that_cannot_be_written(
    command, checkpoint, folder, name, said, arguments
) -> None:
    Path("a_file").touch()
    Path("occupied").mkdir()
    Path("c.toml").touch()
    before = sorted(Path.cwd().rglob("*"))
    given = checkpoint.settings() | {"run.folder": folder, "run.name": name}
    outcome = command("run", "c.toml", *sets(given), *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()  # said before anything is loaded
    assert said in line
    assert sorted(Path.cwd().rglob("*")) == before


# Usage


@pytest.mark.parametrize("arguments", [(), ("run", "--zork", "c.toml"), ("zork",), ("run",)])
def test_usage_errors(command, arguments) -> None:
    outcome = command(*arguments)
    assert outcome.status == 2
    assert "Usage" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ((), ("run", "check", "init", "without taking the step")),
        (("run",), ("--set", "KEY=VALUE", "--dry-run", "--fresh", "sampling.B_E=64", "CFG.TOML")),
        (("check",), ("sanity checks", "write nothing", "Exit status 1", "--set")),
        (("init",), ("every key", "default")),
    ],
)
def test_help_names_what_there_is(command, verb, words) -> None:
    outcome = command(*verb, "--help")
    assert outcome.status == 0
    text = " ".join(outcome.out.replace("│", " ").split())
    for word in words:
        assert word in text


def test_help_waits_for_no_heavy_library(tmp_path) -> None:
    heavy = "{'transformers', 'peft', 'datasets', 'scipy', 'pyarrow'}"
    script = f"""
        import atexit, sys
        from funcprobe.adapters.cli import main
        atexit.register(lambda: print({heavy} & sys.modules.keys()))
        main()
    """
    done = process(script, "run", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("set()\n")


def test_init_writes_the_defaults_and_overwrites_nothing(command) -> None:
    outcome = command("init", "new.toml")
    assert outcome.status == 0
    assert "wrote new.toml" in outcome.out
    assert read_config(Path("new.toml")) == Config()
    Path("new.toml").write_text("mine")
    outcome = command("init", "new.toml")
    assert outcome == Outcome(2, "", "funcprobe: new.toml exists: give another name, or delete it\n")
    assert Path("new.toml").read_text() == "mine"
    outcome = command("init", "no/such/folder/c.toml")
    assert outcome.status == 2
    assert "no/such/folder/c.toml: No such file or directory" in outcome.err


# Dry run and check


def test_a_dry_run_plans_and_writes_nothing(command, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(sampling_module, "_generate", lambda *_: pytest.fail("something was sampled"))
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["c.toml"]
    for words in (
        "12 prompts of 6",
        "4 prompts, 3 responses each",
        "longest prompt: 5 tokens",
        "0.001",
    ):
        assert words in outcome.out
    assert "runs/probe; nothing was sampled or written" in outcome.out


def test_a_dry_run_refuses_what_a_run_would(command, checkpoint, other) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {"policy.base": str(other["wider"].base)}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert (outcome.status, outcome.out) == (2, "")
    assert "has shape" in outcome.err


def test_a_dry_run_refuses_a_state_that_makes_no_step(command, damaged) -> None:
    """Before anything is sampled: coverage alone would let these through."""
    Path("c.toml").touch()
    file = damaged.adapter / "optimizer.pt"
    whole = torch.load(file, weights_only=True)

    def refused(**overrides: Any) -> str:
        outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings() | overrides))
        assert (outcome.status, outcome.out) == (2, "")
        return outcome.err.splitlines()[-1]

    entry = whole["state"].pop(0)
    torch.save(whole, file)
    assert "exp_avg of every parameter, 1 of 12 have none" in refused()
    entry["exp_avg_sq"][0] = -1
    whole["state"][0] = entry
    torch.save(whole, file)
    assert "contains a negative or non-finite number" in refused()


def test_a_dry_run_refuses_a_missing_answer_column(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = {"reward.function": "numeric", "reward.answer_column": "answr"}
    outcome = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings() | given))
    assert outcome.status == 2
    assert "no column 'answr'" in outcome.err
    assert "did you mean 'answer'?" in outcome.err


@pytest.mark.parametrize(("written", "warned"), [(2, False), (7, True)])
def test_a_state_of_another_checkpoint_is_pointed_out(command, damaged, written, warned) -> None:
    Path("c.toml").touch()
    (damaged.adapter / "trainer_state.json").write_text(json.dumps({"global_step": written}))
    outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings()))
    assert outcome.status == 0
    assert ("the optimizer state has taken 2 steps but" in outcome.err) == warned
    (damaged.adapter / "trainer_state.json").write_text("[]")
    outcome = command("run", "c.toml", "--dry-run", *sets(damaged.settings()))
    assert outcome.status == 2
    assert "has no global_step" in outcome.err


def test_a_rule_that_no_trainer_follows_is_not_called_the_next_step(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = {"optimizer.rule": "precondition", "optimizer.max_scale": 5.0}
    outcome = command("run", "c.toml", *sets(checkpoint.settings() | given))
    assert outcome.status == 0
    assert 'Entropy change along v of rule "precondition", nats per token' in outcome.out
    assert "next step" not in outcome.out
    assert "scales of P capped at 5: set optimizer.max_scale = 0" in outcome.out


def test_check_writes_nothing_and_fails_by_its_status(command, checkpoint, monkeypatch) -> None:
    Path("c.toml").touch()
    outcome = command("check", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["c.toml"]
    assert outcome.out.count("pass") == 12  # and "11 of 11 passed"
    assert "sanity checks: 11 of 11 passed" in outcome.out
    assert "FAIL" not in outcome.out
    gradients_reach = run_module.checks.gradients_reach
    monkeypatch.setattr(
        run_module.checks,
        "gradients_reach",
        lambda name, grads: gradients_reach(name, grads)._replace(passed=name != "X"),
    )
    outcome = command("check", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 1
    assert outcome.out.count("FAIL") == 2  # in the table and below it
    assert "FAIL: gradient X is nonzero: " in outcome.out
    assert "this usually means: the loss does not depend on the adapter" in outcome.out
    monkeypatch.setattr(run_module.checks, "gradients_reach", gradients_reach)
    identity_against_adam = run_module.checks.identity_against_adam
    monkeypatch.setattr(
        run_module.checks,
        "identity_against_adam",
        lambda prediction: identity_against_adam(prediction)._replace(passed=False),
    )
    outcome = command("check", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 0
    assert "suspect: Adam against identity: " in outcome.out


def test_version(command) -> None:
    outcome = command("--version")
    assert outcome.status == 0
    assert outcome.out == f"funcprobe {metadata.version('funcprobe')}\n"


def test_a_mistyped_checkpoint_is_not_looked_up_on_the_hub(command, checkpoint) -> None:
    Path("c.toml").touch()
    given = checkpoint.settings() | {"policy.checkpoint": "out/checkpoint-21"}
    outcome = command("run", "c.toml", *sets(given))
    assert outcome.status == 2
    assert outcome.err == (
        "funcprobe: out/checkpoint-21: no such folder; set policy.checkpoint to a checkpoint folder\n"
    )


# The disk fills up


def test_a_disk_that_is_full_at_any_write(command, checkpoint, monkeypatch) -> None:
    """Every write of a whole run in turn: Parquet, safetensors, text, and a rename."""
    Path("c.toml").touch()
    plans: list[Any] = []  # loading writes nothing: once is enough
    load = run_module.load

    def load_once(*args: Any) -> Any:
        if not plans:
            plans.append(load(*args))
        return plans[0]

    monkeypatch.setattr(run_module, "load", load_once)
    monkeypatch.setattr(run_module, "check", lambda *_: [])  # nor do the checks
    fail_at = 0
    for fail_at in range(1, 60):
        count = 0
        with monkeypatch.context() as patch:

            def failing(write: Callable[..., Any], fail_at: int = fail_at) -> Callable[..., Any]:
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == fail_at:
                        raise OSError(28, "No space left on device")
                    return write(*args, **kwargs)

                return wrapped

            patch.setattr(pq, "write_table", failing(pq.write_table))
            patch.setattr("funcprobe.adapters.store.save_file", failing(save_file))
            patch.setattr(Path, "write_text", failing(Path.write_text))
            patch.setattr(Path, "replace", failing(Path.replace))
            given = checkpoint.settings() | {"run.folder": f"runs{fail_at}", "measure.next_lr": False}
            outcome = command("run", "c.toml", *sets(given | {"measure.etas": [1e-4]}))
        if count < fail_at:
            break
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.endswith("funcprobe: No space left on device; no incomplete file was left\n")
        assert left_in(Path(f"runs{fail_at}")) == []
    # Two rollouts, first order, one eta, four for the rounding and two for the second derivative:
    # written and renamed; then seven files and the folder.
    assert fail_at == 10 * 2 + 7 + 1 + 1
    assert outcome.status == 0


def process(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


# Each command in a process of its own, forked where the libraries are imported: that takes seconds.
CHILDREN = """
    import json, os, resource, sys
    from funcprobe.adapters import run
    from funcprobe.adapters.cli import main

    commands, limits = json.loads(sys.argv[1])
    ended = []
    for arguments, limit in zip(commands, limits):
        pipes = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            for number, (_, end) in zip((1, 2), pipes):
                os.dup2(end, number)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.argv[1:] = arguments
            main()
            raise AssertionError("main() ends the process")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # a pipe holds what they say
        for _, end in pipes:
            os.close(end)
        ended.append([status, *(open(start).read() for start, _ in pipes)])
    print(json.dumps(ended))
"""


def children(
    commands: list[list[str]], *, cwd: Path, limits: Sequence[int | None] | None = None
) -> list[Outcome]:
    """How each ended; a limit is of the bytes in any file that is written."""
    given = json.dumps([commands, limits or [None] * len(commands)])
    done = process(CHILDREN, given, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")  # the imports say nothing
    return [Outcome(*one) for one in json.loads(done.stdout)]


def test_in_a_process_of_its_own_one_line_stands_alone(tmp_path, damaged, other) -> None:
    (tmp_path / "c.toml").touch()
    edit_json(damaged.base / "config.json", quantization_config={"quant_method": "gptq"})
    wider = damaged.settings() | {"policy.base": str(other["wider"].base)}
    cases = (
        (wider | {"policy.checkpoint": "/nowhere/x"}, "/nowhere/x: no such folder"),
        (wider, "has shape (2, 16), the base expects (2, 32)"),
        (damaged.settings(), "is quantised"),
    )
    ended = children([["run", "c.toml", *sets(given)] for given, _ in cases], cwd=tmp_path)
    for outcome, (_, said) in zip(ended, cases, strict=True):
        assert (outcome.status, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        assert line.startswith("funcprobe: ")
        assert said in line
    assert not (tmp_path / "runs").exists()


def test_in_a_process_that_may_write_little(tmp_path, checkpoint) -> None:
    """RLIMIT_FSIZE stops real writes in the middle: the Parquet of E, then the first-order file."""
    (tmp_path / "c.toml").touch()
    limits = (1000, 12_000)
    given = [checkpoint.settings() | {"run.folder": f"runs{limit}"} for limit in limits]
    commands = [["run", "c.toml", *sets(one)] for one in given]
    ended = children(commands, cwd=tmp_path, limits=limits)
    for limit, outcome in zip(limits, ended, strict=True):
        assert (outcome.status, outcome.out) == (2, "")
        last = outcome.err.splitlines()[-1]
        assert last.startswith("funcprobe: ")
        assert "File too large" in last
        assert "Traceback" not in outcome.err
        assert left_in(tmp_path / f"runs{limit}") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 12_000


@pytest.fixture
def sigint() -> Iterator[None]:
    """As in the foreground: a shell's background job inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_interrupted(command, checkpoint, monkeypatch) -> None:
    """At the second prompt batch of E, then in the middle of the run folder."""
    Path("c.toml").touch()
    generate = sampling_module._generate
    calls = []

    def interrupting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sampling_module, "_generate", interrupting)
        outcome = command("run", "c.toml", *sets(checkpoint.settings()))
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.splitlines()[-1].startswith("funcprobe: interrupted")
    assert "Traceback" not in outcome.err
    assert not any(path.is_file() for path in Path("runs").rglob("*"))

    with monkeypatch.context() as patch:
        patch.setattr(run_module.results, "manifest", lambda _: signal.raise_signal(signal.SIGINT))
        outcome = command("run", "c.toml", *sets(checkpoint.settings()))
    assert outcome.status == 130
    assert left_in(Path("runs")) == []
    assert list(Path("runs/.stages").glob("*.parquet"))


# What is printed


def test_the_table_and_the_summary(command, checkpoint) -> None:
    Path("c.toml").touch()
    outcome = command("run", "c.toml", *sets(checkpoint.settings() | {"run.name": "one"}))
    assert outcome.status == 0
    document = json.loads(Path("runs/one/results.json").read_text())
    for row in document["sweep"]:
        (line,) = [x for x in outcome.out.splitlines() if f"{row['ratio']['value']:.7f}" in x]
        assert f"{row['predicted']['value']:+.4e}" in line
        assert f"{row['measured']['value']:+.4e}" in line
        for key in ("interval_total", "measured_interval_given_U"):
            assert f" {(row[key]['high'] - row[key]['low']) / 2:.1e} " in line
        assert f"{row['second_order']['value']:+.4e}" in line
        assert row["verdict"] in line
        first, eta = document["first_order"], row["eta"]
        for error in ("se_total", "se_given_U"):
            assert row[error]["value"] == pytest.approx(eta * first[error]["value"], rel=1e-12)
        assert f"{row['se_total']['value']:.1e}" != f"{row['se_given_U']['value']:.1e}"
        assert ("next lr" in line) == row["is_next_lr"]
    assert sum(row["is_next_lr"] for row in document["sweep"]) == 1
    assert "nats per token" in outcome.out
    assert "sanity checks: 11 of 11 passed" in outcome.out
    assert "wrote runs/one in" in outcome.err
    first, second = Path("runs/one/run.log").read_text().splitlines()[:2]
    assert first.startswith("import: ")
    assert second.startswith("load: ")
