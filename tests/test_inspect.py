"""`funcprobe inspect`: what it says of a state, against what the state was made of."""

import json
import re
import shutil

import pytest
import torch

from funcprobe.adapters.checkpoint.skeleton import skeleton
from support.checkpoints import edit_json
from support.sidecars import sidecar_of


def edit(checkpoint, change) -> None:
    path = checkpoint.adapter / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_json(command, checkpoint) -> None:
    done = command("inspect", checkpoint.adapter, "--json")
    assert done.status == 0
    found = json.loads(done.out)
    state = torch.load(checkpoint.adapter / "optimizer.pt", weights_only=True)
    count = len(state["state"])
    assert found["format"] == "Hugging Face Trainer"
    assert found["path"] == str(checkpoint.adapter / "optimizer.pt")
    assert [g["parameters"] for g in found["groups"]] == [count, 0]
    assert [g["with_state"] for g in found["groups"]] == [count, 0]
    assert found["groups"][0]["lr"] == 1e-3
    assert found["groups"][0]["betas"] == [0.9, 0.999]
    assert found["groups"][0]["weight_decay"] == 0.01
    assert found["tensors_with_state"] == count
    assert found["steps"] == {"least": 2, "most": 2, "known": count}
    names = found["names"]
    assert names["route"] == "by position, the Trainer's [decay, no-decay] grouping replayed"
    assert names["certainty"].startswith(f"not verifiable from the file alone, {count} of {count}")
    assert names["verified_by_gradients"] is True
    assert names["coverage"] == {"exp_avg_sq": count, "exp_avg": count, "step": count}
    assert len(names["groups"][0]) == count
    assert all(".default.weight" in name for name in names["groups"][0])
    # C5, by hand
    root = [(e["exp_avg_sq"].double() / (1 - 0.999**2)).sqrt() + 1e-8 for e in state["state"].values()]
    least = min(float(r.min()) for r in root)
    assert found["second_moments"]["min_denominator"] == pytest.approx(least, rel=1e-12)
    assert found["second_moments"]["max_scale"] == pytest.approx(1 / least, rel=1e-12)
    assert found["second_moments"]["zero_second_moments"] == sum(
        int((e["exp_avg_sq"] == 0).sum()) for e in state["state"].values()
    )
    missing = " ".join(found["missing"])
    assert "trainer_state.json" in missing
    assert "optimizer_param_names.json" in missing


def test_for_a_reader(command, checkpoint) -> None:
    done = command("inspect", checkpoint.adapter / "optimizer.pt")
    assert done.status == 0
    for part in (
        "Hugging Face Trainer",
        "grouping replayed",
        "a run verifies the order by the gradients on U",
        "steps taken",
        "0.001",
        "[0.9, 0.999]",
        "largest",
        "missing: optimizer_param_names.json",
    ):
        assert part in done.out, part


def test_names_of_the_skeleton_are_those_of_the_model(checkpoint) -> None:
    from funcprobe.adapters.checkpoint.model import load_policy
    from funcprobe.adapters.config.schema import PolicyConfig

    policy = load_policy(PolicyConfig(checkpoint=str(checkpoint.adapter)), torch.device("cpu"))
    bones = skeleton(checkpoint.adapter, None, "default")
    assert {n: t.shape for n, t in bones.params.items()} == {
        n: t.shape for n, t in policy.params.items()
    }
    names = [name for name, _ in bones.model.named_parameters()]
    assert names == [name for name, _ in policy.model.named_parameters()]
    assert {p.device.type for p in bones.model.parameters()} == {"meta"}


def test_a_state_alone(command, checkpoint, tmp_path) -> None:
    shutil.copy(checkpoint.adapter / "optimizer.pt", tmp_path / "optimizer.pt")
    found = json.loads(command("inspect", tmp_path / "optimizer.pt", "--json").out)
    assert found["names"] is None
    assert found["second_moments"] is None
    assert any("positions only" in line for line in found["missing"])
    assert found["steps"]["most"] == 2
    shown = command("inspect", tmp_path / "optimizer.pt")
    assert "missing: names: the state has positions only" in shown.out


