"""Every input that cannot be used ends in one line, exit status 2 and no folder."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import Checkpoint, edit_json, sets
from support.commands import refused

pytestmark = pytest.mark.usefixtures("offline")


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
    **{
        f"adapter_config.json with a base that is {what}": (
            adapter_config(base_model_name_or_path=name),
            ("base_model_name_or_path", "printable characters", "policy.base"),
        )
        for what, name in {
            "a list": ["a", "b"],
            "a number": 7,
            "of another type": True,
            "no path": "a\0b",
            "endless": "x" * 10**6,
        }.items()
    },
    "adapter_config.json with a revision that is a number": (
        adapter_config(revision=7),
        ("revision = 7", "printable characters"),
    ),
    "base with a dtype that is another name of torch": (
        lambda c: edit_json(c.base / "config.json", dtype="load"),
        ("the base model", "IndexError", "set policy.base"),
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
    "base of a number": (
        adapter_config(base_model_name_or_path=7),
        ("base_model_name_or_path = 7", "name the base in policy.base"),
    ),
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
        (
            {"measure.etas": [5e-324], "measure.next_lr": False, "optimizer.rule": "sgd"},
            ("eta = 4.94066e-324 is 0",),
        ),
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
