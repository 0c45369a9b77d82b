"""`funcprobe sweep`: runs as by themselves, the base loaded once, what is kept, what is refused."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from funcprobe.adapters import run as run_module
from funcprobe.adapters import sweep as sweep_module
from funcprobe.adapters.checkpoint import resident as resident_module
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.checkpoint.resident import Resident
from funcprobe.adapters.config.policy import PolicyConfig
from funcprobe.adapters.results import load_comparison
from funcprobe.types import InputError
from support.checkpoints import Checkpoint, edit_json, sets

pytestmark = pytest.mark.usefixtures("offline")

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


class Training(NamedTuple):
    folder: Path
    settings: dict[str, Any]

    def at(self, step: int | str) -> Path:
        return self.folder / f"checkpoint-{step}"


def trained(checkpoint: Checkpoint, folder: Path, *steps: int | str) -> Training:
    """Checkpoints of one base: the fixture's adapter, each time with other weights."""
    generator = torch.Generator().manual_seed(7)
    for step in steps:
        place = folder / f"checkpoint-{step}"
        shutil.copytree(checkpoint.adapter, place)
        weights = load_file(place / WEIGHTS)
        moved = {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in weights.items()}
        save_file(moved, place / WEIGHTS, {"format": "pt"})
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    settings = checkpoint.settings() | {"measure.etas": [1e-4], "run.name": "t", "run.report": False}
    del settings["policy.checkpoint"]
    return Training(folder, settings)


@pytest.fixture
def training(checkpoint, tmp_path) -> Training:
    return trained(checkpoint, tmp_path / "out", 10, 2)


@pytest.fixture
def sweep(command, training):
    Path("c.toml").touch()

    def call(*flags: str, glob: str | None = None, **changes: Any):
        pattern = glob or f"{training.folder}/checkpoint-*"
        given = training.settings | {key.replace("__", "."): value for key, value in changes.items()}
        return command("sweep", "c.toml", "--checkpoints", pattern, *sets(given), *flags)

    return call