def test_names_that_are_saved_need_no_adapter(command, tmp_path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = json.loads(command("inspect", tmp_path / "optimizer.pt", "--json").out)
    assert found["names"]["certainty"] == "certain"
    assert found["names"]["groups"] == [["weight", "bias"]]
    assert found["names"]["coverage"]["exp_avg_sq"] == 2


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_one_moment_names_a_parameter(moment, command, tmp_path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0][moment] = None
    torch.save(state, tmp_path / "optimizer.pt")
    done = command("inspect", tmp_path / "optimizer.pt", "--json")
    assert done.status == 0, done.err
    coverage = json.loads(done.out)["names"]["coverage"]
    assert coverage == {"exp_avg": 2, "exp_avg_sq": 2, "step": 2} | {moment: 1}


@pytest.mark.parametrize(
    ("rates", "initial", "line"),
    [
        ((0.0, 0.0), (1e-3, 3e-3), "started from 0.001 and 0.003, .* set optimizer.lr"),
        ((0.0, 0.0), None, "without initial_lr"),
        ((0.0, 0.0), (1e-3, 1e-3), None),
        ((1e-3, 2e-3), (1e-3, 3e-3), None),
    ],
)
def test_a_ratio_of_learning_rates_that_is_not_known_is_missing(
    rates, initial, line, command, tmp_path
) -> None:
    """All the rest is shown, and a config, of which there is none, is not spoken of."""
    model = torch.nn.Linear(3, 2)
    groups = [{"params": [pair], "lr": 1.0} for pair in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for i, group in enumerate(optimizer.param_groups):
        group.update({"lr": rates[i]} | ({"initial_lr": initial[i]} if initial else {}))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = json.loads(command("inspect", tmp_path / "optimizer.pt", "--json").out)
    said = [text for text in found["missing"] if text.startswith("the next step's lr: ")]
    assert len(said) == (line is not None)
    assert line is None or re.search(line, said[0])
    assert found["second_moments"] is not None
    assert [group["lr"] for group in found["groups"]] == list(rates)
    assert not any("config" in note for note in found["notes"])


def test_sidecar_and_trainer_state(command, damaged) -> None:
    model = skeleton(damaged.adapter, None, "default").model
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trainable}, {"params": []}]
    sidecar = sidecar_of(torch.optim.AdamW(groups), model)
    (damaged.adapter / "optimizer_param_names.json").write_text(json.dumps(sidecar))
    (damaged.adapter / "trainer_state.json").write_text('{"global_step": 7}')
    done = command("inspect", damaged.adapter)
    assert "by name (optimizer_param_names.json)" in done.out
    assert "WARNING: trainer_state.json records 7" in done.out
    assert "loss_type grpo" in done.out
    assert "temperature 0.9" in done.out
    found = json.loads(command("inspect", damaged.adapter, "--json").out)
    assert found["missing"] == []
    assert found["sidecar"]["max_grad_norm"] == 0.3
    (damaged.adapter / "trainer_state.json").write_text("{}")
    assert "has no global_step" in command("inspect", damaged.adapter).err


def test_what_json_has_not(command, damaged) -> None:
    def spoil(state) -> None:
        state["param_groups"][0].update(
            betas=(torch.tensor(0.9), torch.tensor(0.999)), eps=0.0, swa_lr=float("nan"), name=b"x"
        )
        state["state"][0]["exp_avg_sq"][0, 0] = 0.0

    edit(damaged, spoil)
    done = command("inspect", damaged.adapter, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["groups"][0]["betas"] == [pytest.approx(0.9), pytest.approx(0.999)]
    assert found["groups"][0]["swa_lr"] == "nan"
    assert found["second_moments"]["max_scale"] == "inf"
    assert command("inspect", damaged.adapter).status == 0


def test_a_base_out_of_reach_takes_only_the_registry(command, damaged) -> None:
    edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path="/nowhere/base")
    found = json.loads(command("inspect", damaged.adapter, "--json").out)
    assert any("/nowhere/base" in line for line in found["missing"])
    assert found["names"] is None
    for changes in ({"hidden_size": -16}, {"pad_token_id": 99}):
        edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path=str(damaged.base))
        edit_json(damaged.base / "config.json", **changes)
        done = command("inspect", damaged.adapter, "--base", damaged.base)
        assert done.status == 2
        assert "cannot be built from the configuration of base" in done.err


