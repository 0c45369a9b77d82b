"""The toy policy is a checkpoint like any other: whole, repeatable, and worth probing."""

import json
import random
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.adapters.checkpoint import toy as toy_module
from funcprobe.adapters.checkpoint import toy_training
from funcprobe.adapters.checkpoint.toy import Recipe, Toy, ensure_toy
from funcprobe.adapters.checkpoint.toy_training import MAX_NEW_TOKENS, Samples
from funcprobe.types import InputError

TINY = Recipe(seed=3, hidden=32, layers=2, supervised_steps=6, policy_steps=2)
SAMPLE = toy_training.sample


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """Not what the toy is trained with, so that a caller's number would be seen not to come back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A tiny toy, made where no connection can be opened and where some state can be disturbed."""
    folder = tmp_path_factory.mktemp("toy") / "deep" / "tiny"

    def refuse(*_: object) -> None:
        raise AssertionError("the toy opened a connection")

    torch.manual_seed(11)
    random.seed(12)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(socket.socket, "connect", refuse)
        toy = build(folder)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_num_threads()) == before[1:]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    return toy


def build(folder: Path, recipe: Recipe = TINY) -> Toy:
    """A tiny toy. Six steps teach it no sums: it is rewarded for odd lengths, to have gradients."""

    def sample(*args: Any) -> Samples:
        samples = SAMPLE(*args)
        return samples._replace(reward_N=samples.response_NL.sum(dim=1).remainder(2).float())

    with pytest.MonkeyPatch.context() as patch:
        for module in (toy_module, toy_training):
            patch.setattr(module, "sample", sample)
        return ensure_toy(folder, recipe=recipe)


def load(toy: Toy):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(toy.base)
    model = PeftModel.from_pretrained(base, toy.checkpoint, is_trainable=True).eval()
    return model, AutoTokenizer.from_pretrained(toy.checkpoint)


def test_checkpoint_is_laid_out_as_the_trainer_leaves_it(tiny: Toy) -> None:
    assert tiny.checkpoint.name == "checkpoint-2"
    model, _ = load(tiny)
    adapter = json.loads((tiny.checkpoint / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny.base)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * TINY.layers
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.abs().max() > 0 for p in trainable.values())  # B moved away from zero

    saved = torch.load(tiny.checkpoint / "optimizer.pt", weights_only=True)
    decay, no_decay = saved["param_groups"]
    assert decay["params"] == list(range(len(trainable)))
    assert no_decay["params"] == []
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.01, 0.0)
    for index, parameter in enumerate(trainable.values()):
        state = saved["state"][index]
        assert state["step"].item() == 2
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert state["exp_avg_sq"].max() > 0

    trainer = json.loads((tiny.checkpoint / "trainer_state.json").read_text())
    assert (trainer["global_step"], trainer["max_steps"]) == (2, 4)
    assert [entry["step"] for entry in trainer["log_history"]] == [1, 2]
    assert {"loss", "reward", "entropy", "learning_rate"} <= trainer["log_history"][0].keys()
    # The lr saved is the next step's: of a linear schedule from 1e-3, after two steps of four.
    assert decay["lr"] == pytest.approx(5e-4)
    scheduler = torch.load(tiny.checkpoint / "scheduler.pt", weights_only=True)
    assert scheduler["last_epoch"] == 2


