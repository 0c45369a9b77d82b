"""verl's rollout dumps, by their layout, made into U; and which file is whose."""

from typing import Any, NamedTuple

import pytest

from funcprobe.adapters.rollouts import save_rollouts
from funcprobe.adapters.rollouts.files import Columns, read_columns
from funcprobe.adapters.rollouts.imports import import_columns, layout_of
from support.checkpoints import character_tokenizer
from support.trainer_logs import (
    EOS,
    LONGEST,
    SAMPLED,
    A,
    B,
    changed,
    dumped,
    guesses,
    imported,
    refusal,
    run_before,
)


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
