"""What TRL logs, by a real GRPOTrainer, made into U.

The same training runs show what TRL hands to reward functions and what it makes of None.
"""

import sys

import pytest

from funcprobe.adapters.rollouts.files import read_columns
from funcprobe.adapters.rollouts.provenance import TrainingRun, training_run
from funcprobe.adapters.sampling.advantages import update_advantages
from funcprobe.adapters.sampling.rewards import load_reward
from funcprobe.types import InputError
from support.checkpoints import character_tokenizer
from support.trainer_logs import (
    EOS,
    LONGEST,
    TEMPLATE,
    G,
    changed,
    imported,
    refusal,
    run_before,
    train,
)


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


def test_arguments_that_exclude_each_other(chatted) -> None:
    """return_dict is set where prompts are tokenised, and not where they are rendered."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    given = {"tokenizer": tokenizer, "chat_template_kwargs": {"return_dict": False}}
    assert "rejects the prompt of row 0, or prompts.chat_template_kwargs: " in refusal(
        read_columns(chatted.file), **given
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
