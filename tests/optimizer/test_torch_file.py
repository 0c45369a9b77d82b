"""Real optimizer files, made by the libraries that write them, against the live optimizer's state."""

import copy
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from funcprobe.adapters.optimizer import AdamOverrides, find_state
from funcprobe.types import InputError
from support.optimizers import assert_attached, read, refused, take_steps
from support.small_lora import ADAPTERS, make_model, registry, trainable, trainer_run


def save(state: object, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


@pytest.fixture(scope="module", params=sorted(ADAPTERS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A Trainer's run with the default optimizer, its last checkpoint written at the last step."""
    model = make_model(request.param)
    out = tmp_path_factory.mktemp("trainer")
    live = trainer_run(model, out, adam_beta2=0.95)
    return SimpleNamespace(adapter=request.param, model=model, out=out, optimizer=live)


@pytest.fixture(scope="module")
def plain() -> SimpleNamespace:
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3)
    take_steps(model, optimizer)
    return SimpleNamespace(model=model, optimizer=optimizer, params=registry(model))


@pytest.fixture
def state(plain: SimpleNamespace) -> dict[str, Any]:
    return copy.deepcopy(plain.optimizer.state_dict())


# What is read


def test_trainer_checkpoint(trained: SimpleNamespace) -> None:
    path = find_state(trained.out / "checkpoint-2")
    fresh = make_model(trained.adapter, seed=1)  # names come from a model, not from its weights
    params = registry(fresh)
    assert list(params) != list(trainable(fresh))  # else a wrong order would pass unseen
    adam, report = read(path, fresh, params)
    assert_attached(adam, trained.model, trained.optimizer)
    assert [g.weight_decay for g in adam.groups] == (
        [0.1] if trained.adapter == "plain" else [0.1, 0.0]
    )
    assert report.format == "Hugging Face Trainer"
    assert report.route == "by position, the Trainer's [decay, no-decay] grouping replayed"
    assert report.positional
    assert report.path == path
    assert report.parameters == len(params)
    assert report.coverage == dict.fromkeys(("exp_avg_sq", "exp_avg", "step"), len(params))
    assert any("next step, in the file: 5e-05" in note for note in report.notes)
    assert report.twins == len(params) - (5 if trained.adapter == "none" else 0)


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(1e-3)}]
)
def test_one_group_in_named_parameters_order(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_model("norms")
    optimizer = torch.optim.AdamW(trainable(model).values(), **{"lr": 2e-3, **options})
    take_steps(model, optimizer)
    adam, report = read(save(optimizer.state_dict(), tmp_path), model, registry(model))
    assert_attached(adam, model, optimizer)
    assert report.format == "torch.optim"
    assert report.route == "by position, one group in named_parameters() order"
    assert report.positional


def test_one_group_of_all_parameters(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    take_steps(model, optimizer)
    adam, report = read(save(optimizer.state_dict(), tmp_path), model, registry(model))
    assert_attached(adam, model, optimizer)
    assert report.route == "by position, one group of all in named_parameters() order"
    assert report.positional


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_two_groups_by_name(prefix: str, tmp_path: Path) -> None:
    model = make_model("norms")
    named = [(prefix + n, p) for n, p in trainable(model).items()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in named if "lora_B" in n], "lr": 1.6e-2},
            {"params": [(n, p) for n, p in named[::-1] if "lora_B" not in n], "betas": (0.8, 0.9)},
        ],
        lr=1e-3,
    )
    take_steps(model, optimizer)
    adam, report = read(save(optimizer.state_dict(), tmp_path), model, registry(model))
    assert_attached(adam, model, optimizer)
    assert [group.lr for group in adam.groups] == [1.6e-2, 1e-3]
    assert report.route == "by name (param_names)"
    assert not report.positional
    assert report.certainty == "certain"