def test_the_state_beside_is_not_anothers(command, damaged) -> None:
    (damaged.adapter / "ref").mkdir()
    shutil.copy(damaged.adapter / "adapter_config.json", damaged.adapter / "ref")
    found = json.loads(command("inspect", damaged.adapter, "--adapter", "ref", "--json").out)
    assert any(
        "belongs to the adapter in that folder, not to ref/" in line for line in found["missing"]
    )


def test_hyper_parameters_that_are_not_saved_are_missing(command, damaged) -> None:
    edit(damaged, lambda state: [g.pop("betas") for g in state["param_groups"]])
    found = json.loads(command("inspect", damaged.adapter, "--json").out)
    assert any("set optimizer.betas" in line for line in found["missing"])
    assert found["second_moments"] is None
    assert not any("config" in note for note in found["notes"])
    assert found["names"]["coverage"]["exp_avg"] == found["names"]["parameters"]


def test_verdicts(command, damaged) -> None:
    def spoil(state) -> None:
        state["state"][0]["exp_avg_sq"].zero_()
        state["state"][1]["exp_avg_sq"][0, 0] = 1e-30
        del state["state"][2]["step"]

    edit(damaged, spoil)
    found = json.loads(command("inspect", damaged.adapter, "--json").out)
    verdict = found["second_moments"]["verdict"]
    assert "1 tensors without a usable second moment" in verdict
    assert "1 without a step" in verdict
    assert found["second_moments"]["tiny_second_moments"] == 1
    assert found["names"]["coverage"]["step"] == found["names"]["parameters"] - 1


def test_healthy_state_is_said_to_be(command, damaged) -> None:
    edit(damaged, lambda state: [e["exp_avg_sq"].fill_(1.0) for e in state["state"].values()])
    assert "healthy" in command("inspect", damaged.adapter).out
    # sqrt(nu_hat) of 1e-18 after two steps is 2e-8, and of 1e-19 7e-9, below eps = 1e-8
    for nu, suspect in ((1e-18, False), (1e-19, True)):
        edit(damaged, lambda state, nu=nu: [e["exp_avg_sq"].fill_(nu) for e in state["state"].values()])
        assert ("suspect: sqrt(nu) is below eps" in command("inspect", damaged.adapter).out) == suspect


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: state["state"].clear(), "no state: it was saved before the first step"),
        (lambda state: state["param_groups"][0].update(amsgrad=True), "amsgrad = True"),
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(1, 1)), "has shape (1, 1)"),
        (lambda state: state["state"][0].update(step=-1), "step of 0 is -1"),
        (
            lambda state: state["param_groups"].append({**state["param_groups"][1]}),
            "groups of 12 and 0 and 0",
        ),
    ],
)
def test_refusals(command, damaged, change, line) -> None:
    edit(damaged, change)
    done = command("inspect", damaged.adapter)
    assert done.status == 2
    assert len(done.err.strip().splitlines()) == 1
    assert line in done.err
    assert not done.out


def test_bad_places(command, checkpoint, damaged, tmp_path) -> None:
    for arguments, line in [
        ((tmp_path / "nowhere",), "no such file or folder"),
        ((tmp_path,), "no optimizer state"),
        ((checkpoint.adapter, "--base", tmp_path), "cannot be built from the configuration of base"),
        ((checkpoint.adapter / "adapter_config.json",), "not a plain torch checkpoint"),
    ]:
        done = command("inspect", *arguments)
        assert done.status == 2, arguments
        assert len(done.err.strip().splitlines()) == 1
        assert line in done.err