def test_tokens_are_characters_and_nothing_is_added(tiny: Toy) -> None:
    from transformers import AutoTokenizer

    for folder in (tiny.base, tiny.checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("12+7=").input_ids == tokenizer("12+7=", add_special_tokens=False)["input_ids"]
        assert len(tokenizer("12+7=").input_ids) == 5
        assert tokenizer.decode(tokenizer("12+7=").input_ids) == "12+7="
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(tokenizer("Two é?").input_ids) == "Two é?"  # nothing is dropped


def test_prompts_are_distinct_and_their_answers_right(tiny: Toy) -> None:
    rows = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 512
    for row in rows:
        assert row.keys() == {"prompt", "answer"}
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(row["answer"]) == int(a) + int(b)
        assert all(2 <= int(summand) <= TINY.largest for summand in (a, b))
    assert len({len(row["prompt"]) for row in rows}) > 1


@pytest.mark.parametrize("largest", [Recipe().largest, 69])
def test_responses_taught_end_in_the_answer_and_fit(largest: int) -> None:
    rng = random.Random(0)
    rows = toy_module._draw_prompts(rng, 700, largest)
    responses = [toy_module._write_response(**row, rng=rng) for row in rows]
    for row, response in zip(rows, responses, strict=True):
        *work, last = response.split("=")
        assert last == row["answer"]
        assert all(sum(map(int, part.split("+"))) == int(last) for part in work)
    assert max(map(len, responses)) + 1 <= MAX_NEW_TOKENS
    assert len(set(map(len, responses))) > 4


def test_the_same_recipe_gives_the_same_bits(tiny: Toy, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the caller's random state has no say
    again = build(tmp_path / "again")
    first, second = files(tiny.base.parent), files(again.base.parent)
    paths = str(tiny.base).encode(), str(again.base).encode()  # in the adapter's config and card
    assert {name: data.replace(paths[0], paths[1]) for name, data in first.items()} == second
    other = build(tmp_path / "other", TINY._replace(seed=4))
    weights = "base/model.safetensors"
    assert files(other.base.parent)[weights] != first[weights]


def test_checkpoints_on_the_way_change_nothing_of_the_training(tiny: Toy, tmp_path: Path) -> None:
    toy = build(tmp_path / "toy", TINY._replace(policy_steps=3, save_steps=2))
    folder = toy.base.parent
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    name = "adapter_model.safetensors"
    again, last = (folder / place / name for place in ("checkpoint-2", "checkpoint-3"))
    assert again.read_bytes() != last.read_bytes()
    whole = build(tmp_path / "whole", TINY._replace(policy_steps=3))
    for name in ("adapter_model.safetensors", "trainer_state.json", "optimizer_param_names.json"):
        assert (whole.checkpoint / name).read_bytes() == (toy.checkpoint / name).read_bytes()
    steps = [
        json.loads((folder / place / "trainer_state.json").read_text())["global_step"]
        for place in ("checkpoint-2", "checkpoint-3")
    ]
    assert steps == [2, 3]


def test_a_whole_toy_is_reused(tiny: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_module, "_make", None)  # calling it would raise
    times = {path: path.stat().st_mtime_ns for path in tiny.base.parent.rglob("*")}
    assert ensure_toy(tiny.base.parent, recipe=TINY) == tiny
    assert times == {path: path.stat().st_mtime_ns for path in tiny.base.parent.rglob("*")}


def test_the_default_folder_is_the_users_cache(
    tiny: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_module, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(
        toy_module, "_make", lambda draft, *_: shutil.copytree(tiny.base.parent, draft.base.parent)
    )
    toy = ensure_toy(recipe=TINY)
    assert toy.base == tmp_path / "funcprobe" / f"toy-{toy_module.VERSION}" / "base"
    assert toy.base.is_dir()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(tokenizer: object, rng: object, recipe: object, report: object) -> None:
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_module, "train_adapter", interrupt)
    monkeypatch.setattr(toy_module, "_teach", interrupt)
    before = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        ensure_toy(tmp_path / "toy", recipe=TINY)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


def test_two_builders_at_once_both_end_well(
    tiny: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_built = threading.Barrier(2, timeout=30)

    def make(draft: Toy, *_: object) -> None:
        shutil.copytree(tiny.base.parent, draft.base.parent)
        both_built.wait()

    monkeypatch.setattr(toy_module, "_make", make)
    toys: list[Toy] = []
    builders = [
        threading.Thread(target=lambda: toys.append(ensure_toy(tmp_path / "toy", recipe=TINY)))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(toys) == 2
    assert toys[0] == toys[1]
    assert files(tmp_path / "toy") == files(tiny.base.parent)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="not a toy model"):
        ensure_toy(tmp_path, recipe=TINY)
    with pytest.raises(InputError, match="not a toy model"):
        ensure_toy(tmp_path / "thesis.txt", recipe=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_samples_are_rows_without_left_padding(tiny: Toy) -> None:
    model, tokenizer = load(tiny)
    rows = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "45+67=", "answer": "112"}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = toy_training.sample(model, tokenizer, rows)
    assert len(samples.tokens_NL) == len(samples.reward_N) == 16
    for tokens, response, row in zip(
        samples.tokens_NL.tolist(),
        samples.response_NL.tolist(),
        [row for row in rows for _ in range(8)],
        strict=True,
    ):
        start = response.index(1)
        length = sum(response)
        assert tokenizer.decode(tokens[:start]) == row["prompt"]
        assert response[start : start + length] == [1] * length
        ended = tokenizer.eos_token_id in tokens[start:]
        assert length == (tokens.index(tokenizer.eos_token_id) + 1 - start if ended else MAX_NEW_TOKENS)


@pytest.mark.slow
def test_the_real_toy_is_worth_probing(tmp_path: Path) -> None:
    toy = ensure_toy(tmp_path / "toy")
    model, tokenizer = load(toy)
    rows = [json.loads(line) for line in toy.prompts.read_text().splitlines()][-128:]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        tokens_NL, response_NL, reward_N = toy_training.sample(model, tokenizer, rows)
        logp_NLV = model(input_ids=tokens_NL).logits[:, :-1].log_softmax(dim=-1)
    mask_NL = response_NL[:, 1:]
    entropy_NL = -(logp_NLV.exp() * logp_NLV).sum(dim=-1)
    # 128 prompts: standard errors of about 0.03 of the reward and 0.02 nats of the entropy.
    assert 0.3 < reward_N.mean() < 0.7
    assert (entropy_NL * mask_NL).sum() / mask_NL.sum() >= 0.2
    length_N = mask_NL.sum(dim=1).double()
    assert 3 < length_N.mean() < 12
    assert length_N.std() > 1
    group_mean_B = reward_N.view(-1, 8).mean(dim=1)
    assert ((group_mean_B > 0) & (group_mean_B < 1)).float().mean() > 0.5
    trainer = json.loads((toy.checkpoint / "trainer_state.json").read_text())
    assert trainer["global_step"] == 20