def test_decay_override_spares_a_group_without_decay_beside_one_with(tmp_path: Path) -> None:
    model = make_model()
    named = list(trainable(model).items())
    groups = [{"params": named[:5], "weight_decay": 0.0}, {"params": named[5:]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.2)
    take_steps(model, optimizer)
    path, overrides = save(optimizer.state_dict(), tmp_path), AdamOverrides(weight_decay=0.3)
    adam, report = read(path, model, registry(model), overrides=overrides)
    assert [group.weight_decay for group in adam.groups] == [0.0, 0.3]
    assert any(note.startswith("weight decay 0.2 in the file, 0.3") for note in report.notes)


def test_by_name_with_frozen_parameters_in_the_optimizer(tmp_path: Path) -> None:
    model = make_model()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    groups = [{"params": frozen, "lr": 1.0}, {"params": list(trainable(model).items()), "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups)
    take_steps(model, optimizer)
    path, params = save(optimizer.state_dict(), tmp_path), registry(model)
    adam, _ = read(path, model, params)
    assert_attached(adam, model, optimizer)
    adam, _ = read(path, model, params, overrides=AdamOverrides(lr=5e-3))
    assert [group.lr for group in adam.groups] == [5e-3]


def test_adam_without_decay_and_numpy_learning_rate(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.Adam(trainable(model).values())
    take_steps(model, optimizer)
    for lr in (np.float64(0.25), np.float32(0.25)):
        optimizer.param_groups[0]["lr"] = lr
        path = save(optimizer.state_dict(), tmp_path)
        adam, _ = read(path, model, registry(model))
        assert adam.groups[0].lr == 0.25
        assert type(adam.groups[0].lr) is float


def test_old_file_format(state: dict[str, Any], plain: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_attached(read(path, plain.model, plain.params)[0], plain.model, plain.optimizer)


# Steps and coverage


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7.0), torch.tensor(7), torch.tensor([7])])
def test_step_as_saved(step: object, state, plain, tmp_path: Path) -> None:
    state["state"][3]["step"] = step
    adam, _ = read(save(state, tmp_path), plain.model, plain.params)
    name = list(trainable(plain.model))[3]
    assert adam.step[name] == 7
    assert sum(adam.step.values()) == 7 + 2 * (len(adam.step) - 1)


@pytest.mark.parametrize(
    "step", [-1, 2.5, torch.tensor(2.5), float("nan"), float("inf"), True, "2", torch.ones(2)]
)
def test_step_that_counts_nothing(step: object, state, plain, tmp_path: Path) -> None:
    state["state"][3]["step"] = step
    refused(
        r"step of .* is .*, expected a whole number of at least 0", save(state, tmp_path), plain.model
    )


def test_checkpoint_step_fills_in_only_what_is_missing(state, plain, tmp_path: Path) -> None:
    del state["state"][3]["step"]
    path, name = save(state, tmp_path), list(trainable(plain.model))[3]
    adam, report = read(path, plain.model, plain.params)
    assert adam.step == dict.fromkeys((n for n in plain.params if n != name), 2)
    assert any(note.startswith("no step for 1 parameters") for note in report.notes)
    overrides = AdamOverrides(checkpoint_step=40)
    adam, report = read(path, plain.model, plain.params, overrides=overrides)
    assert adam.step == {n: 40 if n == name else 2 for n in plain.params}
    assert report.coverage["step"] == len(plain.params) - 1  # of the file
    assert any("checkpoint_step of the config, 40" in note for note in report.notes)
    for wrong in (0, -3, 1.5):
        refused("checkpoint_step is", path, plain.model, overrides=AdamOverrides(checkpoint_step=wrong))


def test_low_coverage(state, plain, tmp_path: Path) -> None:
    names = list(trainable(plain.model))
    for position in (0, 5):
        del state["state"][position]
    path = save(state, tmp_path)
    message = refused(r"exp_avg_sq 10, exp_avg 10, step 10 of 12 parameters", path, plain.model)
    assert all(names[position] in message for position in (0, 5))
    assert 'on_low_coverage = "identity"' in message
    for options in ({"min_coverage": 0.8}, {"allow_low_coverage": True}):
        adam, report = read(path, plain.model, plain.params, **options)
        assert set(adam.exp_avg) == set(adam.exp_avg_sq) == set(names) - {names[0], names[5]}
        assert report.coverage == {"exp_avg_sq": 10, "exp_avg": 10, "step": 10}
        assert set(adam.groups[0].names) == set(names)


def test_unusable_second_moments_are_passed_through_with_a_note(state, plain, tmp_path) -> None:
    state["state"][1]["exp_avg_sq"][0, 0] = -1.0
    state["state"][2]["exp_avg_sq"][0, 0] = float("nan")
    adam, report = read(save(state, tmp_path), plain.model, plain.params)
    assert "exp_avg_sq has negative or non-finite entries in 2 tensors" in report.notes
    assert sum(bool((t < 0).any()) for t in adam.exp_avg_sq.values()) == 1


# Hyper-parameters


def test_overrides_are_used_and_reported(trained: SimpleNamespace) -> None:
    path = find_state(trained.out / "checkpoint-2")
    overrides = AdamOverrides(lr=5e-5, beta2=0.999, weight_decay=0.01)
    model = trained.model
    adam, report = read(path, model, registry(model), overrides=overrides)
    assert [g.weight_decay for g in adam.groups] == [0.01, 0.0][: len(adam.groups)]
    assert {(g.lr, g.beta1, g.beta2, g.eps) for g in adam.groups} == {(5e-5, 0.9, 0.999, 1e-8)}
    told = [note for note in report.notes if "the config's is used" in note]
    assert told == [
        "beta2 0.95 in the file, 0.999 in the config: the config's is used",
        "weight decay 0.1 in the file, 0.01 in the config: the config's is used",
    ]


def test_decay_override_spares_the_no_decay_group_even_if_the_run_had_none(trained) -> None:
    path = find_state(trained.out / "checkpoint-2")
    saved = torch.load(path, weights_only=True)
    for group in saved["param_groups"]:
        group["weight_decay"] = 0.0
    model, overrides = trained.model, AdamOverrides(weight_decay=0.3)
    adam, _ = read(save(saved, trained.out), model, registry(model), overrides=overrides)
    assert [g.weight_decay for g in adam.groups] == [0.3, 0.0][: len(adam.groups)]


@pytest.mark.parametrize(
    ("rates", "initial", "expected"),
    [
        ((2e-3, 8e-3), (1.0, 1.0), (5e-3, 2e-2)),
        ((0.0, 0.0), (1e-3, 3e-3), (5e-3, 1.5e-2)),  # the end of a schedule
        ((0.0, 0.0), (1e-3, 1e-3), (5e-3, 5e-3)),
    ],
)
def test_lr_override_keeps_the_ratio_of_groups(rates, initial, expected, tmp_path: Path) -> None:
    model = make_model()
    named = list(trainable(model).items())
    groups = [{"params": named[:5]}, {"params": named[5:]}]
    optimizer = torch.optim.AdamW(groups)
    take_steps(model, optimizer)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = rates[i]
        if initial:
            group["initial_lr"] = initial[i]
    path, params = save(optimizer.state_dict(), tmp_path), registry(model)
    if any(rates) or len(set(initial)) == 1:
        adam, _ = read(path, model, params)
        assert tuple(group.lr for group in adam.groups) == rates
    else:  # 0 to 0 is no ratio, and 1 would be a wrong one
        refused("started from 0.001 and 0.003, .* set optimizer.lr", path, model)
    adam, _ = read(path, model, params, overrides=AdamOverrides(lr=5e-3))
    assert tuple(group.lr for group in adam.groups) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("rates", "initial", "match"),
    [
        ((0.0, 0.0), None, "several groups, all with lr 0 and without initial_lr"),
        ((0.0, 0.0), (0.0, 1e-3), "started from 0.0 and 0.001"),
        ((0.0, 1e-3), (0.0, 1e-3), "the first group has learning rate 0 and another does not"),
    ],
)
def test_learning_rates_without_a_ratio(rates, initial, match, tmp_path: Path) -> None:
    model = make_model()
    named = list(trainable(model).items())
    optimizer = torch.optim.AdamW([{"params": named[:5]}, {"params": named[5:]}])
    take_steps(model, optimizer)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = rates[i]
        if initial:
            group["initial_lr"] = initial[i]
    path = save(optimizer.state_dict(), tmp_path)
    refused(match, path, model, overrides=AdamOverrides(lr=1e-3))


@pytest.mark.parametrize("key", ["caution", "rectify", "nesterov", "bias_correction", "correct_bias"])
def test_settings_that_adamw_has_not(key, state, plain, tmp_path: Path) -> None:
    state["param_groups"][0][key] = True
    refused(f"a variant of AdamW, whose param_groups have {key}", save(state, tmp_path), plain.model)


def test_decay_of_a_kind_the_file_does_not_tell(state, plain, tmp_path: Path) -> None:
    del state["param_groups"][0]["decoupled_weight_decay"]
    _, report = read(save(state, tmp_path), plain.model, plain.params)
    assert any(note.startswith("warning: the file does not record whether") for note in report.notes)
    state["param_groups"][0]["decoupled_weight_decay"] = 0
    refused("inside the gradient", save(state, tmp_path), plain.model)


def test_several_optimizers_of_accelerate(state, tmp_path: Path) -> None:
    for name in ("optimizer.bin", "optimizer_1.bin"):
        torch.save(state, tmp_path / name)
    with pytest.raises(InputError, match=r"several .* \(optimizer.bin, optimizer_1.bin\)"):
        find_state(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("betas", torch.tensor([0.9, 0.999]), "betas are tensor"),
        ("lr", "0.1", r"lr is '0.1', expected a number of at least 0"),
        ("lr", -1.0, "lr is -1.0"),
        ("eps", float("nan"), "eps is nan"),
        ("eps", 10**400, "eps is 1000"),
        ("lr", torch.ones(3), "lr is tensor"),
        ("lr", torch.tensor(1j), "lr is 1j"),
        ("betas", (0.9, 1.0), "beta2 is 1.0, expected a number of at least 0 and below 1"),
        ("betas", 0.9, "betas are 0.9, expected two numbers"),
        ("weight_decay", None, "weight_decay is None"),
    ],
)
def test_hyper_parameters_that_are_none(key, value, match, state, plain, tmp_path: Path) -> None:
    state["param_groups"][0][key] = value
    refused(match, save(state, tmp_path), plain.model)
    del state["param_groups"][0][key]
    refused(f"a group without .*{key}", save(state, tmp_path), plain.model)


