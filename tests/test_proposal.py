"""`funcprobe init --from`: what it writes runs as it is, from any folder, with the run's settings."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOTrainer

from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.adapters.stages.run_settings import with_run_settings
from funcprobe.adapters.trainers import ParamNamesCallback
from support.slow import first
from support.trainers import grpo_trainer

pytestmark = pytest.mark.usefixtures("offline")

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% if plus is defined %}+{% endif %}{% endif %}"
)


def score(completions, **_):
    return [sum(map(ord, c[0]["content"])) % 7 / 7 for c in completions]


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Path:
    """A folder with checkpoint-2 of a GRPO run on messages, and that run's data set."""
    folder = tmp_path_factory.mktemp("trained")
    base = folder / "base"
    shutil.copytree(checkpoint.base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    rows = [json.loads(line) for line in checkpoint.prompts.read_text().splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"].removesuffix("=")}]
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    trainer: GRPOTrainer = grpo_trainer(
        checkpoint._replace(base=base),
        folder,
        rewards=score,
        train_dataset=Dataset.from_list(rows),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        loss_type="dr_grpo",
        scale_rewards="group",
        temperature=0.8,
        max_grad_norm=0.3,
        max_completion_length=5,
        chat_template_kwargs={"plus": True},
    )
    trainer.add_callback(ParamNamesCallback())
    trainer.train()
    return folder


def proposed(command, folder: Path, *arguments: object, prompts: Path | None = None) -> Path:
    given = ["--from", folder / "checkpoint-1", "--prompts", prompts or folder / "data.parquet"]
    outcome = command("init", *given, "-o", "mine.toml", *arguments)
    assert outcome.status == 0, outcome.err
    assert "wrote mine.toml" in outcome.out
    return Path("mine.toml")


def test_it_has_the_settings_of_the_run(command, trained) -> None:
    path = proposed(command, trained)
    lines: list[str] = []
    config = with_run_settings(read_config(path), lines.append)
    assert "sampling.temperature = 0.8" in lines[0]  # left to the sidecar, as a comment
    assert "# temperature = 0.8\n" in path.read_text()
    assert config.policy.checkpoint == str(trained / "checkpoint-1")
    assert config.prompts.source == str(trained / "data.parquet")
    assert config.prompts.chat_template_kwargs == {"plus": True}
    assert (config.reward.function, config.reward.answer_column) == ("numeric", "answer")
    sampling = config.sampling
    assert (sampling.temperature, sampling.max_new_tokens, sampling.G) == (0.8, 5, 4)
    assert sampling.B_U == 16 // 4  # 8 sequences, accumulated twice
    assert (config.objective.preset, config.objective.advantage) == ("dr_grpo", "mean_std")
    assert config.optimizer.max_grad_norm == 0.3
    assert not config.optimizer.accept_positional
    state = json.loads((trained / "checkpoint-1" / "trainer_state.json").read_text())
    lr = state["log_history"][0]["learning_rate"] / 2  # linear to 0 in 2 steps: the second's
    assert config.measure.etas == pytest.approx([0.1 * lr, 0.3 * lr, 3 * lr, 10 * lr], rel=0.05)
    written = path.read_text()
    comments, keys = (
        sum(line.startswith("# ") for line in written.splitlines()),
        len(re.findall(r"(?m)^(?:# )?\w+ = ", written)),
    )
    assert keys > sum(len(section) for section in tomllib.loads(written).values())
    assert comments >= keys  # each choice is explained
    uncommented = tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", written))
    assert with_run_settings(Config.model_validate(uncommented), lines.append) == config
    assert len(lines) == 1  # with the comments as keys, nothing is left to take


@pytest.mark.slow
def test_it_runs_as_it_is_from_any_folder(command, trained, tmp_path, monkeypatch) -> None:
    path = proposed(command, trained).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = command("run", path, "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "warning" not in outcome.err
    assert "prompts: messages, rendered by the tokenizer's chat template" in outcome.err
    assert "prompt 1 of 6, 5 tokens: '3+4=+'" in outcome.err
    outcome = command(
        "run", path, "--set", "sampling.B_E=8", "--set", f"reward.function={scores(tmp_path)}"
    )
    assert outcome.status == 0, outcome.err
    # So is what the run writes.
    monkeypatch.chdir(trained)
    again = command("run", tmp_path / "elsewhere/runs/probe/config.toml", "--set", "run.name=again")
    assert again.status == 0, again.err
    first, second = (
        json.loads((tmp_path / "elsewhere/runs" / name / "results.json").read_text())
        for name in ("probe", "again")
    )
    assert first["first_order"] == second["first_order"]


def scores(folder: Path) -> str:
    """A reward that reads messages, as TRL gives them, and differs within groups."""
    (folder / "score.py").write_text(
        "def score(prompts, completions, **_):\n"
        "    assert all(p[-1]['role'] == 'user' for p in prompts)\n"
        "    return [sum(map(ord, c[0]['content'])) % 7 / 7 for c in completions]\n"
    )
    return f"{folder / 'score.py'}:score"


def test_without_a_sidecar_it_says_what_is_not_recorded(command, trained, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained / "checkpoint-1", copy / "checkpoint-1")
    (copy / "checkpoint-1" / "optimizer_param_names.json").unlink()
    path = proposed(command, copy, prompts=trained / "data.parquet")
    config, text = read_config(path), path.read_text()
    assert not config.optimizer.accept_positional  # the gradients on U decide
    assert "# accept_positional = true\n" in text
    assert "the run's temperature is not recorded" in text
    assert "train_batch_size is 8 (trainer_state.json)" in text
    assert "not recorded; TRL's default" in text
    assert config.sampling.B_U == 2
    outcome = command("run", path, "--dry-run")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("rows", "chosen"),
    first(
        2,
        [
            ([{"prompt": "1+2=", "solution": "so #### 1,000"}], ("numeric", "solution", "prompt")),
            ([{"question": "1+2=", "ground_truth": 3.5}], ("numeric", "ground_truth", "question")),
            ([{"problem": "1+2=", "answer": "\\frac{1}{2}"}], ("math", "answer", "problem")),
            ([{"problem": "1", "solution": "It is \\boxed{x^2}."}], ("math", "solution", "problem")),
            (
                [{"prompt": "1+2=", "reward_model": {"style": "rule", "ground_truth": "3"}}],
                ("numeric", "answer", "prompt"),
            ),
        ],
    ),
)
def test_reward_and_columns_follow_the_answers(command, checkpoint, rows, chosen) -> None:
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    outcome = command("init", "--from", checkpoint.adapter, "--prompts", "p.jsonl")
    assert outcome.status == 0, outcome.err
    config = read_config(Path("funcprobe.toml"))
    found = (config.reward.function, config.reward.answer_column, config.prompts.prompt_column)
    assert found == chosen
    outcome = command("run", "funcprobe.toml", "--dry-run")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("row", "arguments", "said"),
    [
        ({"prompt": "1", "solved": "3"}, (), "no column of answers (answer, ground_truth"),
        ({"prompt": "1", "answer": "a sentence"}, (), "as 'a sentence', are neither numbers nor math"),
        ({"prompt": "1", "answer": "3"}, ("--reward", "nowhere.py:f"), "file not found: nowhere.py"),
        ({"ask": "1", "answer": "3"}, (), "give the one with the prompts by --prompt-column"),
        ({"ask": "1", "answer": "3"}, ("--prompt-column", "aks"), "did you mean 'ask'?"),
    ],
)
def test_prompts_for_which_nothing_is_written(command, checkpoint, row, arguments, said) -> None:
    Path("p.jsonl").write_text((json.dumps(row) + "\n") * 2)
    outcome = command("init", "--from", checkpoint.adapter, "--prompts", "p.jsonl", *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert said in outcome.err
    if "--reward" not in arguments and "answer" in said:
        assert "--reward module.py:function" in outcome.err
    assert not Path("funcprobe.toml").exists()


def test_arguments_that_belong_together(command, checkpoint) -> None:
    for alone in (("--from", checkpoint.adapter), ("--prompts", checkpoint.prompts)):
        outcome = command("init", *alone)
        assert outcome.status == 2
        assert "are given together" in outcome.err
    outcome = command("init", "--from", checkpoint.base, "--prompts", checkpoint.prompts)
    assert outcome.status == 2
    assert "no optimizer state" in outcome.err
    reward = f"{checkpoint.rewards}:length"
    given = ("--from", checkpoint.adapter, "--prompts", checkpoint.prompts, "--reward", reward)
    assert command("init", *given).status == 0
    assert read_config(Path("funcprobe.toml")).reward.function == reward
