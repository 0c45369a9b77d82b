"""DeepSpeed's universal checkpoints.

The folders are built here as DeepSpeed 0.19.8's `ds_to_universal` lays them out for ZeRO-1/2 and -3;
the slow test at the end compares with DeepSpeed itself where it is installed.
"""

import copy
import enum
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from funcprobe.adapters.optimizer import AdamOverrides, find_state, open_state, read_adam_state
from funcprobe.types import InputError
from support.optimizers import assert_attached, refused, take_steps
from support.paths import TESTS
from support.small_lora import make_model, registry, trainable


@pytest.fixture(scope="module")
def plain() -> SimpleNamespace:
    model = make_model("norms")
    named = list(trainable(model).items())
    groups = [
        {"params": [p for n, p in named if "lora" in n], "lr": 2e-3, "weight_decay": 0.1},
        {"params": [p for n, p in named if "lora" not in n], "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    take_steps(model, optimizer, 3)
    return SimpleNamespace(model=model, optimizer=optimizer)


class LossScaler:
    """DeepSpeed pickles an object of this name, and an enum, beside the hyper-parameters."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(int, enum.Enum):
    optimizer_states = 1
    weights = 3


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, plain: SimpleNamespace) -> Callable[..., Path]:
    for module, class_ in (
        ("deepspeed.runtime.fp16.loss_scaler", LossScaler),
        ("deepspeed.runtime.zero.config", ZeroStageEnum),
    ):
        monkeypatch.setattr(class_, "__module__", module)
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            made = ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, made.__name__, made)
        setattr(sys.modules[module], class_.__name__, class_)
    return lambda folder, stage=1, groups=None: universal(plain, folder, stage, groups)


def universal(plain: SimpleNamespace, folder: Path, stage: int, groups: Any) -> Path:
    """What ds_to_universal leaves in its --output_folder, and `latest_universal` beside it."""
    zero = folder / "zero"
    live = plain.optimizer.state
    for name, parameter in plain.model.named_parameters():
        if stage == 3 and not parameter.requires_grad:
            continue
        (zero / name).mkdir(parents=True)
        keys = ["fp32", "exp_avg", "exp_avg_sq"] if parameter.requires_grad else ["fp32"]
        for key in keys:
            tensor = parameter.detach() if key == "fp32" else live[parameter][key]
            content = {"cat_dim": 0, "param": tensor} if stage < 3 else tensor.flatten()
            torch.save(content, zero / name / f"{key}.pt")
        if stage < 3 and parameter.requires_grad:
            torch.save(live[parameter]["step"], zero / name / "step.pt")
    if groups is None:
        groups = copy.deepcopy(plain.optimizer.state_dict()["param_groups"])
        for i, group in enumerate(groups):
            group["params"] = [i]  # one flat partition each
    common = {"loss_scaler": LossScaler(), "zero_stage": ZeroStageEnum(stage), "param_groups": groups}
    if stage == 3:
        flat = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for i in range(len(groups))}
        common["optimizer_state_dict"] = {"state": flat, "param_groups": groups}
    torch.save(common, zero / "optimizer_state.pt")
    name_of = {id(p): name for name, p in plain.model.named_parameters()}
    shapes = [
        OrderedDict((name_of[id(p)], p.shape) for p in group["params"])
        for group in plain.optimizer.param_groups
    ]
    if len(groups) == 1:
        shapes = [OrderedDict(item for part in shapes for item in part.items())]
    file = "mp_rank_00_model_states.pt" if stage < 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    module = plain.model.state_dict()
    torch.save({"module": module, "param_shapes": shapes, "ds_version": "0.19.8"}, folder / file)
    (folder.parent / "latest_universal").write_text(folder.name, encoding="utf-8")
    return folder


def name_like(plain: SimpleNamespace, part: str) -> str:
    return next(name for name in trainable(plain.model) if part in name)


# What is read


@pytest.mark.parametrize("stage", [1, 3])
def test_universal(stage: int, write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "global_step3_universal", stage)
    params = registry(plain.model)
    assert find_state(tmp_path) == folder
    for path in (tmp_path, folder, folder / "zero"):
        adam, report = read_adam_state(path, plain.model, params)
        assert_attached(adam, plain.model, plain.optimizer)
        assert [group.lr for group in adam.groups] == [2e-3, 1e-3]
        assert report.format == "DeepSpeed universal"
        assert report.route == "by name (the file's keys)"
        assert not report.positional
        assert any("fp32.pt" in note for note in report.notes)
        assert not any("adam_w_mode" in note for note in report.notes)
    (tmp_path / "latest_universal").unlink()
    assert find_state(tmp_path) == folder


OWN_ADAM = {"lr": 2e-3, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_own_adam(stage: int, write, plain, tmp_path: Path) -> None:
    """FusedAdam and CPUAdam: no amsgrad, a step of 0 left in the group, nothing on decoupling."""
    folder = write(tmp_path / "u", stage, [OWN_ADAM | {"step": 0, "params": [0]}])
    adam, report = read_adam_state(folder, plain.model, registry(plain.model))
    assert set(adam.step.values()) == {3}
    assert [group[1:] for group in adam.groups] == [(2e-3, 0.8, 0.9, 1e-8, 0.1)]
    assert any("adam_w_mode" in note for note in report.notes)
    for file in folder.glob("mp_rank_00_model_states.pt"):  # one group needs none, but ZeRO-3
        file.unlink()
    again, _ = read_adam_state(folder, plain.model, registry(plain.model))
    assert set(again.groups[0].names) == set(adam.groups[0].names)


def test_the_groups_step_where_the_state_has_none(write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u", 1, [OWN_ADAM | {"step": 7, "params": [0]}])
    for file in folder.glob("zero/*/step.pt"):
        file.unlink()
    adam, _ = read_adam_state(folder, plain.model, registry(plain.model))
    assert set(adam.step.values()) == {7}


def test_without_hyper_parameters_the_config_is_asked(write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u")
    (folder / "zero" / "optimizer_state.pt").unlink()
    refused("a group without betas, eps, lr, weight_decay: set optimizer.betas", folder, plain.model)
    given = AdamOverrides(lr=5e-3, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.0)
    adam, _ = read_adam_state(folder, plain.model, registry(plain.model), overrides=given)
    assert [group[1:] for group in adam.groups] == [(5e-3, 0.8, 0.9, 1e-8, 0.0)]
    assert set(adam.groups[0].names) == set(registry(plain.model))


# What is refused


@pytest.mark.parametrize(
    "files",
    [
        ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"],
        [f"bf16_zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in (0, 1)],
    ],
)
def test_not_converted(files: list[str], plain, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3" / "global_step3"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(b"")
    command = (
        rf"run `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
        rf"--input_folder {folder} --output_folder {folder}_universal` and give its output"
    )
    for path in (folder, folder.parent):
        with pytest.raises(InputError, match=command) as caught:
            read_adam_state(path, plain.model, registry(plain.model))
        assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_names_its_parameter(write, plain, tmp_path: Path) -> None:
    folder, name = write(tmp_path / "u"), name_like(plain, "lora_B")
    (folder / "zero" / name / "exp_avg_sq.pt").unlink()
    refused(rf"{name} has no exp_avg_sq\.pt, but exp_avg, step", folder, plain.model)
    (folder / "zero" / name / "exp_avg.pt").unlink()
    refused(rf"{name} has no exp_avg\.pt, but step", folder, plain.model)
    (folder / "zero" / name / "step.pt").unlink()
    assert name in refused("exp_avg_sq 16, exp_avg 16", folder, plain.model, min_coverage=1.0)
    shutil.rmtree(folder / "zero" / name)
    assert name in refused("exp_avg_sq 16, exp_avg 16", folder, plain.model, min_coverage=1.0)


@pytest.mark.parametrize("stage", [1, 3])
def test_damaged_files_name_their_parameter(stage: int, write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u", stage)
    a, b = name_like(plain, "q_proj.lora_A"), name_like(plain, "down_proj.lora_A")
    file = folder / "zero" / a / "exp_avg.pt"
    other = (folder / "zero" / b / "exp_avg.pt").read_bytes()
    whole = file.read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        refused(rf"{a}/exp_avg\.pt: ", folder, plain.model)
    file.write_bytes(other)
    shape = "has shape" if stage == 1 else r"has 48 elements, its parameter has shape \(2, 16\)"
    assert a in refused(shape, folder, plain.model)
    torch.save({"other": 1}, file)
    refused(rf"zero/{a}/exp_avg\.pt contains no tensor", folder, plain.model)


def test_a_malicious_file_is_not_run(write, plain, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'made'}",)

    folder, name = write(tmp_path / "u"), name_like(plain, "lora_A")
    for file in (folder / "zero" / name / "step.pt", folder / "zero" / "optimizer_state.pt"):
        torch.save({"param": Payload()}, file)
        refused(rf"{file.name}: .* requests posix\.system", folder, plain.model)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", ["no file", "no shapes", "another's"])
def test_several_groups_need_the_models_file(damage: str, write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u")
    file = folder / "mp_rank_00_model_states.pt"
    if damage == "no file":
        file.unlink()
        said = r"has no \*_model_states\.pt"
    elif damage == "no shapes":
        torch.save({"module": {}}, file)
        said = "has no param_shapes"
    else:
        content = torch.load(file, weights_only=True)
        lost, _ = content["param_shapes"][0].popitem()
        torch.save(content, file)
        said = f"has state for {lost}, not in any group"
    refused(said, folder, plain.model)


def test_sub_groups_that_are_no_groups(write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u", 3)
    file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=True)
    content["param_shapes"].append(OrderedDict([content["param_shapes"][0].popitem()]))
    torch.save(content, file)
    refused("2 param_groups and parameters in 3 parts", folder, plain.model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bias_correction": False}, "without bias correction"),
        ({"max_coeff": 10.0}, "a variant of AdamW"),  # LAMB
        ({"amsgrad": True}, "amsgrad = True"),
    ],
)
def test_other_optimizers(change: dict[str, Any], match: str, write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u", 1, [OWN_ADAM | change | {"params": [0]}])
    refused(match, folder, plain.model)


def test_steps_that_differ(write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "u", 3)
    path = folder / "zero" / "optimizer_state.pt"
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        content = torch.load(path, weights_only=True)
    content["optimizer_state_dict"]["state"][1]["step"] = torch.tensor(4.0)
    torch.save(content, path)
    refused(r"has steps 3\.0, 4\.0, expected one", folder, plain.model)


def test_which_folder(write, plain, tmp_path: Path) -> None:
    one = write(tmp_path / "global_step3_universal")
    two = shutil.copytree(one, tmp_path / "global_step6_universal")
    (tmp_path / "global_step6").mkdir()
    (tmp_path / "global_step6" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert find_state(tmp_path) == one  # latest_universal
    (tmp_path / "latest_universal").write_text(f"{two.name}\n", encoding="utf-8")
    assert find_state(tmp_path) == two
    (tmp_path / "latest_universal").write_text("global_step9_universal", encoding="utf-8")
    refused("latest_universal: names global_step9_universal", tmp_path, plain.model)
    (tmp_path / "latest_universal").unlink()
    refused("several optimizer states", tmp_path, plain.model)
    shutil.rmtree(two)
    assert find_state(tmp_path) == one  # and not global_step6


def test_formats_are_not_taken_for_each_other(write, plain, tmp_path: Path) -> None:
    folder = write(tmp_path / "deepspeed" / "u")
    torch.save(plain.optimizer.state_dict(), tmp_path / "deepspeed" / "optimizer.pt")
    refused(r"several optimizer states \(optimizer\.pt, u\)", tmp_path / "deepspeed", plain.model)
    dcp.save(plain.optimizer.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert open_state(tmp_path / "dcp").format == "torch.distributed.checkpoint"
    for file in (tmp_path / "dcp").glob("*.distcp"):  # under the other's name
        shutil.copy(file, folder / "zero" / name_like(plain, "lora_A") / "exp_avg.pt")
    refused(r"exp_avg\.pt: ", folder, plain.model)
    shutil.copy(folder / "zero" / "optimizer_state.pt", tmp_path / "optimizer.pt")
    refused("requests deepspeed", tmp_path / "optimizer.pt", plain.model)


# DeepSpeed itself

REAL = """
import sys, torch, deepspeed
sys.path.insert(0, sys.argv[1])
from support.small_lora import make_model, trainable
deepspeed.init_distributed(dist_backend="gloo")
tokens = torch.tensor([[1, 2, 3, 4, 9]])

def build():
    model = make_model("norms")
    named = trainable(model).items()
    lora = {"params": [p for n, p in named if "lora" in n], "lr": 2e-3, "weight_decay": 0.1}
    rest = {"params": [p for n, p in named if "lora" not in n], "lr": 1e-3, "weight_decay": 0.0}
    return model, torch.optim.AdamW([lora, rest], betas=(0.8, 0.9))

model, optimizer = build()
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": int(sys.argv[3])},
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False})
for _ in range(3):
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
engine.save_checkpoint(sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_itself(stage: int, plain, tmp_path: Path) -> None:
    """Equal up to how ZeRO-3 sums: relative 1e-5 is 100 float32 roundings."""
    pytest.importorskip("deepspeed")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | rank | {"MASTER_PORT": "29731", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", REAL, str(TESTS), str(tmp_path), str(stage)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    with pytest.raises(InputError, match="run `python -m deepspeed") as caught:
        read_adam_state(tmp_path, plain.model, registry(plain.model))
    told = str(caught.value).split("`")[1].split()
    subprocess.run([sys.executable, *told[1:]], env=environment, check=True, timeout=300)
    adam, report = read_adam_state(tmp_path, plain.model, registry(plain.model))
    assert report.path == tmp_path / "global_step3_universal"
    assert set(adam.step.values()) == {3}
    assert [(len(g.names), *g[1:]) for g in adam.groups] == [
        (12, 2e-3, 0.8, 0.9, 1e-8, 0.1),
        (5, 1e-3, 0.8, 0.9, 1e-8, 0.0),
    ]
    for name, parameter in trainable(plain.model).items():
        for key in ("exp_avg", "exp_avg_sq"):
            live = plain.optimizer.state[parameter][key]
            error = (getattr(adam, key)[name] - live).abs().max()
            assert error <= (0 if stage == 1 else 1e-5) * live.abs().max()