@pytest.mark.parametrize("key", ["amsgrad", "maximize"])
def test_flags_that_are_no_flags(key, state, plain, tmp_path: Path) -> None:
    state["param_groups"][0][key] = torch.zeros(2)
    refused(f"{key} = True", save(state, tmp_path), plain.model)


# What does not belong to this adapter


def test_another_adapters_state(state, tmp_path: Path) -> None:
    message = refused("12 tensors in groups of 12", save(state, tmp_path), make_model("norms"))
    assert "17 trainable ones (12 and 5 in the Trainer's groups)" in message
    assert "another adapter, or has another order" in message


def test_groups_of_the_right_sizes_with_decay_in_the_second(tmp_path: Path) -> None:
    model = make_model("bias")
    named = trainable(model)
    biases = [p for p in named.values() if p.ndim == 1]
    groups = [{"params": [p for p in named.values() if p.ndim == 2]}, {"params": biases}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    take_steps(model, optimizer)
    refused("groups of 12 and 6", save(optimizer.state_dict(), tmp_path), model)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    adam, _ = read(save(optimizer.state_dict(), tmp_path), model, registry(model))
    assert_attached(adam, model, optimizer)


def test_unnamed_groups(state, plain, tmp_path: Path) -> None:
    group = state["param_groups"][0]
    state["param_groups"] = [
        {**group, "params": group["params"][:7]},
        {**group, "params": group["params"][7:]},
    ]
    message = refused("groups of 7 and 5", save(state, tmp_path), plain.model)
    assert "optimizer built from named_parameters()" in message


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_shape_mismatch_names_the_parameter_and_both_shapes(key, state, plain, tmp_path) -> None:
    name = list(trainable(plain.model))[2]
    shape = tuple(plain.params[name].shape)
    state["state"][2][key] = torch.zeros(5, 2)
    message = refused(r"has shape \(5, 2\)", save(state, tmp_path), plain.model)
    assert f"{key} of {name}" in message
    assert str(shape) in message


@pytest.mark.parametrize(
    "moment", [torch.ones(2, 16, dtype=torch.int32), torch.ones(2, 16).to_sparse(), [1.0], 3]
)
def test_moment_that_is_no_float_tensor(moment, state, plain, tmp_path: Path) -> None:
    state["state"][0]["exp_avg"] = moment
    refused("not a plain floating-point tensor", save(state, tmp_path), plain.model)


def test_names_of_another_model(plain, tmp_path: Path) -> None:
    model = make_model("norms")
    optimizer = torch.optim.AdamW(trainable(model).items())
    take_steps(model, optimizer)
    saved = optimizer.state_dict()
    message = refused("state for parameters that are not trainable", save(saved, tmp_path), plain.model)
    assert "layernorm" in message
    saved["param_groups"][0]["param_names"][0] = "else\n.weight"
    refused("1 of the adapter's 17 trainable parameters", save(saved, tmp_path), model)
    saved["param_groups"][0]["param_names"][0] = saved["param_groups"][0]["param_names"][1]
    refused("occurs twice among its names", save(saved, tmp_path), model)
    saved["param_groups"][0]["param_names"].pop()
    refused("differ in length", save(saved, tmp_path), model)


def test_state_of_frozen_positions(tmp_path: Path) -> None:
    model = make_model()
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer)
    refused("not trainable: .*embed_tokens", save(optimizer.state_dict(), tmp_path), make_model())


