"""`funcprobe run` on a checkpoint of TRL's whose last gradients were recorded: whose momentum it is."""

import io
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from funcprobe import InputError, Step
from funcprobe.adapters.config.schema import AttributionConfig, Config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.rollouts.gradients import load_gradient, recorded_gradients, save_gradient
from funcprobe.adapters.stages.plan import Plan, load
from funcprobe.adapters.stages.recorded_steps import RecordedSteps, recorded_steps
from support.checkpoints import Checkpoint, sets
from support.trl_cases import GENERAL, LAYOUTS
from support.trl_training import Step as Taken
from support.trl_training import train

CASES = {
    "dapo, clipped": {"max_grad_norm": 0.02, "save_steps": 1},
    "KL and bonus, two iterations": LAYOUTS[GENERAL]
    | {"epsilon": 0.001, "loss_type": "dapo", "beta": 0.04, "entropy_coef": 0.01, "save_steps": 1},
}


def given(step: Taken, checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
    return {
        "policy.checkpoint": str(step.before),
        "rollouts.update": str(step.recorded),
        "prompts.source": checkpoint.settings()["prompts.source"],
        "sampling.B_E": 8,
        "sampling.max_new_tokens": 4,
        "measure.etas": [1e-5],
        "run.folder": "runs",
    } | {key.replace("__", "."): value for key, value in more.items()}


def results_of(command, settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    Path("c.toml").touch()
    outcome = command("run", "c.toml", "-v", *sets(settings))
    assert outcome.status == 0, outcome.err
    return json.loads(Path("runs/probe/results.json").read_text()), outcome.out


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(settings, id=name, marks=[pytest.mark.slow] * (i > 0))
        for i, (name, settings) in enumerate(CASES.items())
    ],
)
def step(request, checkpoint, tmp_path_factory) -> Taken:
    """Six steps, of which five led to the checkpoint, all recorded."""
    return train(checkpoint, tmp_path_factory.mktemp("out"), gradients=6, **request.param)


@pytest.mark.slow
def test_momentum_by_step_and_by_prompt(step, checkpoint, command):
    settings = given(step, checkpoint, attribution__momentum_prompts=2)
    settings |= {"attribution.earlier_checkpoint": str(step.before.parent / "checkpoint-2")}
    results, out = results_of(command, settings)
    found, whole = results["momentum"], results["first_order"]["from_momentum"]["value"]
    assert found["momentum"] == whole
    assert [(one["step"], one["steps_ago"]) for one in found["by_step"]] == [
        (5 - ago, ago + 1) for ago in range(5)
    ]
    shares = [one["share"] for one in found["by_step"]]
    # All steps are recorded: the gradients alone make exp_avg, up to its rounding in float32.
    assert found["all_steps"]
    assert sum(shares) == pytest.approx(whole, rel=1e-6)
    assert abs(found["before"]) < 1e-6 * abs(whole)
    assert found["unexplained"] < 1e-6
    assert found["earlier"]["step"] == 2
    assert found["earlier"]["since"] == pytest.approx(sum(shares[:3]), rel=1e-5)
    assert found["earlier"]["before"] == pytest.approx(sum(shares[3:]), rel=1e-5)
    # At the parameters before each step its gradient is TRL's, to float32.
    assert [one["step"] for one in found["by_prompt"]] == [5, 4]
    for one, share in zip(found["by_prompt"], shares, strict=False):
        assert one["recorded"] == pytest.approx(share, rel=1e-9)
        assert one["gradient_residual"] < 5e-6
        assert abs(one["residual"]) < 5e-6 * sum(abs(p["share"]) for p in one["prompts"])
        assert sum(p["share"] for p in one["prompts"]) == pytest.approx(one["recomputed"], rel=1e-9)
        assert (one["clip_coefficient"] < 1) == (
            results["conventions"]["step"]["max_grad_norm"] is not None
        )
        assert len(one["prompts"]) == 4
    life, update = results["attribution"]["lifetime"], results["first_order"]["from_update"]["value"]
    assert life["now"] == pytest.approx(update, rel=1e-12)
    series = sum(0.9**j / (1 - 0.9 ** (6 + j)) for j in range(1, 500))  # step 6 is predicted
    assert life["factor"] == pytest.approx((1 - 0.9**6) * series, rel=1e-12)
    assert life["later"] == pytest.approx(life["factor"] * update, rel=1e-12)
    for prompt in results["attribution"]["U_prompts"]:
        assert prompt["later"] == pytest.approx(life["factor"] * prompt["share"], rel=1e-12)
    said = " ".join(out.split())  # lines are wrapped, and a part may be indistinguishable from 0
    assert re.search(r"in later steps through momentum( \([^)]+\))?, if nothing else changes", said)
    manifest = json.loads(Path("runs/probe/manifest.json").read_text())
    assert set(manifest["inputs"]["momentum"]) == {
        *(f"step-{n:06d}.safetensors" for n in range(1, 6)),
        "optimizer.pt",
    }
    assert "momentum by step: 1 step ago" in out
    assert "all 5 steps of the run" in out
    assert "momentum of step 5 by prompt: '" in out
    assert "momentum by checkpoint: since step 2 " in out


@pytest.mark.slow
def test_the_last_steps_alone_and_none(step, checkpoint, command, tmp_path):
    """Of two steps: what they do not explain is before them. At level "off" there is no section."""
    several, _ = results_of(command, given(step, checkpoint))
    two, out = results_of(
        command,
        given(step, checkpoint, attribution__gradients=str(part_of(step, tmp_path, 5, 4, 2))),
    )
    all_five, found = several["momentum"]["by_step"], two["momentum"]
    assert found["by_step"] == all_five[:2]
    assert not found["all_steps"]
    assert found["before"] == pytest.approx(sum(one["share"] for one in all_five[2:]), rel=1e-5)
    assert 0.1 < found["unexplained"] < 1
    assert "before the first recorded" in out
    off, out = results_of(command, given(step, checkpoint, attribution__level="off"))
    assert off["momentum"] is None
    assert "momentum by step" not in out


