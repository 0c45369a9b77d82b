"""Runs whose objective is a trainer's loss: what changes, what does not, what is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from funcprobe.adapters.rollouts import load_rollouts, save_rollouts
from funcprobe.types import InputError
from support.checkpoints import Checkpoint, sets
from support.sidecars import with_sidecar
from support.slow import first

TRL = {"objective__loss": "trl"}


def settings(**values: Any) -> dict[str, Any]:
    return TRL | {f"objective__settings__{key}": value for key, value in values.items()}


def numbers(document: dict[str, Any]) -> dict[str, float]:
    first = document["first_order"]
    return {key: first[key]["value"] for key in ("derivative", "from_update", "se_over_U", "se_total")}


@pytest.mark.parametrize(
    ("preset", "loss"),
    first(
        1,
        [
            ({}, {}),
            ({"objective__preset": "grpo"}, {"loss_type": "grpo"}),
            (
                {"objective__preset": "dr_grpo", "objective__constant": 7.0},
                {"loss_type": "dr_grpo", "max_completion_length": 7},
            ),
        ],
    ),
)
def test_a_loss_without_terms_is_the_preset(probe, preset, loss) -> None:
    """At the policy that sampled; to rounding, as coefficients by autograd are rounded otherwise."""
    advantage = {"objective__advantage": "mean_std"}
    plain, trl = probe("plain", **preset, **advantage), probe("trl", **settings(**loss), **advantage)
    assert numbers(trl) == pytest.approx(numbers(plain), rel=1e-9)
    assert trl["loss"]["at_theta"]["value"] == pytest.approx(
        plain["loss"]["at_theta"]["value"], abs=1e-12
    )
    assert trl["loss"]["metrics"]["entropy"] == pytest.approx(plain["loss"]["metrics"]["entropy"])
    assert (plain["loss"]["name"], trl["loss"]["name"]) == ("preset", "trl")
    assert trl["conventions"]["objective"]["normalisation"] == "of the loss"
    assert trl["counts"] == plain["counts"]


def test_a_bonus_and_a_KL_term_change_the_step(probe) -> None:
    plain = probe("plain", **settings())
    bonus = probe("bonus", **settings(entropy_coef=0.5))
    kl = probe("kl", **settings(beta=0.5))
    assert bonus["first_order"]["from_update"]["value"] > plain["first_order"]["from_update"]["value"]
    assert kl["loss"]["metrics"]["kl"] > 0
    assert numbers(kl)["from_update"] != pytest.approx(numbers(plain)["from_update"], rel=1e-3)
    for found in (bonus, kl):
        checks = {one["name"]: one for one in found["checks"]}
        assert checks["reverse route = forward route"]["passed"]
    assert bonus["loss"]["settings"]["entropy_coef"] == 0.5


@pytest.mark.slow
def test_a_bonus_moves_where_every_advantage_is_0(probe, tmp_path) -> None:
    (tmp_path / "equal.py").write_text(
        "def f(prompts, completions, **_):\n    return [1.0] * len(prompts)\n"
    )
    equal = {"reward__function": f"{tmp_path / 'equal.py'}:f", "optimizer__rule": "sgd"}
    found = probe("bonus", **settings(entropy_coef=0.1), **equal)
    assert found["first_order"]["derivative"]["value"] > 0
    assert found["counts"]["U_groups_without_gradient"] == 0


def test_a_loss_without_gradient_is_not_said_to_lack_advantages(command, checkpoint, tmp_path) -> None:
    (tmp_path / "equal.py").write_text(
        "def f(prompts, completions, **_):\n    return [1.0] * len(prompts)\n"
    )
    Path("c.toml").touch()
    given = {k.replace("__", "."): v for k, v in settings().items()}
    given |= {"reward.function": f"{tmp_path / 'equal.py'}:f"}
    outcome = command("check", "c.toml", *sets(checkpoint.settings() | given))
    assert outcome.status == 0, outcome.err
    assert "\nthe loss has no gradient on U: the checks of the gradient Y are left out\n" in outcome.err
    assert "optimizer state's order: the loss has no gradient on U, and so is Y" not in outcome.err
    assert "order: the loss has no gradient on U, so that Y is 0" in outcome.err


@pytest.mark.slow
def test_ones_own_loss_is_a_function_with_keywords(probe, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "def reinforce(logp, entropy, batch, bonus=0.0):\n"
        "    weight = batch.advantage_N[:, None] * batch.mask_NR\n"
        "    return -((weight * logp + bonus * entropy * batch.mask_NR).sum() / batch.mask_NR.sum())\n"
    )
    own = {"objective__loss": "mine.py:reinforce"}
    (tmp_path / "c.toml").touch()
    mine = probe("mine", **own)
    assert numbers(mine) == pytest.approx(numbers(probe("plain")), rel=1e-9)
    mine = probe("bonus", **own, objective__settings__bonus=0.25)
    trl = probe("trl", **settings(entropy_coef=0.25))
    assert numbers(mine) == pytest.approx(numbers(trl), rel=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective.loss": "trl", "objective.settings.bet": 0.1}, "objective.settings has no bet"),
        (
            {"objective.loss": "trl", "objective.settings.beta": "much"},
            "objective.settings.beta is 'much'",
        ),
        (
            {"objective.loss": "trl", "objective.settings.loss_type": "ppo"},
            "objective.settings.loss_type",
        ),
        ({"objective.settings.beta": 0.1}, "objective.loss is not set"),
        ({"objective.loss": "nothing"}, "unknown loss 'nothing'"),
        ({"objective.loss": "missing.py:f"}, "missing.py"),
    ],
)
def test_a_loss_that_cannot_be(ran_refused, given, said) -> None:
    ran_refused(given, said)


@pytest.fixture
def ran_refused(command, checkpoint):
    def call(given: dict[str, Any], said: str) -> None:
        Path("c.toml").touch()
        outcome = command("run", "c.toml", *sets(checkpoint.settings() | given))
        assert outcome.status == 2
        assert said in outcome.err.splitlines()[-1]

    return call


def recorded(probe, of: Checkpoint, **columns: Any) -> Path:
    """U of a run, as recorded rollouts with further columns."""
    probe("source", of=of)
    found = load_rollouts(Path("runs/source/rollouts/update.parquet"), 14, rewards=True)
    path = Path("recorded.parquet").absolute()
    save_rollouts(found._replace(**columns), path)
    return path


LOSS = {"loss_type": "dapo", "scale_rewards": "group", "gradient_accumulation_steps": 1}


@pytest.mark.slow
def test_the_sidecar_names_the_loss(probe, damaged) -> None:
    """A run without [objective] has its training run's loss; one with a preset says that it has not."""
    with_sidecar(damaged, loss=LOSS | {"beta": 0.3, "entropy_coef": 0.2}, sampling={})
    found = probe("own", of=damaged)
    assert found["loss"]["name"] == "trl"
    assert (found["loss"]["settings"]["beta"], found["loss"]["settings"]["entropy_coef"]) == (0.3, 0.2)
    assert found["unlike_the_run"] == []
    same = probe("set", of=damaged, **settings(beta=0.3, entropy_coef=0.2))
    assert numbers(same) == numbers(found)
    preset = probe("preset", of=damaged, objective__preset="dapo")
    assert preset["loss"]["name"] == "preset"
    assert [line for line in preset["unlike_the_run"] if "beta was 0.3" in line]
    other = probe("other", of=damaged, **settings(beta=0.1, entropy_coef=0.2))
    assert [line for line in other["unlike_the_run"] if "beta was 0.3" in line]