# Other optimizers


def step_once(build: Callable[..., torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    model = make_model()
    optimizer = build(list(trainable(model).values()), **options)
    take_steps(model, optimizer, 1)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "state of SGD with momentum"),
        (torch.optim.SGD, {}, "no state: it was saved before the first step"),
        (torch.optim.Adafactor, {}, "state of Adafactor"),
        (torch.optim.NAdam, {}, "state of NAdam"),
        (torch.optim.RAdam, {}, "a variant of AdamW"),
        (torch.optim.Adamax, {}, "state of Adamax"),
        (torch.optim.RMSprop, {}, "state of RMSprop"),
        (torch.optim.Adagrad, {}, "state of Adagrad"),
        (torch.optim.Rprop, {}, "state of an unknown optimizer, with prev, step, step_size"),
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad = True"),
        (torch.optim.AdamW, {"maximize": True}, "maximize = True"),
    ],
)
def test_other_optimizers(build, options, match, plain, tmp_path: Path) -> None:
    message = refused(match, save(step_once(build, **options), tmp_path), plain.model)
    assert "train with torch.optim.AdamW, or set optimizer.rule" in message


def test_transformers_adafactor(plain, tmp_path: Path) -> None:
    saved = step_once(Adafactor, lr=1e-3, relative_step=False)
    refused("state of Adafactor", save(saved, tmp_path), plain.model)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"exp_avg": torch.ones(2, 16)}, r"Lion \(exp_avg without exp_avg_sq\)"),
        ({"exp_avg_sq": torch.ones(2, 16), "z": torch.ones(2, 16)}, "unknown optimizer, with exp_avg"),
        ({"step": 1}, "unknown optimizer, with step"),
        ({}, "no state"),
    ],
)
def test_state_keys_of_other_libraries(entry, match, state, plain, tmp_path: Path) -> None:
    state["state"] = {i: dict(entry) for i in state["state"]}
    refused(match, save(state, tmp_path), plain.model)


