"""Without prompts.source the probe draws from the trainer's own data set, with the trainer's tokens."""

import json

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from funcprobe.adapters.trainers import ProbeCallback
from support.trainers import grpo_trainer, probe_config

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] | length }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% if plus is defined %}+{% endif %}{% endif %}"
)


def messages(rows):
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


@pytest.mark.parametrize("arguments", [None, {"plus": True}])
@pytest.mark.parametrize("kind", ["text", "marked text", "messages"])
def test_the_prompts_are_the_trainers_token_by_token(kind, arguments, checkpoint, tmp_path):
    trainer = grpo_trainer(checkpoint, tmp_path, chat_template_kwargs=arguments)
    tokenizer = trainer.processing_class
    rows = [json.loads(line) for line in checkpoint.prompts.read_text().splitlines()]
    tokenizer.chat_template, tokenizer.bos_token = TEMPLATE, "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    if kind == "marked text":  # to which the trainer adds a second one
        rows = [{**row, "prompt": "<eos>" + row["prompt"]} for row in rows]
    trainer.train_dataset = Dataset.from_list(messages(rows) if kind == "messages" else rows)
    config = probe_config(checkpoint, prompts={"source": "toy"})
    callback = ProbeCallback(trainer, every=1, config=config)
    expected, *_ = trainer._tokenize_prompts(list(trainer.train_dataset["prompt"]))
    assert callback.source.prompt_ids == expected
    assert tokenizer.decode(expected[0]).endswith("=+" if kind == "messages" and arguments else "=")
    assert (expected[0][:2] == [1, 1]) == (kind == "marked text")