@pytest.mark.slow
def test_what_cannot_be_honoured_is_in_the_headline(probe, ran, damaged) -> None:
    with_sidecar(damaged, loss=LOSS | {"router_aux_loss_coef": 0.01}, sampling={})
    document = probe("moe", of=damaged)
    (line,) = document["unlike_the_run"]
    assert "router_aux_loss_coef was 0.01" in line


@pytest.mark.slow
def test_old_log_probabilities_clip(probe, checkpoint) -> None:
    """A second iteration: ratios of 1.5, beyond the bound, leave tokens of advantage < 0 alone."""
    probe("source")
    found = load_rollouts(Path("runs/source/rollouts/update.parquet"), 14, rewards=True)
    far = [[-50.0] * len(ids) for ids in found.response_ids]
    path = recorded(probe, checkpoint, old_logp=far)
    document = probe("far", rollouts__update=str(path), **settings(epsilon_high=0.1))
    metrics = document["loss"]["metrics"]
    positive = sum(
        a > 0 for a, ids in zip(found.advantage, found.response_ids, strict=True) for _ in ids
    )
    tokens = sum(map(len, found.response_ids))
    assert metrics["clip_ratio/high_mean"] == pytest.approx(positive / tokens)


@pytest.mark.slow
def test_the_entropy_coefficient_is_that_of_the_step(probe, checkpoint) -> None:
    """An adaptive coefficient moves from step to step; rollouts have the one in effect."""
    path = str(recorded(probe, checkpoint, entropy_coef=0.3))
    given = settings(entropy_coef=0.1, use_adaptive_entropy=True)
    found = probe("adaptive", rollouts__update=path, **given)
    assert found["loss"]["settings"]["entropy_coef"] == 0.3
    assert numbers(found) == numbers(
        probe("fixed", rollouts__update=path, **settings(entropy_coef=0.3, use_adaptive_entropy=True))
    )