def numbers(folder: Path) -> dict[str, Any]:
    """results.json without what a run took."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del found["cost"]
    return found


def loads(monkeypatch) -> list[str]:
    """Names of the checkpoints that are loaded with a base from here on."""
    seen: list[str] = []

    def counted(config: PolicyConfig, device: torch.device):
        seen.append(Path(config.checkpoint).name)
        return load_policy(config, device)

    monkeypatch.setattr(resident_module, "load_policy", counted)
    return seen


@pytest.mark.slow
def test_each_run_is_bit_for_bit_that_of_the_checkpoint_alone(
    sweep, training, command, monkeypatch
) -> None:
    seen = loads(monkeypatch)
    outcome = sweep()
    assert (outcome.status, seen) == (0, ["checkpoint-2"])
    assert [p.name for p in sorted(Path("runs").glob("t-*"))] == ["t-10", "t-2"]
    found = {}
    for step in (2, 10):
        given = training.settings | {"run.folder": "alone", "run.name": f"t-{step}"}
        given["policy.checkpoint"] = str(training.at(step))
        assert command("run", "c.toml", *sets(given)).status == 0
        swept, alone = Path(f"runs/t-{step}"), Path(f"alone/t-{step}")
        found[step] = numbers(swept)
        assert found[step] == numbers(alone)
        for name in ("direction.safetensors", "rollouts/eval.parquet", "sequences.parquet"):
            assert (swept / name).read_bytes() == (alone / name).read_bytes()
        inputs = [json.loads((p / "manifest.json").read_text())["inputs"] for p in (swept, alone)]
        assert inputs[0] == inputs[1]
        assert str(training.at(step)) in (swept / "run.log").read_text()
    assert len({one["entropy"]["value"] for one in found.values()}) == 2  # other weights, other numbers


@pytest.mark.slow
def test_progress_is_a_line_a_checkpoint_in_the_order_of_steps(sweep) -> None:
    outcome = sweep()
    lines = [line for line in outcome.err.splitlines() if line.startswith("checkpoint-")]
    runs = [re.match(r"(checkpoint-\d+) \((\d) of 2\): entropy", line) for line in lines]
    assert [m.groups() for m in runs if m] == [
        ("checkpoint-2", "1"),
        ("checkpoint-10", "2"),
    ]
    compared = load_comparison("runs/t.compare.json")
    assert [run.step for run in compared.runs] == [2, 10]
    assert Path("runs/t.compare.html").is_file()
    assert "Entropy, nats per token" in outcome.out
    warnings = [line for line in lines if "warning: " in line]
    assert warnings  # of the first
    assert len(warnings) == len(set(warnings))
    assert not [line for line in outcome.err.splitlines() if line.startswith("sample E")]


@pytest.mark.slow
def test_finished_runs_are_kept_until_something_differs(sweep, training) -> None:
    assert sweep().status == 0

    def stamps() -> dict[str, int]:
        return {p.parent.name: p.stat().st_mtime_ns for p in Path("runs").glob("t-*/results.json")}

    first = stamps()
    outcome = sweep()
    assert stamps() == first
    assert outcome.err.count("as before") == 2
    # Other weights in one checkpoint, and no other.
    path = training.at(2) / WEIGHTS
    save_file({k: 1.1 * t for k, t in load_file(path).items()}, path, {"format": "pt"})
    sweep()
    second = stamps()
    assert {name for name in first if second[name] != first[name]} == {"t-2"}
    sweep(sampling__B_E=10)  # another configuration
    third = stamps()
    assert all(third[name] != second[name] for name in first)
    sweep("--fresh", sampling__B_E=10)
    assert all(stamps()[name] != third[name] for name in first)


@pytest.mark.slow
def test_an_interruption_leaves_finished_runs(sweep, monkeypatch) -> None:
    whole = run_module.probe
    count = 0

    def interrupted(*args: Any, **kwargs: Any):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(run_module, "probe", interrupted)
    assert sweep().status == 130
    assert [p.name for p in Path("runs").iterdir() if p.name != ".stages"] == ["t-2"]
    outcome = sweep()
    assert outcome.status == 0
    assert outcome.err.count("as before") == 1


def test_a_damaged_checkpoint_is_named_and_the_others_are_run(sweep, training, monkeypatch) -> None:
    shutil.copytree(training.at(2), training.at(3))
    (training.at(3) / WEIGHTS).write_bytes(b"no tensors")
    seen = loads(monkeypatch)
    outcome = sweep()
    assert outcome.status == 2
    assert seen == ["checkpoint-2"]  # what could not be read left the base as it was
    *_, last = outcome.err.splitlines()
    assert last.startswith(f"funcprobe: {training.at(3)} failed: ")
    assert "copy it again" in last
    assert sorted(p.name for p in Path("runs").glob("t-*/")) == ["t-10", "t-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory. Tried"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyError("lora_A"), "KeyError: 'lora_A' (funcprobe run on this checkpoint alone shows where)"),
    ],
)
def test_whatever_fails_at_one_checkpoint_the_others_are_run(
    error, said, checkpoint, command, tmp_path, monkeypatch
) -> None:
    """Said at its place and at the end; the others are as without it; the next sweep has it alone."""
    training = trained(checkpoint, tmp_path / "out", 1, 2, 3)
    Path("c.toml").touch()
    whole, count = run_module.measure_sweep, []

    def second_fails(*args: Any, **kwargs: Any):
        count.append(1)
        if len(count) == 2:
            raise error
        return whole(*args, **kwargs)

    given = ("sweep", "c.toml", "--checkpoints", f"{training.folder}/checkpoint-*")
    seen = loads(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure_sweep", second_fails)
        outcome = command(*given, *sets(training.settings))
    assert outcome.status == 2
    lines = outcome.err.splitlines()
    assert lines[-1].startswith(f"funcprobe: {training.at(2)} failed: {said}")
    assert sum(line.startswith(f"checkpoint-2 (2 of 3): failed: {said}") for line in lines) == 1
    assert sorted(p.name for p in Path("runs").glob("t-*/")) == ["t-1", "t-3"]
    assert seen == ["checkpoint-1", "checkpoint-3"]
    assert "checkpoint-3: the base was loaded anew, as the run before it failed" in outcome.err
    third = numbers(Path("runs/t-3"))
    outcome = command(*given, *sets(training.settings))
    assert outcome.status == 0
    assert outcome.err.count("as before") == 2
    assert command(*given, *sets(training.settings), "--fresh").status == 0
    assert numbers(Path("runs/t-3")) == third


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("rank", "adapter_config.json differs"),
        ("tokenizer", "the tokenizer differs"),
        ("base", "the base differs"),
    ],
)
def test_what_does_not_fit_the_base_is_loaded_anew_and_said(
    sweep, training, checkpoint, other, monkeypatch, tmp_path, change, why
) -> None:
    place = training.at(10)
    if change == "rank":  # another scale of the same tensors
        edit_json(place / "adapter_config.json", lora_alpha=8)
    elif change == "tokenizer":
        text = (place / "tokenizer_config.json").read_text()
        assert '"model_max_length"' in text
        edit_json(place / "tokenizer_config.json", model_max_length=60)
    else:
        copy = tmp_path / "another"
        shutil.copytree(checkpoint.base, copy)
        edit_json(place / "adapter_config.json", base_model_name_or_path=str(copy))
    seen = loads(monkeypatch)
    outcome = sweep()
    assert outcome.status == 0, outcome.err
    assert seen == ["checkpoint-2", "checkpoint-10"]
    assert f"checkpoint-10: the base was loaded anew, as {why}" in outcome.err


def test_a_base_whose_files_changed_is_loaded_anew(training, checkpoint, damaged, monkeypatch) -> None:
    for step in (2, 10):
        edit_json(training.at(step) / "adapter_config.json", base_model_name_or_path=str(damaged.base))
    policy_of = Resident()
    policy_of(PolicyConfig(checkpoint=str(training.at(2))), CPU)
    path = damaged.base / "model.safetensors"
    save_file({k: 2 * t for k, t in load_file(path).items()}, path, {"format": "pt"})
    config = PolicyConfig(checkpoint=str(training.at(10)))
    policy, alone = policy_of(config, CPU), load_policy(config, CPU)
    assert policy_of.reason == "the base's files differ"
    state = alone.model.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in policy.model.state_dict().items())


def test_a_refilled_policy_is_the_loaded_one(training) -> None:
    policy_of = Resident()
    first = policy_of(PolicyConfig(checkpoint=str(training.at(2)), dtype="float64"), CPU)
    config = PolicyConfig(checkpoint=str(training.at(10)), dtype="float64")
    again, alone = policy_of(config, CPU), load_policy(config, CPU)
    assert policy_of.reason is None
    assert again.model is first.model
    state = alone.model.state_dict()
    assert state.keys() == again.model.state_dict().keys()
    assert all(torch.equal(t, state[k]) for k, t in again.model.state_dict().items())
    assert list(again.params) == list(alone.params)
    assert all(torch.equal(t, alone.params[k]) for k, t in again.params.items())
    plain = {"model", "params", "tokenizer", "padding"}
    assert {k: v for k, v in again._asdict().items() if k not in plain} == {
        k: v for k, v in alone._asdict().items() if k not in plain
    }


def test_weights_that_are_not_finite_are_refused_and_leave_no_half_policy(training) -> None:
    policy_of = Resident()
    policy_of(PolicyConfig(checkpoint=str(training.at(2))), CPU)
    path = training.at(10) / WEIGHTS
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="non-finite"):
        policy_of(PolicyConfig(checkpoint=str(training.at(10))), CPU)
    config = PolicyConfig(checkpoint=str(training.at(2)))
    policy, alone = policy_of(config, CPU), load_policy(config, CPU)
    assert all(torch.equal(t, alone.params[k]) for k, t in policy.params.items())


@pytest.mark.slow
def test_memory_is_flat(checkpoint, command, tmp_path, monkeypatch) -> None:
    """No plan outlives its run, and as many tensors are alive after six checkpoints as after three."""
    training = trained(checkpoint, tmp_path / "out", *range(1, 7))
    tokenizers: list[weakref.ref] = []
    states: list[weakref.ref] = []
    alive: list[int] = []
    whole = sweep_module._outcome

    def counted(*args: Any, **kwargs: Any):
        found = whole(*args, **kwargs)
        gc.collect()
        alive.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
        assert not [ref for ref in states if ref() is not None]
        # The policy in memory is that of the last checkpoint, and no other.
        assert [ref for ref in tokenizers if ref() is not None] == tokenizers[-1:]
        return found

    def prepare(*args: Any, **kwargs: Any) -> run_module.Prepared:
        made = prepared(*args, **kwargs)
        tokenizers.append(weakref.ref(made.plan.policy.tokenizer))
        states.extend(map(weakref.ref, made.plan.adam_state.exp_avg.values()))
        return made

    prepared = run_module.prepare
    monkeypatch.setattr(run_module, "prepare", prepare)
    monkeypatch.setattr(sweep_module, "_outcome", counted)
    Path("c.toml").touch()
    pattern = f"{training.folder}/checkpoint-*"
    assert command("sweep", "c.toml", "--checkpoints", pattern, *sets(training.settings)).status == 0
    assert (len(tokenizers), len(states)) == (6, 72)
    assert alive[5] <= alive[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"glob": "nowhere/checkpoint-*"}, "nothing matches in"),
        ({"glob": "c.tom*"}, "1 files and no folder match"),
        ({"optimizer__state": "c.toml"}, "optimizer.state is of one checkpoint"),
        ({"rollouts__update": "c.toml"}, "rollouts.update is of one checkpoint"),
        ({"prompts__source": "toy"}, 'prompts.source is "toy"'),
        ({"run__name": "n" * 99}, "more than 100 characters"),
    ],
)
def test_what_no_checkpoint_could_have_is_one_line(sweep, flags, said) -> None:
    outcome = sweep(**flags)
    assert outcome.status == 2
    assert outcome.out == ""
    assert said in outcome.err.splitlines()[-1]
    assert not Path("runs").exists()


def test_two_checkpoints_of_one_name_are_refused(sweep, training, tmp_path) -> None:
    shutil.copytree(training.at(10), tmp_path / "again" / "checkpoint-2")
    outcome = sweep("--checkpoints", str(tmp_path / "again" / "*"))
    assert outcome.status == 2
    assert "would both be written to t-2" in outcome.err.splitlines()[-1]


def test_the_order_is_natural_and_home_is_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("checkpoint-10", "checkpoint-9", "final", "checkpoint-100"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "log.txt").touch()
    found = sweep_module.found(["~/out/*", f"{tmp_path}/out/checkpoint-9"])
    assert [p.name for p in found] == ["checkpoint-9", "checkpoint-10", "checkpoint-100", "final"]
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in sweep_module.found(["out/checkpoint-1*"])] == [
        "out/checkpoint-10",
        "out/checkpoint-100",
    ]
    names = sweep_module._names("r", [Path("a/checkpoint-007"), Path("b/global_step_9"), Path("é x<")])
    assert names == ["r-7", "r-9", "r-__x_"]
