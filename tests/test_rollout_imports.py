"""What trainers log, made into U: TRL's files by a real GRPOTrainer, verl's by their layout.

The same training runs show what TRL hands to reward functions and what it makes of None.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PIECES, Checkpoint, character_tokenizer, sets
from datasets import Dataset
from peft import PeftModel
from test_step import with_sidecar
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.rollouts import Rollouts, load_rollouts, parse_rollouts, save_rollouts
from funcprobe.adapters.rollouts.files import Columns, read_columns
from funcprobe.adapters.rollouts.imports import Guesses, import_columns, layout_of
from funcprobe.adapters.rollouts.provenance import TrainingRun, training_run
from funcprobe.adapters.sampling.advantages import update_advantages
from funcprobe.adapters.sampling.rewards import load_reward
from funcprobe.adapters.sampling.supplied import load_supplied_update, open_update
from funcprobe.adapters.stages.batches import sample
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.store import Stages
from funcprobe.adapters.trainers import ParamNamesCallback
from funcprobe.types import InputError

G, LONGEST, EOS = 3, 12, 1
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)

# Every function keeps the keywords it was called with.
FUNCTIONS = """
CALLS = {"length": [], "first_one": [], "partly": []}

def length(prompts, completions, completion_ids, **columns):
    columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    CALLS["length"].append(columns)
    return [len(ids) / 4 for ids in completion_ids]

def first_one(completions, answer, **columns):
    CALLS["first_one"].append(None)
    columns["log_extra"]("length_in_text", [len(text) for text in completions])
    return [ord(text[:1] or "z") / 8 - 0.125 * len(a) for text, a in zip(completions, answer)]

def partly(completions, **columns):
    CALLS["partly"].append(None)
    of = [None, 1.0, 0.25, None, None, 2.0, None, None, None, 1.0, 0.0, 7.0]
    return of[: len(completions)]