@pytest.mark.slow
def test_rollouts_without_micro_batches_are_one_unless_the_loss_has_sums_over_each(
    probe, checkpoint, ran_refused
) -> None:
    path = str(recorded(probe, checkpoint))
    four = {"gradient_accumulation_steps": 4, "beta": 0.1}
    found = probe("four", rollouts__update=path, **settings(**four))
    assert numbers(found) == numbers(probe("one", rollouts__update=path, **settings(beta=0.1)))
    for own, said in (
        ({"loss_type": "bnpo"}, "bnpo is of each of the step's 4 micro-batches"),
        ({"entropy_coef": 0.1}, "the entropy bonus is of each"),
        ({"top_entropy_quantile": 0.5}, "the quantile is of each"),
    ):
        given = {key.replace("__", "."): value for key, value in settings(**four, **own).items()}
        ran_refused(given | {"rollouts.update": path}, said)


@pytest.mark.slow
def test_a_mean_over_nothing_is_null(probe, checkpoint) -> None:
    """Where no sequence has a token in the loss, and a KL term has none either: Y = 0."""
    found = load_rollouts(recorded(probe, checkpoint), 14, rewards=True)
    nothing = [[False] * len(ids) for ids in found.response_ids]
    path = str(recorded(probe, checkpoint, loss_mask=nothing))
    document = probe("nothing", rollouts__update=path, **settings())
    assert document["loss"]["metrics"]["clip_ratio/low_min"] is None
    assert document["counts"]["U_groups_without_gradient"] == document["counts"]["U_prompts"]


@pytest.mark.slow
def test_a_truncated_response_is_masked(probe) -> None:
    plain, masked = (
        probe("plain", **settings()),
        probe("mask", **settings(mask_truncated_completions=True)),
    )
    reasons = load_rollouts(Path("runs/mask/rollouts/update.parquet"), 14, rewards=True).finish_reason
    assert "length" in reasons
    assert numbers(masked) != numbers(plain)
    assert json.loads(Path("runs/mask/results.json").read_text())["loss"]["settings"][
        "mask_truncated_completions"
    ]


@pytest.mark.slow
def test_a_sampled_step_of_a_run_that_cannot_be_sampled_alike(probe, damaged) -> None:
    """Half a generation, or one by vLLM: U is a generation of its own, by the policy itself."""
    plain = probe("plain", **settings())
    halves = settings(gradient_accumulation_steps=2, steps_per_generation=4)
    assert numbers(probe("halves", **halves)) == pytest.approx(numbers(plain), rel=1e-9)
    for own in ({}, {"off_policy_mask_threshold": 0.1}):
        assert numbers(probe("vllm", **settings(use_vllm=True, **own))) == numbers(plain)


@pytest.mark.slow
def test_rollouts_of_part_of_a_step_are_refused(probe, checkpoint, ran_refused) -> None:
    """Of one rank of two; without processes or micro-batches, where the loss has sums over them."""
    found = load_rollouts(recorded(probe, checkpoint), 14, rewards=True)
    count = len(found.response_ids)
    one = {"microbatch": [0] * count}
    for own, columns, said in (
        ({"world_size": 2}, one | {"process": [0] * count}, "rows of 1 of the training's 2 processes"),
        ({"world_size": 2, "loss_type": "bnpo"}, one, "no column process, but bnpo is of each"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 8},
            {"generated_tokens": 100.0},
            "the divisor of dapo is of each of the step's 4 micro-batches",
        ),
    ):
        path = str(recorded(probe, checkpoint, **columns))
        given = {key.replace("__", "."): value for key, value in settings(**own).items()}
        ran_refused(given | {"rollouts.update": path}, said)


@pytest.mark.slow
def test_a_bound_that_is_none(probe, damaged) -> None:
    """A sidecar has null for TRL's None, which is not TRL's default here, and inf as text."""
    sampling = {"vllm_importance_sampling_clip_max": None}
    with_sidecar(damaged, loss=LOSS | {"beta": 0.1, "delta": "inf"}, sampling=sampling)
    found = probe("none", of=damaged)["loss"]["settings"]
    assert (found["vllm_importance_sampling_clip_max"], found["delta"]) == ("inf", "inf")


def test_a_sidecars_setting_of_another_type_is_named(probe, damaged) -> None:
    with_sidecar(damaged, loss=LOSS | {"beta": [0.1]}, sampling={})
    with pytest.raises(InputError, match=r"objective.settings.beta is \[0.1\]"):
        probe("list", of=damaged)
