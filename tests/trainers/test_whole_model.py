"""The probe inside the training of a whole model: the step taken is the step predicted."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from funcprobe import InputError
from funcprobe.adapters.trainers import ProbeCallback
from funcprobe.adapters.trainers import probe as module
from support.checkpoints import PIECES
from support.trainers import outcome, probe_config, require_same


def full_trainer(checkpoint, folder) -> Trainer:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        attention_dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    rows = torch.randint(2, 14, (16, 8), generator=torch.Generator().manual_seed(3)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint.base),
    )


@pytest.mark.filterwarnings("ignore:funcprobe. dropout in training")
def test_the_step_predicted_is_the_step_taken_and_nothing_else_changes(
    checkpoint, tmp_path, monkeypatch
) -> None:
    plain = outcome(full_trainer(checkpoint, tmp_path / "plain"))
    found, before = [], []
    original = module.probe_step

    def recorded(policy, *rest):
        before.append({n: p.detach().clone() for n, p in policy.model.named_parameters()})
        found.append(original(policy, *rest))
        return found[-1]

    monkeypatch.setattr(module, "probe_step", recorded)
    trainer = full_trainer(checkpoint, tmp_path / "probed")
    trainer.add_callback(ProbeCallback(trainer, every=1, config=probe_config(checkpoint)))
    probed = outcome(trainer)
    require_same(plain, probed)
    assert [entry["step"] for entry in probed.probed] == [1, 2]
    assert trainer.model.get_input_embeddings().padding_idx == 0
    after = [before[1], {n: p.detach() for n, p in trainer.model.named_parameters()}]
    for step, old, new in zip(found, before, after, strict=True):
        assert step.direction.total.keys() == old.keys()
        for name, v in step.direction.total.items():
            # Weights under 2 round by 1.2e-7, over lr = 1e-3.
            assert torch.allclose((new[name] - old[name]) / step.lr, v.float(), atol=3e-4), name
        # Reverse and forward route, which the padding row would separate.
        assert step.along.bars_dot == pytest.approx(step.along.derivative, rel=1e-3, abs=1e-4)


def test_a_whole_model_is_counted_as_any_other(checkpoint, tmp_path) -> None:
    trainer = full_trainer(checkpoint, tmp_path)
    config = probe_config(checkpoint, policy={"max_trainable": 1000})
    with pytest.raises(InputError, match=r"more than policy\.max_trainable = 1,000"):
        ProbeCallback(trainer, every=1, config=config)
