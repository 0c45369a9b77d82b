"""Names of positions: replays, sidecars, and what happens where nothing can show the order."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from funcprobe.adapters.optimizer import AdamOverrides, find_sidecar, live_adam_state, read_adam_state
from funcprobe.types import InputError
from support.optimizers import assert_attached, take_steps
from support.sidecars import sidecar_of
from support.small_lora import make_model, registry, trainable, trainer_run


def unique_shapes() -> torch.nn.Module:
    """A policy whose trainable tensors all differ in shape: positions can be verified."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    lora = LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    model = get_peft_model(base, lora)
    drop = [n for n, p in model.named_parameters() if "c_fc.lora_A" in n]  # of c_attn's shape
    dict(model.named_parameters())[drop[0]].requires_grad_(False)
    return model


MODELS = {"twins": make_model, "unique": unique_shapes}


def stepped(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-3, **options)
    take_steps(model, optimizer)
    return optimizer


@pytest.fixture(scope="module")
def saved() -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
    return {key: (model := make(), stepped(model)) for key, make in MODELS.items()}


def write(folder: Path, state: object, sidecar: object = None) -> Path:
    torch.save(state, folder / "optimizer.pt")
    if sidecar is not None:
        (folder / "optimizer_param_names.json").write_text(json.dumps(sidecar), encoding="utf-8")
    return folder / "optimizer.pt"


# Any permutation is detected, or said to be beyond detection and refused until it is accepted


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("which", sorted(MODELS))
@pytest.mark.parametrize("where", ["state", "params"])
def test_permuted_positions_are_detected_or_need_to_be_accepted(saved, which, where, data) -> None:
    model, optimizer = saved[which]
    params, content = registry(model), optimizer.state_dict()
    order = data.draw(st.permutations(range(len(content["state"]))))
    shuffled = copy.deepcopy(content)
    if where == "state":  # entries under other positions
        shuffled["state"] = {i: content["state"][j] for i, j in enumerate(order)}
    else:  # positions in another order in their group
        shuffled["param_groups"][0]["params"] = list(order)
    shape = [tuple(content["state"][i]["exp_avg"].shape) for i in range(len(order))]
    same = all(shape[i] == shape[j] for i, j in enumerate(order))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), shuffled)
        if not same:
            for accept in (False, True):
                with pytest.raises(InputError, match="in another order") as caught:
                    read_adam_state(path, model, params, accept_positional=accept)
                assert any(name in str(caught.value) for name in params)
        elif which == "twins":
            with pytest.raises(InputError, match=r"by position, .* not verifiable: 12 of 12") as caught:
                read_adam_state(path, model, params)
            assert "funcprobe.state_evidence" in str(caught.value)
            _, report = read_adam_state(path, model, params, accept_positional=True)
            assert report.positional
            assert (
                report.certainty
                == "not verifiable from the file alone, 12 of 12 share their shape with another"
            )
        else:  # the identity is the one permutation that shapes allow
            assert list(order) == sorted(order)
            adam, report = read_adam_state(path, model, params)
            assert_attached(adam, model, optimizer)
            assert (report.twins, report.certainty) == (0, "verified, every shape is unique")


# Replays


def test_loraplus_groups(tmp_path: Path) -> None:
    model = make_model("norms")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    take_steps(model, optimizer)
    path = write(tmp_path, optimizer.state_dict())
    adam, report = read_adam_state(path, model, registry(model), accept_positional=True)
    assert_attached(adam, model, optimizer)
    assert report.route == "by position, peft's LoRA+ groups replayed"
    assert {group.lr for group in adam.groups} == {1e-3, 1.6e-2}