def part_of(step: Taken, folder: Path, *kept: int) -> Path:
    """A folder with some of the recorded gradients."""
    target = folder / "-".join(map(str, ("kept", *kept)))
    target.mkdir()
    for number, path in recorded_gradients(step.recorded.parent).items():
        if number in kept:
            shutil.copyfile(path, target / path.name)
    return target


@pytest.fixture(scope="module")
def plan(step, checkpoint) -> Plan:
    keys = given(step, checkpoint)
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return load(Config.model_validate(tomllib.loads(text)), Narrator(Console(file=io.StringIO())))


def verified(plan: Plan, **attribution: Any) -> tuple[RecordedSteps | None, list[str]]:
    """Of the plan with these keys: the steps that are used, and what is said."""
    narrator = Narrator(Console(file=io.StringIO()))
    update = attribution.pop("update", plan.config.rollouts.update)
    config = plan.config.model_copy(
        update={
            "attribution": AttributionConfig(**attribution),
            "rollouts": plan.config.rollouts.model_copy(update={"update": str(update)}),
        }
    )
    return recorded_steps(plan._replace(config=config), narrator), narrator.lines


def test_steps_are_used_up_to_a_gap(step, plan, tmp_path):
    found, lines = verified(plan)
    assert (list(found.files), found.taken, lines) == ([5, 4, 3, 2, 1], 5, [])
    assert all(path.parent == step.recorded.parent for path in found.files.values())
    # In the checkpoint, where the rollouts of U are elsewhere.
    found, _ = verified(plan, update=tmp_path / "step-000006.parquet")
    assert found.files[5] == step.before / "gradients" / "step-000005.safetensors"
    found, _ = verified(plan, gradients=str(part_of(step, tmp_path, 6, 5, 4, 2)))
    assert list(found.files) == [5, 4]
    found, _ = verified(plan, level="off")
    assert found is None
    found, _ = verified(plan, level="off", momentum_prompts=1)
    assert found.rollouts[5].step == 5


def test_gradients_that_do_not_fit_are_refused(step, plan, tmp_path):
    def refuse(where: Path | None, *said: str, **more: Any) -> None:
        with pytest.raises(InputError) as refused:
            verified(plan, gradients=where and str(where), **more)
        assert "\n" not in str(refused.value)
        for words in said:
            assert words in str(refused.value)

    refuse(part_of(step, tmp_path), "no gradients of steps in", "record_rollouts(..., gradients=K)")
    refuse(tmp_path / "missing", "no gradients of steps in")
    later = part_of(step, tmp_path, 6)
    refuse(later, "has gradients of steps 6 to 6, but the optimizer state has taken 5 steps")
    gap = part_of(step, tmp_path, 5, 3)
    refuse(gap, "momentum_prompts = 2, but the gradients of 1 steps", momentum_prompts=2)
    alone = {"momentum_prompts": 1, "update": tmp_path / "step-000006.parquet"}
    refuse(part_of(step, tmp_path, 5), "needs the rollouts of step 5, and", **alone)
    # Another step's gradient under this one's name, as of another run.
    other = part_of(step, tmp_path, 4, 5)
    four, five = (load_gradient(recorded_gradients(other)[n], plan.policy.params) for n in (4, 5))
    spoiled = recorded_gradients(other)[5]
    save_gradient(five._replace(gradient=four.gradient), spoiled)
    refuse(other, "without this gradient exp_avg has norm", "of another run than the optimizer state")
    # An older one shows in the norm, too, unless it is too small to matter.
    save_gradient(five, spoiled)
    older = recorded_gradients(other)[4]
    save_gradient(four._replace(gradient=five.gradient), older)
    refuse(other, f"{older}: without this gradient")
    spoiled.write_bytes(spoiled.read_bytes()[:1000])
    refuse(other, "step-000005.safetensors cannot be read")
    # Found without being asked for, it is said and left out.
    found, (line,) = verified(plan, update=other / "step-000006.parquet")
    assert found is None
    assert line.startswith("warning: momentum is not split by step: ")
    sgd = plan._replace(step=Step("sgd"))
    with pytest.raises(
        InputError, match=r'attribution\.momentum_prompts is set, .*"sgd" has no momentum'
    ):
        verified(sgd, momentum_prompts=1)
    assert verified(sgd) == (None, [])


def test_an_earlier_checkpoint_must_be_of_the_run(step, plan, tmp_path):
    earlier = step.before.parent / "checkpoint-2"
    found, _ = verified(plan, earlier_checkpoint=str(earlier))
    assert set(found.earlier.step.values()) == {2}
    with pytest.raises(InputError, match="has taken 5 steps, the checkpoint 5: an earlier one"):
        verified(plan, earlier_checkpoint=str(step.before))
    with pytest.raises(InputError, match="no optimizer state"):
        verified(plan, earlier_checkpoint=str(tmp_path))
    other = shutil.copytree(earlier, tmp_path / "other")
    state = torch.load(other / "optimizer.pt", weights_only=True)
    for entry in state["state"].values():
        entry["exp_avg_sq"] = entry["exp_avg_sq"].flatten().flip(0).view_as(entry["exp_avg_sq"])
    torch.save(state, other / "optimizer.pt")
    with pytest.raises(InputError, match=r"\d+% of its second moments, .* it is of another run"):
        verified(plan, earlier_checkpoint=str(other))
