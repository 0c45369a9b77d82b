"""Runs on what a trainer logged."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.rollouts import Rollouts, load_rollouts, save_rollouts
from funcprobe.adapters.sampling.supplied import load_supplied_update, open_update
from funcprobe.adapters.stages.batches import sample
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.store import Stages
from funcprobe.types import InputError
from support.checkpoints import PIECES, Checkpoint, character_tokenizer, sets
from support.sidecars import with_sidecar
from support.trainer_logs import EOS, LONGEST, SAMPLED, TEMPLATE, A, B, dumped, imported, run_before


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
        rule="adamw",
        prompt_ids=None if prompt_ids is None else [prompt_ids],
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    settings["optimizer.rule"] = "sgd"  # AdamW steps by momentum
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