def test_all_parameters_in_two_groups(tmp_path: Path) -> None:
    model = make_model("norms")
    decay = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decay], "weight_decay": 0.1},
        {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    take_steps(model, optimizer)
    path = write(tmp_path, optimizer.state_dict())
    adam, report = read_adam_state(path, model, registry(model), accept_positional=True)
    assert_attached(adam, model, optimizer)
    assert report.route == "by position, all parameters in [decay, no-decay] groups"


def test_an_order_of_their_own_is_explained(tmp_path: Path) -> None:
    model = make_model()
    backwards = dict(reversed(trainable(model).items()))
    optimizer = torch.optim.AdamW(backwards.values())
    take_steps(model, optimizer)
    path = write(tmp_path, optimizer.state_dict())
    with pytest.raises(InputError, match="not built in the order of named_parameters") as caught:
        read_adam_state(path, model, registry(model), accept_positional=True)
    assert "ParamNamesCallback" in str(caught.value)


# The sidecar


@pytest.fixture(scope="module")
def backwards() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Built in an order that no replay finds."""
    model = make_model("norms")
    named = list(trainable(model).items())[::-1]
    groups = [{"params": [p for _, p in named[:7]]}, {"params": [p for _, p in named[7:]], "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups)
    take_steps(model, optimizer)
    return model, optimizer


def test_sidecar(backwards, tmp_path: Path) -> None:
    model, optimizer = backwards
    path = write(tmp_path, optimizer.state_dict(), sidecar_of(optimizer, model))
    adam, report = read_adam_state(path, model, registry(model))
    assert_attached(adam, model, optimizer)
    assert report.route == "by name (optimizer_param_names.json)"
    assert report.certainty == "certain"
    assert report.sidecar is not None
    assert report.sidecar.max_grad_norm == 0.3
    assert report.sidecar.loss == {"loss_type": "grpo"}
    assert report.sidecar.sampling == {"temperature": 0.9}
    assert report.document()["sidecar"].endswith("optimizer_param_names.json")
    json.dumps(report.document())


@pytest.mark.parametrize("form", ["flat", "groups", "param_names", "param_name_groups", "prefixed"])
def test_sidecars_of_other_projects(form, backwards, tmp_path: Path) -> None:
    model, optimizer = backwards
    groups = [group["names"] for group in sidecar_of(optimizer, model)["groups"]]
    flat = [name for names in groups for name in names]
    forms = {
        "flat": flat,
        "groups": groups,
        "param_names": {"param_names": flat},
        "param_name_groups": {"schema_version": 1, "param_name_groups": groups},
        "prefixed": [f"module._orig_mod.{name}" for name in flat],
    }
    path = write(tmp_path, optimizer.state_dict(), forms[form])
    adam, report = read_adam_state(path, model, registry(model))
    assert_attached(adam, model, optimizer)
    assert report.certainty == "certain"


def test_sidecars_that_do_not_fit(backwards, tmp_path: Path) -> None:
    model, optimizer = backwards
    good = sidecar_of(optimizer, model)
    names = good["groups"][0]["names"]

    def refused(match: str, sidecar: object, state: object = None) -> str:
        path = write(tmp_path, state or optimizer.state_dict(), sidecar)
        with pytest.raises(InputError, match=match) as caught:
            read_adam_state(path, model, registry(model))
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert message.startswith(str(tmp_path))
        return message

    def changed(**group: Any) -> dict[str, Any]:
        return good | {"groups": [good["groups"][0] | group, good["groups"][1]]}

    fewer = {"names": names[1:], "shapes": good["groups"][0]["shapes"][1:]}
    refused("has groups of 6 and 10 parameters, the state has 7 and 10", changed(**fewer))
    refused("has groups of 2 parameters", ["a", "b"])
    swapped = [names[-1], *names[1:-1], names[0]]
    assert good["groups"][0]["shapes"][0] != good["groups"][0]["shapes"][-1]
    message = refused(r"has shape .*, the adapter's", changed(names=swapped))
    assert names[0] in message or names[-1] in message
    shapes = [[9, 9], *good["groups"][0]["shapes"][1:]]
    message = refused(r"shape \(9, 9\), position 0 of the state", changed(shapes=shapes))
    assert names[0] in message
    refused("does not have one shape for each name", changed(shapes=shapes[1:]))
    other = copy.deepcopy(optimizer.state_dict())
    other["state"][0]["exp_avg"] = None  # exp_avg_sq has the shape, too
    refused(r"shape \(9, 9\), position 0 of the state", changed(shapes=shapes), other)
    refused("lists .* twice", changed(names=[names[1], *names[1:]]))
    refused("has version 2, expected 1", good | {"version": 2})
    refused("max_grad_norm is 'x', expected float", good | {"max_grad_norm": "x"})
    refused("max_grad_norm is -1", good | {"max_grad_norm": -1})
    refused("cannot be read as JSON", good | {"max_grad_norm": float("nan")})
    refused("max_grad_norm is 1000", good | {"max_grad_norm": 10**400})
    refused("max_grad_norm is True", good | {"max_grad_norm": True})
    refused("contains no lists of names", {"something": "else"})
    refused("contains no lists of names", [1, 2])
    refused("contains no lists of names", [])
    refused("trainable parameters are not among", changed(names=["x", *names[1:]]))
    for text in ("{", "\x00"):
        path = write(tmp_path, optimizer.state_dict())
        path.with_name("optimizer_param_names.json").write_text(text)
        with pytest.raises(InputError, match="cannot be read as JSON"):
            find_sidecar(path)


def test_a_flat_list_is_cut_into_the_states_groups_and_no_more(backwards, tmp_path: Path) -> None:
    model, optimizer = backwards
    good = sidecar_of(optimizer, model)
    names, shapes = (
        [item for group in good["groups"] for item in group[key]] for key in ("names", "shapes")
    )
    one = good | {"groups": [{"names": names, "shapes": shapes}]}
    adam, _ = read_adam_state(write(tmp_path, optimizer.state_dict(), one), model, registry(model))
    assert_attached(adam, model, optimizer)
    for wrong in (names[1:], [*names, "one.more"]):
        path = write(tmp_path, optimizer.state_dict(), wrong)
        with pytest.raises(InputError, match=f"has groups of {len(wrong)} parameters"):
            read_adam_state(path, model, registry(model))


def test_a_sidecar_of_another_run_beside_names_in_the_state(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model).items())
    take_steps(model, optimizer)
    path = write(tmp_path, optimizer.state_dict(), sidecar_of(optimizer, model))
    assert read_adam_state(path, model, registry(model))[1].route == "by name (param_names)"
    path = write(tmp_path, optimizer.state_dict(), ["x", *list(trainable(model))[1:]])
    with pytest.raises(InputError, match=r"names in the state differ, .* delete it"):
        read_adam_state(path, model, registry(model))


def test_decay_override_spares_the_same_groups_on_every_route(tmp_path: Path) -> None:
    model = make_model("norms")
    decay = set(Trainer.get_decay_parameter_names(None, model))
    named = list(trainable(model).items())
    groups = [
        {"params": [p for n, p in named if n in decay], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    take_steps(model, optimizer)
    for sidecar in (None, sidecar_of(optimizer, model)):
        path = write(tmp_path, optimizer.state_dict(), sidecar)
        adam, _ = read_adam_state(
            path,
            model,
            registry(model),
            overrides=AdamOverrides(weight_decay=0.1),
            accept_positional=True,
        )
        assert [group.weight_decay for group in adam.groups] == [0.1, 0.0]


def test_entries_in_another_order_in_the_file(saved, tmp_path: Path) -> None:
    model, optimizer = saved["twins"]
    content = optimizer.state_dict()
    content["state"] = dict(reversed(content["state"].items()))
    path = write(tmp_path, content)
    adam, _ = read_adam_state(path, model, registry(model), accept_positional=True)
    assert_attached(adam, model, optimizer)


def test_some_twins_are_enough_to_be_asked(tmp_path: Path) -> None:
    model = unique_shapes()
    name = next(n for n, _ in model.named_parameters() if "c_fc.lora_A" in n)
    dict(model.named_parameters())[name].requires_grad_(True)  # of the shape of c_attn's
    path = write(tmp_path, stepped(model).state_dict())
    with pytest.raises(InputError, match="not verifiable: 2 of 4"):
        read_adam_state(path, model, registry(model))


# Of an optimizer in use


def test_live_state_is_a_copy_named_by_identity(backwards) -> None:
    model, optimizer = backwards
    adam, report = live_adam_state(optimizer, model, registry(model))
    assert_attached(adam, model, optimizer)
    assert report.certainty == "certain"
    name, before = next((n, t.clone()) for n, t in adam.exp_avg.items())
    take_steps(model, optimizer, 1)
    assert torch.equal(adam.exp_avg[name], before)
    assert not torch.equal(optimizer.state[trainable(model)[name]]["exp_avg"], before)


def test_live_state_of_another_model(backwards) -> None:
    _, optimizer = backwards
    other = make_model("norms")
    with pytest.raises(InputError, match="17 of the optimizer's parameters are not the model's"):
        live_adam_state(optimizer, other, registry(other))
    sgd = torch.optim.SGD(trainable(other).values(), momentum=0.9)
    take_steps(other, sgd)
    with pytest.raises(InputError, match="SGD with momentum"):
        live_adam_state(sgd, other, registry(other))


@pytest.mark.parametrize(
    ("rates", "initial", "found"),
    [
        ((0.0, 0.0), (8e-3, 1e-3), (8e-3, 1e-3)),  # a warm-up begins
        ((0.0, 0.0), (8e-3, 0.0), (8e-3, 0.0)),
        ((4e-3, 0.0), (8e-3, 1e-3), (4e-3, 0.0)),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        (
            (0.0, 0.0),
            (0.0, 1e-3),
            "the first group of the optimizer has learning rate 0 and another does not",
        ),
        ((0.0, 1e-3), (8e-3, 1e-3), "place a group with a learning rate above 0 first"),
        ((0.0, 0.0), (8e-3, None), "all with lr 0 and without initial_lr"),
    ],
)
def test_live_learning_rates_are_those_that_have_a_ratio(rates, initial, found) -> None:
    """None of the refusals says optimizer.lr, which a trainer's probe does not take."""
    model = make_model()
    named = list(trainable(model).values())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = [{"params": frozen, "lr": 1.0}, {"params": named[5:]}, {"params": named[:5]}]
    optimizer = torch.optim.AdamW(groups)  # the first is not of the registry
    take_steps(model, optimizer, 1)
    for group, now, start in zip(optimizer.param_groups[1:], rates, initial, strict=True):
        group["lr"] = now
        if start is not None:
            group["initial_lr"] = start
    if isinstance(found, str):
        with pytest.raises(InputError, match=found) as caught:
            live_adam_state(optimizer, model, registry(model))
        assert "optimizer.lr" not in str(caught.value)
    else:
        adam, _ = live_adam_state(optimizer, model, registry(model))
        assert tuple(group.lr for group in adam.groups) == found


def test_the_trainers_own_checkpoint_with_a_sidecar_needs_no_acceptance(tmp_path: Path) -> None:
    model = make_model()
    live = trainer_run(model, tmp_path, steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    sidecar = checkpoint / "optimizer_param_names.json"
    sidecar.write_text(json.dumps(sidecar_of(live, model)))
    adam, report = read_adam_state(checkpoint, model, registry(model))
    assert_attached(adam, model, live)
    assert report.certainty == "certain"
    sidecar.unlink()
    with pytest.raises(InputError, match="accept_positional"):
        read_adam_state(checkpoint, model, registry(model))