def test_coupled_weight_decay(plain, tmp_path: Path) -> None:
    path = save(step_once(torch.optim.Adam, weight_decay=0.1), tmp_path)
    refused("Adam with weight decay inside the gradient", path, plain.model)
    overrides = AdamOverrides(weight_decay=0.0)
    adam, _ = read(path, plain.model, plain.params, overrides=overrides)
    assert adam.groups[0].weight_decay == 0.0


# Files that are no checkpoint


class Payload(SimpleNamespace):
    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def test_code_in_the_file(state, plain, tmp_path: Path) -> None:
    payload = Payload(folder=str(tmp_path / "made"))
    state["param_groups"][0]["lr"] = payload
    refused(r"requests \w+\.mkdir, only tensors and numbers", save(state, tmp_path), plain.model)
    (tmp_path / "p.pt").write_bytes(pickle.dumps(payload))
    refused("not a plain torch checkpoint", tmp_path / "p.pt", plain.model)
    assert not (tmp_path / "made").exists()
    refused("not a plain torch checkpoint", save(plain.optimizer, tmp_path), plain.model)


def test_files_that_hold_no_optimizer(state, plain, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    refused("cannot be read: No such file", path, plain.model)
    refused("trainers write none", tmp_path, plain.model)
    for content in (b"", b"hello\n", b"PK\x03\x04 and more", b"\x80\x02", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        refused("damaged|truncated|contains", path, plain.model)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    refused("damaged, or not a torch checkpoint", path, plain.model)
    for value, match in [
        ([1, 2], "contains list"),
        ({}, "contains a dict of nothing"),
        ({"model": 1, "optimizer": state}, "contains a dict of model, optimizer"),
        ({"state": [], "param_groups": []}, "malformed"),
        ({"state": {}, "param_groups": []}, "no state"),
        ({**state, "param_groups": [3]}, "malformed"),
        ({**state, "state": {"name": {"exp_avg": 1}}}, "positions .* do not match"),
    ]:
        refused(match, save(value, tmp_path), plain.model)
    state["param_groups"][0]["params"][0] = 1
    del state["state"][0]
    refused("positions .* do not match", save(state, tmp_path), plain.model)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_give_an_input_error_or_a_whole_state(zipped, state, plain, tmp_path) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, rng, refusals = path.read_bytes(), random.Random(0), 0
    for case in range(300):
        content = bytearray(whole[: rng.randrange(len(whole))] if case % 3 == 0 else whole)
        for _ in range(3 * (case % 3)):
            content[rng.randrange(len(content) if case % 3 == 1 else 1200)] = rng.randrange(256)
        path.write_bytes(content)
        message = ""
        try:
            read(path, plain.model, plain.params)
        except InputError as error:
            message = str(error)
        refusals += bool(message)
        assert len(message.splitlines()) == bool(message)
    assert refusals > 150


# Where the file is


def test_checkpoint_folders(tmp_path: Path) -> None:
    for folder, match in [
        (tmp_path, "save_only_model = True"),
        (tmp_path / "nowhere", "not a folder"),
    ]:
        with pytest.raises(InputError, match=match) as caught:
            find_state(folder)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "optimizer.pt").touch()
    with pytest.raises(InputError, match="give checkpoint-20, which contains one"):
        find_state(tmp_path)
    assert find_state(tmp_path / "checkpoint-20").name == "optimizer.pt"