"""


class Trained(NamedTuple):
    """A training step of TRL: the file it wrote, and what its first reward function was given."""

    file: Path
    call: dict[str, Any]
    functions: Path

    def exact(self) -> list[list[int]]:
        return [list(ids) for ids in self.call["completion_ids"]]


def train(
    checkpoint: Checkpoint, folder: Path, names: list[str], *, chat: bool = False, **settings: Any
) -> Trained:
    """One step of GRPOTrainer on 4 prompts with 3 completions each, completions logged.

    Saved as checkpoint-1, with its sidecar.
    """
    functions = folder / "functions.py"
    functions.write_text(FUNCTIONS)
    load_reward(f"{functions}:length")
    module = sys.modules["funcprobe_reward_functions"]
    found, calls = [getattr(module, name) for name in names], module.CALLS["length"]
    tokenizer = character_tokenizer()
    rows = [json.loads(line) for line in checkpoint.prompts.read_text().splitlines()]
    if chat:
        tokenizer.chat_template = TEMPLATE
        for row in rows:
            text = row["prompt"].removesuffix("=")
            row["prompt"] = [{"role": "system", "content": "7"}, {"role": "user", "content": text}]
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4 * G,
        "num_generations": G,
        "max_completion_length": LONGEST,
        "generation_kwargs": {"suppress_tokens": [0]},  # <pad>, which no text shows
        "log_completions": True,
        "logging_steps": 1,
        "report_to": [],
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = GRPOConfig(**(given | settings))
    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(base, checkpoint.adapter, is_trainable=True),
        reward_funcs=found,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[ParamNamesCallback()],
    )
    with torch.random.fork_rng():
        trainer.train()
    file = folder / "completions" / "completions_00001.parquet"
    return Trained(file, calls[0] if calls else {}, functions)


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("one"), ["length"])


@pytest.fixture(scope="module")
def chatted(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("chat"), ["length"], chat=True)


@pytest.fixture(scope="module")
def with_two(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("two"), ["length", "first_one"])


@pytest.fixture(scope="module")
def with_none(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("none"), ["partly"])


def guesses(**changes: Any) -> Guesses:
    given = {"tokenizer": character_tokenizer(), "eos_ids": (EOS,), "temperature": 1.0}
    given |= {"max_new_tokens": LONGEST, "prompts": {}, "run": run_before(1)}
    return Guesses(**(given | changes))


def run_before(step: int | None, loss: dict[str, Any] | None = None) -> TrainingRun:
    """What the checkpoint says, of which that step is the next."""
    return TrainingRun(Path("checkpoint"), None if step is None else step - 1, loss or {}, {})


def imported(file: Path | Columns, *, advantages: bool = False, **changes: Any):
    """U as a run takes it, and the warnings. verl's fixtures are of step 6, TRL's of step 1."""
    columns = read_columns(file) if isinstance(file, Path) else file
    layout = layout_of(columns)
    assert layout is not None
    if layout == "verl":
        changes = {"run": run_before(6)} | changes
    mine, lines = import_columns(columns, layout, guesses(**changes), advantages=advantages)
    needs = {"rewards": not advantages, "advantages": advantages}
    return parse_rollouts(mine, len(PIECES), **needs, eos_ids=(EOS,)), lines


def changed(columns: Columns, **values: list) -> Columns:
    rows = len(next(iter(values.values()), columns.place))
    merged = {k: v[:rows] for k, v in columns.values.items()} | values
    return Columns(columns.path, columns.place[:rows], merged)


def refusal(columns: Columns, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        imported(columns, **options)
    assert str(columns.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# TRL


def test_trl_completions_are_what_was_sampled(trained) -> None:
    """A tokenizer of characters takes no other way through a text, so that even the ids come back."""
    found, lines = imported(trained.file)
    exact = trained.exact()
    ends = [y[-1] == EOS for y in exact]
    assert 0 < sum(ends) < len(ends)  # both kinds are there
    assert found.response_ids == exact
    assert found.prompt_index == [0] * G + [1] * G + [2] * G + [3] * G
    tokenizer = character_tokenizer()
    assert found.prompt_ids == [tokenizer(text)["input_ids"] for text in trained.call["prompts"]]
    assert found.prompt == trained.call["prompts"]
    assert found.reward == [len(y) / 4 for y in exact]
    assert set(found.finish_reason) == {"unknown"}
    assert len(lines) == 1
    for said in (
        f"warning: U is TRL completions ({trained.file}), which is text",
        f"EOS (1) is appended to the {sum(ends)} of 12 responses shorter than",
        "sampling.max_new_tokens = 12",
        "sampling.temperature = 1;",
    ):
        assert said in lines[0]


def test_trl_advantages_are_those_made_of_the_rewards(trained) -> None:
    found, _ = imported(trained.file)
    made_N, lines = update_advantages(found, "mean_std")
    assert lines == []
    assert found.advantage == pytest.approx(made_N.tolist(), abs=1e-6)  # TRL's are float32
    assert any(made_N.tolist())
    taken, _ = imported(trained.file, advantages=True)
    assert update_advantages(taken, "rollouts")[0].tolist() == found.advantage


def test_trl_rewards_of_several_functions_are_summed_with_a_warning(with_two) -> None:
    names = read_columns(with_two.file).values.keys()
    assert [*names] == [
        "step",
        "prompt",
        "completion",
        "length",
        "first_one",
        "length_in_text",
        "advantage",
    ]
    found, lines = imported(with_two.file)
    columns = read_columns(with_two.file).values
    assert found.reward == [a + b for a, b in zip(columns["length"], columns["first_one"], strict=True)]
    assert len(lines) == 2
    assert "the sum of length, first_one, correct if all are rewards" in lines[1]
    assert update_advantages(found, "mean_std")[1] == []  # TRL's weights were 1
    # With weights 1 and 0.2 TRL would have logged the same rewards and other advantages.
    weighted = [a + 0.2 * b for a, b in zip(columns["length"], columns["first_one"], strict=True)]
    other_N, _ = update_advantages(found._replace(reward=weighted, advantage=None), "mean_std")
    other = imported(changed(read_columns(with_two.file), advantage=other_N.tolist()))[0]
    assert "differ by up to" in update_advantages(other, "mean_std")[1][0]
    _, lines = imported(with_two.file, advantages=True)
    assert len(lines) == 1


def test_trl_rows_that_no_function_scored(with_none) -> None:
    columns = read_columns(with_none.file)
    assert columns.values["partly"][:3] == [None, 1.0, 0.25]
    said = refusal(columns)
    assert 'row 0 has no reward (reward columns: partly): set objective.advantage = "rollouts"' in said
    found, _ = imported(with_none.file, advantages=True)
    assert found.advantage == columns.values["advantage"]


def test_none_is_to_us_what_it_is_to_trl(with_none) -> None:
    """Rewards of the same function through load_reward, advantages against those that TRL logged."""
    reward = load_reward(f"{with_none.functions}:partly")
    found, _ = imported(with_none.file, advantages=True)
    rows = [{}] * len(found.response)
    reward_N = reward(found.prompt, found.response, found.response_ids, rows)
    assert reward_N.isnan().sum() == 6
    update = found._replace(reward=reward_N.tolist(), advantage=None)
    made_N, lines = update_advantages(update, "mean_std")
    assert made_N.tolist() == pytest.approx(found.advantage, abs=1e-6)
    assert made_N.tolist()[3:9] == [0.0] * 6  # one scored, and none
    assert "6 of U's 12 responses have no reward (None)" in lines[0]


def test_trl_chats(chatted) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found, _ = imported(chatted.file, tokenizer=tokenizer)
    assert found.response_ids == chatted.exact()
    assert set(found.prompt) <= {f"7{a}+{b}=" for a in range(3, 6) for b in (4, 12)}
    assert found.prompt_ids == [tokenizer(text)["input_ids"] for text in found.prompt]
    assert found.response == [c[0]["content"] for c in chatted.call["completions"]]
    columns = read_columns(chatted.file)
    assert "prompt of messages, but the tokenizer has no chat template" in refusal(columns)
    more = [[*c, {"role": "tool", "content": "5"}] for c in columns.values["completion"]]
    assert "completion of 2 messages" in refusal(changed(columns, completion=more), tokenizer=tokenizer)
    called = [[c[0] | {"tool_calls": ["f"]}] for c in columns.values["completion"]]
    assert "a message with content, role, tool_calls" in refusal(
        changed(columns, completion=called), tokenizer=tokenizer
    )
    parts = [[{"role": "user", "content": [{"text": "3"}]}]] * len(columns.place)
    assert "Unicode text as role and as content is" in refusal(
        changed(columns, prompt=parts), tokenizer=tokenizer
    )


def test_trl_groups(trained) -> None:
    columns = read_columns(trained.file)
    text = columns.values["prompt"]
    # A prompt drawn twice in a row: two groups, as TRL took them; twice apart: two groups.
    twice = changed(columns, prompt=[text[0]] * 6 + [text[6]] * 3 + [text[0]] * 3)
    assert imported(twice)[0].prompt_index == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    cut = changed(columns, prompt=text[:11])
    assert "equal prompts occur in runs of 2 to 3 rows" in refusal(cut)
    mixed = changed(columns, prompt=text[::3] * 3)
    assert "runs of 1 to 1 rows" in refusal(mixed)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"step": [5] * 6 + [6] * 6}, "contains steps 5 and 6, two policies"),
        ({"step": []}, "has no rows"),
        ({"completion": [None] * 12}, "row 0 has None in completion, Unicode text is expected"),
        (
            {"completion": ["4"] * 11 + ["9" * (LONGEST + 1)]},
            "row 11 has a response of 13 tokens, sampl",
        ),
        ({"prompt": ["\ud800"] * 12}, "row 0 has '\\ud800' in prompt, Unicode text is expected"),
        ({"step": [0] * 12}, "is of step 0, but checkpoint has taken 0 steps"),
        ({"prompt": [4] * 12}, "row 0 has 4 in prompt, Unicode text is expected"),
        ({"length": ["a"] * 12}, "row 0 has no reward (reward columns: none):"),
        (
            {"length": [True] * 12},
            "(reward columns: none; excluded, as TRL's rewards are floats: length): set objective",
        ),
        ({"length": [1.0] * 11 + [float("nan")]}, "row 11 has no reward (reward columns: length)"),
        ({"length": [1.0] * 11 + [float("inf")]}, "row 11 has reward inf"),
        ({"completion": ["<eos>4"] * 12}, "row 0 has tokens after its first end-of-sequence token"),
    ],
)
def test_trl_files_that_cannot_be_used(trained, values, said) -> None:
    assert said in refusal(changed(read_columns(trained.file), **values))


@pytest.mark.parametrize(
    ("steps", "loss", "said"),
    [
        (0, {}, None),
        (None, {}, None),
        (0, {"gradient_accumulation_steps": 4, "steps_per_generation": 4}, None),
        (0, {"generation_batch_size": 12, "num_iterations": 1}, None),
        (
            1,
            {},
            "is of step 1, but checkpoint has taken 1 steps, so that its next step uses the "
            "rollouts of step 2: give completions_00002.parquet, or the checkpoint that has taken 0",
        ),
        (
            0,
            {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
            "contains a generation of 4 micro-batches (steps_per_generation), but a step of this run",
        ),
        (None, {"num_iterations": 3}, "this run used num_iterations = 3 times"),
        (0, {"generation_batch_size": 24}, "has 12 rows, but the run generated 24 per step"),
    ],
)
def test_a_log_is_of_the_step_after_the_checkpoint(trained, steps, loss, said) -> None:
    run = run_before(None if steps is None else steps + 1, loss)
    columns = read_columns(trained.file)
    if said is not None:
        assert said in refusal(columns, run=run)
        return
    _, lines = imported(columns, run=run)
    assert "an evaluation at that step would have added its rows" in lines[0]
    assert len(lines) == 1 + (steps is None)
    if steps is None:
        assert lines[1].startswith("warning: U's file is of step 1, but checkpoint does not record")
        assert lines[1].endswith("only if these are 0")


def test_the_checkpoint_says_what_trl_did(checkpoint, trained, tmp_path) -> None:
    """Real sidecars: one generation a step is taken, one for two steps (or for two halves) is not."""
    run = training_run(trained.file.parents[1] / "checkpoint-1", None)
    assert (run.steps, run.sampling["max_completion_length"]) == (1, LONGEST)
    assert "has taken 1 steps" in refusal(read_columns(trained.file), run=run)
    imported(trained.file, run=run._replace(steps=0))
    more = train(
        checkpoint, tmp_path, ["length"], per_device_train_batch_size=2 * G, steps_per_generation=2
    )
    assert len(read_columns(more.file).place) == 12  # of which the step took six
    run = training_run(more.file.parents[1] / "checkpoint-1", None)._replace(steps=0)
    assert "a generation of 2 micro-batches" in refusal(read_columns(more.file), run=run)


def test_what_the_checkpoint_does_not_say(tmp_path) -> None:
    assert training_run(tmp_path / "absent", None) == TrainingRun(tmp_path / "absent", None, {}, {})
    (tmp_path / "trainer_state.json").write_text('{"global_step": "five"}')
    with pytest.raises(InputError, match="has no global_step"):
        training_run(tmp_path, None)


def test_advantages_come_without_a_sum_that_is_no_reward(trained, with_two) -> None:
    own, _ = imported(trained.file, advantages=True)
    assert own.reward == [len(y) / 4 for y in trained.exact()]
    summed, lines = imported(with_two.file, advantages=True)
    assert summed.reward is None
    assert len(lines) == 1


def test_columns_that_are_no_rewards_of_trls_are_named(trained) -> None:
    columns = read_columns(trained.file)
    whole = [int(x > 1) for x in columns.values["length"]]
    texts = ["a"] * 12
    found, lines = imported(changed(columns, short=whole, right=[x > 0 for x in whole], texts=texts))
    assert found.reward == columns.values["length"]
    assert "the sum of length, correct if all" in lines[1]
    assert (
        "all weights are 1; excluded, as TRL's rewards are floats: short, right; otherwise" in lines[1]
    )
    assert len(imported(changed(columns, texts=texts))[1]) == 1


# TRL's reward functions


@pytest.mark.parametrize("chat", [False, True])
def test_a_function_is_given_what_trl_gives_it(trained, chatted, chat) -> None:
    by_trl = (chatted if chat else trained).call
    spec = f"{(chatted if chat else trained).functions}:length"
    reward = load_reward(spec, conversational=chat)
    completions = [c[0]["content"] if chat else c for c in by_trl["completions"]]
    rows = [{"answer": answer} for answer in by_trl["answer"]]
    ids = [list(y) for y in by_trl["completion_ids"]]
    reward_N = reward(by_trl["prompts"], completions, ids, rows)
    assert reward_N.tolist() == [len(y) / 4 for y in ids]
    # load_reward has made the module anew, so that its list is ours.
    (by_us,) = sys.modules["funcprobe_reward_functions"].CALLS["length"]
    assert by_us.keys() == by_trl.keys()
    apart = {"trainer_state", "log_extra", "log_metric"}
    for name in by_us.keys() - apart:
        assert by_us[name] == by_trl[name], name
    assert by_us["trainer_state"] is None
    assert by_us["log_extra"]("a", [1]) is by_us["log_metric"]("a", 1) is None


# verl


def dumped(path: Path, ids: list[tuple[list[int], list[int]]], scores: list[float], **more: list):
    """As verl 0.9.1 writes it (`_log_rollout_data`, `_write_generations`), whose wheel needs a GPU
    stack: ids decoded without special tokens, a row a line, what else there is behind."""
    tokenizer = character_tokenizer()
    columns = {
        "input": [tokenizer.decode(x, skip_special_tokens=True) for x, _ in ids],
        "output": [tokenizer.decode(y, skip_special_tokens=True) for _, y in ids],
        "gts": ["7"] * len(ids),
        "score": scores,
        "step": [6] * len(ids),
    } | more
    rows = zip(*columns.values(), strict=True)
    lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


A, B = [EOS, 5, 12, 6, 13], [EOS, 7, 12, 6, 13]  # <eos> stands for the marks of a chat template
SAMPLED = [(A, [3, 4, EOS]), (B, [EOS]), (A, [9] * LONGEST), (B, [9] * (LONGEST - 1) + [EOS])]


def test_verl_dumps(tmp_path) -> None:
    """Rows of a group need not be neighbours; prompts of the source have their special tokens."""
    path = dumped(tmp_path / "6.jsonl", SAMPLED, [1.0, 0.0, 0.25, 1.0], acc=[True, False, True, True])
    found, lines = imported(path, prompts={"3+4=": A, "5+4=": B}, temperature=0.5)
    assert found.prompt_index == [0, 1, 0, 1]
    assert found.prompt_ids == [A, B, A, B]
    assert found.response_ids == [y for _, y in SAMPLED]
    assert found.reward == [1.0, 0.0, 0.25, 1.0]
    assert found.advantage is None
    assert found.temperature == 0.5
    assert len(lines) == 1
    assert "EOS (1) is appended to the 3 of 4 responses shorter than" in lines[0]
    lost, lines = imported(path, prompts={"3+4=": A})
    assert lost.prompt_ids == [A, B[1:], A, B[1:]]
    assert "2 of U's 4 prompts are not in prompts.source" in lines[1]
    lost, lines = imported(path, prompts=None)
    assert lost.prompt_ids == [A[1:], B[1:]] * 2
    assert "4 of U's 4 prompts (prompts.source is not set) and were" in lines[1]
    assert "an evaluation" not in lines[0]
    assert "taken 6 steps, so that its next step uses the rollouts of step 7: give 7.js" in refusal(
        read_columns(path), run=run_before(7)
    )
    assert "give 6.jsonl" not in refusal(read_columns(path), run=run_before(5))  # of one too late, too
    # Settings of TRL's are none of verl's.
    imported(path, run=run_before(6, {"num_iterations": 3, "generation_batch_size": 24}))


def test_verl_groups_by_uid_where_there_is_one(tmp_path) -> None:
    twice = [(A, [3, EOS]), (A, [4, EOS]), (A, [5, EOS]), (A, [6, EOS]), (B, [7, EOS]), (B, [EOS])]
    uid = ["u_1_0_0", "v_0_0", "u_1_1_0", "v_1_0", "w_0_0", "w_1_0"]
    path = dumped(tmp_path / "6.jsonl", twice, [1.0] * 6, uid=uid)
    assert imported(path)[0].prompt_index == [0, 1, 0, 1, 2, 2]
    for wrong in ("w_1_1", "w", 5):
        columns = changed(read_columns(path), uid=[*uid[:5], wrong])
        assert f"line 6 has uid {wrong!r}, PROMPT_SESSION_0 is expected" in refusal(columns)
    crossed = changed(read_columns(path), uid=["u_0_0", "v_0_0", "u_1_0", "v_1_0", "w_0_0", "u_2_0"])
    assert "line 6 has another prompt than the rows before it with prompt_index 0" in refusal(crossed)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"step": [5, 5, 6, 6]}, "contains steps 5 and 6"),
        ({"step": [[5], [5], [5], [6]]}, "line 1 has [5] in step, an integer is expected"),
        ({"step": [6, 6, True, 6]}, "line 3 has True in step, an integer is expected"),
        ({"output": ["1", "1", "\ud800", "1"]}, "line 3 has '\\ud800' in output, Unicode text is"),
        ({"output": ["1", "1", "9" * (LONGEST + 1), "1"]}, "line 3 has a response of 13 tokens, sampl"),
        ({"output": ["1", "1", {}, "1"]}, "line 3 has {} in output, Unicode text is expected"),
        ({"input": ["1", None, "1", "1"]}, "line 2 has None in input, Unicode text is expected"),
        ({"input": ["1", "", "1", "1"]}, "line 2 has a prompt of zero tokens"),
        ({"score": [1.0, None, 1.0, 1.0]}, "line 2 has no reward"),
        ({"score": ["1"] * 4}, "line 1 has '1' in reward, a number is expected"),
    ],
)
def test_verl_files_that_cannot_be_used(tmp_path, values, said) -> None:
    path = dumped(tmp_path / "6.jsonl", SAMPLED, [1.0, 0.0, 0.25, 1.0])
    assert said in refusal(changed(read_columns(path), **values))
    assert "which contains no advantages" in refusal(read_columns(path), advantages=True)


def test_the_end_of_sequence_is_the_tokenizers_where_the_policy_has_it(tmp_path) -> None:
    path = dumped(tmp_path / "6.jsonl", SAMPLED[:1] * 2, [1.0, 0.0])
    columns = read_columns(path)

    def last(eos_ids) -> int:
        return import_columns(
            columns, "verl", guesses(eos_ids=eos_ids, run=run_before(6)), advantages=False
        )[0].values["response_ids"][0][-1]

    assert last((0, 1)) == 1
    assert last((0, 9)) == 0


class WithStart(NamedTuple):
    """A tokenizer that puts a token before a text where special tokens are asked for."""

    inner: Any
    eos_token_id: int = EOS

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + self.inner(text)["input_ids"]}


def test_prompts_start_as_the_tokenizer_starts_a_text_and_responses_do_not(trained, tmp_path) -> None:
    verl = dumped(tmp_path / "6.jsonl", SAMPLED, [1.0, 0.0, 0.25, 1.0])
    for file in (trained.file, verl):
        plain, _ = imported(file)
        found, _ = imported(file, tokenizer=WithStart(character_tokenizer()))
        assert found.prompt_ids == [[0, *x] for x in plain.prompt_ids]
        assert found.response_ids == plain.response_ids


# Which file is whose


def test_files_are_known_by_their_columns(trained, tmp_path) -> None:
    verl = dumped(tmp_path / "6.jsonl", SAMPLED, [1.0, 0.0, 0.25, 1.0])
    assert layout_of(read_columns(trained.file)) == "trl"
    assert layout_of(read_columns(verl)) == "verl"
    save_rollouts(imported(trained.file)[0], tmp_path / "completions_00001.parquet")
    assert layout_of(read_columns(tmp_path / "completions_00001.parquet")) is None
    both = changed(read_columns(verl), response_ids=[[1]] * 4)
    assert layout_of(both) is None
    assert layout_of(Columns(verl, ["line 1"], {"input": [""], "output": [""]})) is None


# In a run


@pytest.fixture
def config(checkpoint, tmp_path):
    def made(**changes: Any) -> Config:
        (tmp_path / "c.toml").touch()
        given = checkpoint.settings() | {"sampling.max_new_tokens": LONGEST}
        given |= {k.replace("__", "."): v for k, v in changes.items()}
        return read_config(tmp_path / "c.toml", sets(given)[1::2])

    return made


class Policy(NamedTuple):
    tokenizer: Any
    eos_ids: tuple[int, ...]


def brought(config: Config, prompt_ids=(), step: int = 1) -> tuple[Rollouts, list[str]]:
    policy: Any = Policy(character_tokenizer(), (EOS,))
    mode = config.objective.advantage or "mean_std"
    found, lines = load_supplied_update(
        open_update(config),
        config,
        policy,
        len(PIECES),
        mode=mode,
        prompt_ids=prompt_ids,
        run=run_before(step),
    )
    assert found is not None
    return found, lines


def test_the_configuration_fills_what_the_file_lacks(config, trained, tmp_path) -> None:
    of = {"rollouts__update": str(trained.file), "sampling__temperature": 0.5}
    found, lines = brought(config(**of))
    assert found.response_ids == trained.exact()
    assert found.temperature == 0.5
    assert "sampling.temperature = 0.5" in lines[0]
    longer, _ = brought(config(**of, sampling__max_new_tokens=LONGEST + 1))
    assert all(y[-1] == EOS for y in longer.response_ids)
    own, lines = brought(config(**of, objective__advantage="rollouts"))
    assert own.advantage == found.advantage
    verl = dumped(tmp_path / "6.jsonl", SAMPLED, [1.0, 0.0, 0.25, 1.0])
    found, lines = brought(config(rollouts__update=str(verl)), [B, A], step=6)
    assert found.prompt_ids == [A, B, A, B]
    assert len(lines) == 1


def test_a_run_on_what_trl_logged(command, checkpoint, trained) -> None:
    """Equal to a run on the exact tokens, which this tokenizer gives back; and it says so."""
    given = checkpoint.settings() | {"rollouts.update": str(trained.file)}
    given |= {"sampling.max_new_tokens": LONGEST}
    Path("c.toml").touch()
    outcome = command("run", "c.toml", *sets(given | {"run.name": "text"}))
    assert outcome.status == 0, outcome.err
    assert "warning: U is TRL completions" in Path("runs/text/run.log").read_text()
    tokens = load_rollouts(Path("runs/text/rollouts/update.parquet"), len(PIECES), rewards=True)
    assert tokens.response_ids == trained.exact()
    save_rollouts(tokens, Path("exact.jsonl"))
    given |= {"rollouts.update": "exact.jsonl", "run.name": "ids"}
    assert command("run", "c.toml", *sets(given)).status == 0
    assert "warning: U" not in Path("runs/ids/run.log").read_text()
    direction = [Path(f"runs/{name}/direction.safetensors").read_bytes() for name in ("text", "ids")]
    assert direction[0] == direction[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollouts.eval": "TRL"}, "is TRL completions: text, without the sampled tokens"),
        ({"rollouts.eval": "VERL"}, "is a verl rollout dump: text, without the sampled tokens"),
        (
            {"rollouts.update": "VERL", "objective.advantage": "rollouts"},
            "which contains no advantages",
        ),
        ({"rollouts.update": "OTHER"}, "its columns are: prompt, text"),
        (
            {"objective.advantage": "rollouts"},
            "the column advantage of rollouts.update, which is not set",
        ),
        (
            {"rollouts.update": "TRL", "objective.preset": "dr_grpo"},
            "set objective.constant to the",
        ),
        ({"reward.conversational": True}, "set prompts.chat = true as well"),
        (
            {"reward.conversational": True, "reward.function": "numeric", "prompts.chat": True},
            "takes text",
        ),
    ],
)
def test_what_a_run_refuses(command, checkpoint, trained, tmp_path, changes, said) -> None:
    dumped(tmp_path / "6.jsonl", SAMPLED, [1.0, 0.0, 0.25, 1.0])
    pq.write_table(pa.table({"prompt": ["a"], "text": ["b"]}), tmp_path / "other.parquet")
    files = {"TRL": str(trained.file), "VERL": "6.jsonl", "OTHER": "other.parquet"}
    Path("c.toml").touch()
    given = {k: files.get(str(v), v) for k, v in changes.items()}
    outcome = command("run", "c.toml", *sets(checkpoint.settings() | given))
    assert (outcome.status, outcome.out) == (2, "")
    assert said in outcome.err.splitlines()[-1]


def test_a_log_of_verls_finds_its_prompts_also_where_nothing_is_sampled(
    command, checkpoint, trained, tmp_path
) -> None:
    """With E brought, prompts.source is read for U's prompts alone; or is said not to be set."""
    prompts = [[5, 12, 6, 13], [7, 12, 6, 13]]
    rows = [(prompts[i % 2], y) for i, (_, y) in enumerate(SAMPLED)]
    verl = dumped(tmp_path / "6.jsonl", rows, [1.0, 0.0, 0.25, 1.0])
    save_rollouts(imported(trained.file)[0]._replace(reward=None, advantage=None), Path("e.parquet"))
    Path("c.toml").touch()
    given = checkpoint.settings() | {"sampling.max_new_tokens": LONGEST}
    given |= {"rollouts.eval": "e.parquet", "rollouts.update": str(verl)}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert outcome.status == 0, outcome.err
    assert "prompts.source" not in outcome.err.replace("set prompts.source and", "")
    assert "does not record" in outcome.err  # says of which step the checkpoint is
    assert "longest prompt" not in outcome.out
    gone = given | {"prompts.source": "/gone.jsonl"}
    assert "file not found: /gone.jsonl" in command("run", "c.toml", "--dry-run", *sets(gone)).err
    del given["prompts.source"]
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert outcome.status == 0, outcome.err
    assert "warning: 4 of U's 4 prompts (prompts.source is not set)" in outcome.err
    # A file in SCHEMA has its prompts, and none are loaded.
    save_rollouts(imported(trained.file)[0], Path("u.parquet"))
    given |= {"rollouts.update": "u.parquet", "prompts.source": "/gone.jsonl"}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert outcome.status == 0, outcome.err


