"""What a run says of its prompts and responses, which tokens end these, and what a reward is given."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.rollouts import load_rollouts
from support.checkpoints import PIECES, edit_json, sets

PLUS = PIECES.index("+")
SEEN = """
import json, pathlib
def seen(prompts, completions, **_):
    pathlib.Path("seen.json").write_text(json.dumps([prompts, completions]))
    return [float(len(c[0]["content"] if isinstance(c, list) else c)) for c in completions]
"""


@pytest.mark.slow
def test_a_prompt_and_a_response_stand_in_the_log(ran, command, checkpoint):
    _, outcome = ran()
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    shown = "".join(PIECES[i] for i in drawn.response_ids[0])
    for place in (outcome.err, Path("runs/one/run.log").read_text()):
        assert "prompt 1 of 6, 4 tokens: '3+4='\n" in place
        length = len(drawn.response_ids[0])
        assert (
            f"response 1 of 12 of E ({drawn.finish_reason[0]}), {length} tokens: {shown!r}\n" in place
        )
        assert "responses end with 1 '<eos>' (tokenizer and generation config, as in TRL)" in place
    given = checkpoint.settings() | {"rollouts.eval": "runs/one/rollouts/eval.parquet"}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))  # samples nothing; E is there
    assert outcome.status == 0, outcome.err
    assert f"response 1 of 12 of E ({drawn.finish_reason[0]})" in outcome.err
    assert "prompt 1 of 6, 4 tokens: '3+4='" in outcome.err


@pytest.mark.slow
def test_responses_end_with_the_tokens_that_are_set(ran, command, checkpoint):
    _, outcome = ran(sampling__eos_ids=[PLUS], sampling__B_E=160)
    assert f"responses end with {PLUS} '+' (sampling.eos_ids)" in outcome.err
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    ended = [ids for ids in drawn.response_ids if PLUS in ids]
    assert ended
    assert all(ids.index(PLUS) == len(ids) - 1 for ids in ended)
    assert any(1 in ids[:-1] for ids in drawn.response_ids)  # the tokenizer's own ends none
    reasons = ["stop" if PLUS in ids else "length" for ids in drawn.response_ids]
    assert drawn.finish_reason == reasons
    given = checkpoint.settings() | {"sampling.eos_ids": [14]}
    outcome = command("run", "c.toml", "--dry-run", *sets(given))
    assert outcome.status == 2
    assert "sampling.eos_ids has 14, but the model has 14 rows" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, [{"role": "user", "content": "3+4"}]),  # messages in the data set: as TRL
        ({"reward.conversational": False}, "3+4="),  # rendered
        ({"prompts.source": "text.jsonl"}, "3+4"),  # of the data set, whatever the policy is given
        (
            {"prompts.source": "text.jsonl", "reward.conversational": True},
            [{"role": "user", "content": "3+4"}],
        ),
    ],
)
def test_a_reward_is_given_what_trl_gives_it(command, damaged, settings, prompt):
    tokenizer = AutoTokenizer.from_pretrained(damaged.adapter)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(damaged.adapter)
    texts = [f"{a}+{b}" for a in (3, 5, 8) for b in (4, 12)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    for name, prompts in (("text", texts), ("messages", messages)):
        lines = [json.dumps({"prompt": p}) + "\n" for p in prompts]
        Path(f"{name}.jsonl").write_text("".join(lines))
    Path("seen.py").write_text(SEEN)
    Path("c.toml").touch()
    given = damaged.settings() | {"prompts.source": "messages.jsonl", "reward.function": "seen.py:seen"}
    outcome = command("run", "c.toml", *sets(given | settings))
    assert outcome.status == 0, outcome.err
    assert "prompt 1 of 6, 4 tokens: '3+4='" in outcome.err
    seen_prompts, seen_completions = json.loads(Path("seen.json").read_text())
    wanted = json.dumps(prompt)
    assert set(map(json.dumps, seen_prompts)) <= {wanted.replace("3+4", text) for text in texts}
    kinds = {type(p) for p in seen_prompts}, {type(c) for c in seen_completions}
    assert kinds == ({type(prompt)}, {type(prompt)})


@pytest.mark.slow
def test_the_written_configuration_names_a_base_that_was_found_from_here(command, damaged, tmp_path):
    base = damaged.base.relative_to(tmp_path)
    edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path=str(base))
    Path("c.toml").touch()
    outcome = command("run", "c.toml", *sets(damaged.settings() | {"sampling.B_E": 4}))
    assert outcome.status == 0, outcome.err
    assert read_config(Path("runs/probe/config.toml")).policy.base == str(damaged.base)
