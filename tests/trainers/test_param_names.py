"""ParamNamesCallback: the sidecar that a training run leaves beside its optimizer's state."""

import dataclasses
import json
import random
import types
from pathlib import Path

import pytest
import torch
import torch.distributed
from transformers import TrainingArguments
from trl import GRPOConfig

import funcprobe
from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.adapters.trainers import ParamNamesCallback, names
from support.trainers import dropped_out_grpo, plain_trainer, trainable


def test_sidecar_of_a_grpo_run(checkpoint, tmp_path):
    trainer = dropped_out_grpo(checkpoint, tmp_path, temperature=0.9, top_p=0.95, epsilon=0.1)
    trainer.add_callback(ParamNamesCallback())
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    said = json.loads((folder / "optimizer_param_names.json").read_text())
    assert said["format"] == "funcprobe.optimizer_param_names"
    assert said["version"] == 1
    assert said["global_step"] == 3
    assert said["optimizer"] == "AdamW"
    assert said["max_grad_norm"] == 0.5
    trainable = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert said["groups"][0]["names"] == list(trainable)
    assert said["groups"][0]["shapes"] == [list(p.shape) for p in trainable.values()]
    assert said["groups"][1] == {"names": [], "shapes": []}
    assert said["versions"].keys() >= {"torch", "transformers", "peft", "trl"}
    assert said["versions"]["torch"] == torch.__version__
    loss, sampling = said["loss"], said["sampling"]
    assert (loss["loss_type"], loss["scale_rewards"], loss["beta"]) == ("dapo", "group", 0.0)
    assert (loss["epsilon"], loss["epsilon_high"], loss["num_iterations"]) == (0.1, 0.1, 1)
    assert (loss["world_size"], loss["router_aux_loss_coef"]) == (1, 0.0)
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (0.9, 0.95, 0)
    assert (sampling["num_generations"], sampling["max_completion_length"]) == (4, 6)
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
    params = funcprobe.trainable_params(trainer.model)
    _, report = read_adam_state(folder / "optimizer.pt", trainer.model, params)
    assert not report.positional
    assert report.sidecar is not None


def test_sidecar_tells_groups_of_any_order(checkpoint, tmp_path):
    """An optimizer of the user's, in an order that no replay could guess."""
    trainer = plain_trainer(checkpoint, tmp_path, max_grad_norm=0)
    trainable = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    random.Random(4).shuffle(trainable)
    groups = [{"params": [p for _, p in part]} for part in (trainable[:5], trainable[5:])]
    trainer.optimizer = torch.optim.AdamW(groups, lr=1e-3)
    trainer.add_callback(ParamNamesCallback())
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    said = json.loads((folder / "optimizer_param_names.json").read_text())
    names = [n for n, _ in trainable]
    assert [group["names"] for group in said["groups"]] == [names[:5], names[5:]]
    assert said["max_grad_norm"] == 0
    params = funcprobe.trainable_params(trainer.model)
    state, _ = read_adam_state(folder / "optimizer.pt", trainer.model, params)
    for name, p in trainable:
        assert torch.equal(state.exp_avg[name], trainer.optimizer.state[p]["exp_avg"]), name


def test_no_sidecar_from_other_processes_and_plain_values_only(checkpoint, tmp_path):
    trainer = plain_trainer(checkpoint, tmp_path, max_steps=1)
    trainer.train()
    args = types.SimpleNamespace(should_save=False)
    given = {"model": trainer.model, "optimizer": trainer.optimizer}
    ParamNamesCallback().on_save(args, trainer.state, trainer.control, **given)
    args = types.SimpleNamespace(should_save=True, output_dir=str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match=r"has no optimizer_param_names\.json: .*it does not exist"):
        ParamNamesCallback().on_save(args, trainer.state, trainer.control, **given)
    args = types.SimpleNamespace(
        should_save=True,
        output_dir=str(tmp_path),
        max_grad_norm=float("inf"),
        beta=float("inf"),
        reward_weights=torch.tensor([1.0, 0.5]),
        loss_type=Path("x"),
        generation_kwargs={"stop": (1, None), 3: {"a": True}},
    )
    ParamNamesCallback().on_save(args, trainer.state, trainer.control, **given)
    said = json.loads((tmp_path / "checkpoint-1" / "optimizer_param_names.json").read_text())
    assert said["max_grad_norm"] == 0
    assert said["loss"] == {"loss_type": "x", "beta": "inf", "reward_weights": [1.0, 0.5]}
    assert said["sampling"] == {"generation_kwargs": {"stop": [1, None], "3": {"a": True}}}


def test_sidecar_has_every_setting_of_the_loss(checkpoint, tmp_path):
    """Each field of GRPOConfig that its loss, or the sequences in it, depend on, under TRL's name."""
    parts = ("epsilon", "sapo_", "vespo_", "entropy", "vllm_importance_", "loss", "beta", "delta", "kl")
    of_loss = {
        field.name
        for field in dataclasses.fields(GRPOConfig)
        if field.name not in {f.name for f in dataclasses.fields(TrainingArguments)}
        and any(part in field.name for part in parts)
    }
    assert len(of_loss) > 20
    deprecated = {"vllm_importance_sampling_cap"}  # is vllm_importance_sampling_clip_max
    assert of_loss - deprecated <= {*names.LOSS, *names.SAMPLING}
    trainer = dropped_out_grpo(checkpoint, tmp_path, sapo_temperature_neg=1.5, entropy_target=0.25)
    said = names.param_names(
        trainer.args, trainer.state, trainer.model, torch.optim.AdamW(trainable(trainer))
    )
    written = said["loss"] | said["sampling"]
    assert of_loss - deprecated <= written.keys()
    assert (written["sapo_temperature_neg"], written["entropy_target"]) == (1.5, 0.25)
    assert written["vllm_importance_sampling_mode"] == trainer.args.vllm_importance_sampling_mode
    # A model with a router has a coefficient of its own.
    trainer.model.config.output_router_logits = False
    trainer.model.config.router_aux_loss_coef = 0.02
    for given, coef in ((None, 0.02), (0.5, 0.5), (0.0, 0.0)):
        trainer.args.router_aux_loss_coef = given
        said = names.param_names(
            trainer.args, trainer.state, trainer.model, torch.optim.AdamW(trainable(trainer))
        )
        assert said["loss"]["router_aux_loss_coef"] == coef