def test_a_checkpoint_of_another_step_and_of_other_lengths(command, trained, damaged) -> None:
    Path("c.toml").touch()
    given = damaged.settings() | {"rollouts.update": str(trained.file)}
    given |= {"sampling.max_new_tokens": LONGEST + 1}
    state = damaged.adapter / "trainer_state.json"
    with_sidecar(damaged, sampling={"max_completion_length": LONGEST}, global_step=7)

    def probed(**changes: Any):
        more = {k.replace("__", "."): v for k, v in changes.items()}
        return command("run", "c.toml", "--dry-run", *sets(given | more))

    for rule in ("adamw", "sgd"):  # the second reads no state, so no sidecar of one
        state.unlink(missing_ok=True)
        outcome = probed(optimizer__rule=rule)
        assert outcome.status == 2
        assert "has taken 7 steps" in outcome.err  # by the sidecar
        state.write_text('{"global_step": 2}')
        outcome = probed(optimizer__rule=rule)
        assert outcome.status == 2
        assert "has taken 2 steps, so that" in outcome.err
        state.write_text('{"global_step": 0}')
        outcome = probed(optimizer__rule=rule)
        assert outcome.status == 0, outcome.err
        assert "max_completion_length was 12, sampling.max_new_tokens is 13: resp" in outcome.err
    assert "max_completion_length" not in probed(sampling__max_new_tokens=LONGEST).err


