"""Real prompts end to end: GSM8K's questions, template and answers, on a policy of random weights."""

import json

import pytest
from pyarrow import parquet
from tokenizers.pre_tokenizers import ByteLevel

from support.checkpoints import make_checkpoint, sets
from support.paths import GSM8K

TRAIN = GSM8K / "train.jsonl"

REWARD = """
def digits(completions, answer, **_):
    wanted = [a.rsplit("####")[-1].strip() for a in answer]
    return [sum(c in w for c in text) / len(text or "-") for text, w in zip(completions, wanted)]
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN.is_file(), reason="GSM8K lies in ../shared, which a clone may lack")
def test_gsm8k_questions_are_probed(tmp_path, command):
    pieces = ("<pad>", "<eos>", "<unk>", *sorted(ByteLevel.alphabet()))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", pieces=pieces, positions=2048)
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    settings = checkpoint.settings() | {
        "prompts.source": str(TRAIN),
        "prompts.prompt_column": "question",
        "prompts.template": "Question: {question}\nAnswer:",
        "reward.function": f"{tmp_path}/reward.py:digits",
        "measure.etas": [1e-7, 1e-6, 1e-5],
        "run.name": "gsm8k",
    }
    (tmp_path / "cfg.toml").write_text("", encoding="utf-8")
    outcome = command("run", "cfg.toml", *sets(settings))
    assert outcome.status == 0, outcome.err
    document = json.loads((tmp_path / "runs/gsm8k/results.json").read_text())
    for row in document["sweep"][:3]:
        # What first order misses at eta = 1e-5 of a random policy is far under one percent.
        assert row["ratio"]["value"] == pytest.approx(1, abs=1e-2)
    update = parquet.read_table(tmp_path / "runs/gsm8k/rollouts/update.parquet").to_pylist()
    questions = {json.loads(line)["question"] for line in TRAIN.read_text().splitlines()}
    for row in update:
        asked = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        assert asked in questions
        assert 0 <= row["reward"] <= 1