@pytest.fixture
def chat_checkpoint(damaged) -> Checkpoint:
    """With a chat template, and a reward that reads chats and is None for one prompt."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(damaged.adapter)
    damaged.rewards.write_text("""
def f(prompts, completions, **columns):
    for (system, user), answer in zip(prompts, columns["answer"]):
        assert system == {"role": "system", "content": "7"}
        a, b = user["content"].rstrip("=").split("+")
        assert user["role"] == "user" and int(a) + int(b) == int(answer)
    none = prompts[0]
    return [None if p == none else float(len(c[0]["content"])) for p, c in zip(prompts, completions)]
""")
    return damaged


def test_a_run_whose_reward_reads_chats(chat_checkpoint, tmp_path, monkeypatch) -> None:
    """Messages as the template rendered them; None as in TRL, down to the advantages that are kept."""
    monkeypatch.chdir(tmp_path)
    settings = chat_checkpoint.settings() | {
        "prompts.chat": True,
        "prompts.system_prompt": "7",
        "reward.function": f"{chat_checkpoint.rewards}:f",
        "reward.conversational": True,
    }
    Path("c.toml").touch()
    loaded = read_config(Path("c.toml"), sets(settings)[1::2])
    narrator = Narrator()
    drawn = sample(load(loaded, narrator), Stages(None), narrator).update_rollouts
    assert all(text.startswith("7") and text.endswith("==") for text in drawn.prompt)
    assert [math.isnan(r) for r in drawn.reward] == [True] * 3 + [False] * 9
    assert drawn.advantage[:3] == [0.0] * 3
    assert any(drawn.advantage)
    assert any("3 of U's 12 responses have no reward (None)" in line for line in narrator.lines)
    save_rollouts(drawn, Path("u.jsonl"))
    again = load_rollouts(Path("u.jsonl"), len(PIECES), rewards=False, advantages=True)
    assert again.advantage == drawn.advantage
    assert str(again.reward) == str(drawn.reward)


def test_u_with_advantages_alone(checkpoint, trained, tmp_path, monkeypatch) -> None:
    """No reward column is needed, and the coefficients are those of the advantages as they stand."""
    monkeypatch.chdir(tmp_path)
    found, _ = imported(trained.file)
    own = [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, -1.0, 2.0, 0.25, 3.0, 0.0, 0.0]
    save_rollouts(found._replace(reward=None, advantage=own), Path("u.jsonl"))
    settings = checkpoint.settings() | {
        "rollouts.update": "u.jsonl",
        "objective.advantage": "rollouts",
        "objective.normalisation": "sequence",
    }
    Path("c.toml").touch()
    narrator = Narrator()
    plan = load(read_config(Path("c.toml"), sets(settings)[1::2]), narrator)
    drawn = sample(plan, Stages(None), narrator)
    assert drawn.update.coef_NR[:, 0].tolist() == [a / 12 for a in own]
    assert drawn.equal_groups == 1  # three equal advantages of 0.5 are a gradient
    assert plan.objective._asdict() == {
        "advantage": "rollouts",
        "normalisation": "sequence",
        "constant": 6.0,
    }
    assert "U is supplied: its advantages are the supplied ones" in narrator.lines
    assert "1 of 4 groups have advantage 0" in narrator.lines[-1]
    save_rollouts(found._replace(reward=None, advantage=[0.0] * 12), Path("u.jsonl"))
    with pytest.raises(
        InputError, match=r"all 4 groups of U have advantage 0.*: supply other rollouts"
    ):
        load(read_config(Path("c.toml"), sets(settings)[1::2]), narrator)


def test_advantages_that_are_not_those_of_the_rewards_are_a_warning(
    checkpoint, trained, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _ = imported(trained.file)
    save_rollouts(found._replace(advantage=[a / 2 for a in found.advantage]), Path("u.parquet"))
    given = checkpoint.settings() | {
        "rollouts.update": "u.parquet",
    }
    Path("c.toml").touch()
    narrator = Narrator()
    plan = load(read_config(Path("c.toml"), sets(given)[1::2]), narrator)
    sample(plan, Stages(None), narrator)
    (warning,) = (line for line in narrator.lines if "supplied advantages" in line)
    assert 'objective.advantage = "rollouts"' in warning
    rows = slice(0, 11)  # the last of a group is gone
    cut = {k: v[rows] for k, v in found._asdict().items() if isinstance(v, list)}
    save_rollouts(found._replace(**cut), Path("u.parquet"))
    plan = load(read_config(Path("c.toml"), sets(given)[1::2]), narrator)
    sample(plan, Stages(None), narrator)
    assert any("U has 2 to 3 responses per prompt" in line for line in narrator.lines)
