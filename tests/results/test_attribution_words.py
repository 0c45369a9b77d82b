"""The sentence of causes: true to the numbers, of either sign, of nothing, of hostile text."""

import pytest

from funcprobe.adapters.results import Results, load
from funcprobe.adapters.results.attribution import _right
from funcprobe.adapters.results.attribution_sections import (
    AttributionSection,
    Family,
    PromptOfU,
    Region,
    Share,
)
from funcprobe.adapters.results.attribution_words import beyond_shares, causes
from funcprobe.adapters.results.module_region import region
from funcprobe.adapters.results.prompt_texts import shortened
from funcprobe.adapters.results.quantity import StudentInterval


def share(value: float, se: float = 0.0) -> Share:
    interval = StudentInterval(low=value - 2 * se, high=value + 2 * se, degrees_of_freedom=15.0)
    holds_0 = abs(value) <= 2 * se
    return Share(share=value, se=se, interval=interval, indistinguishable_from_0=holds_0)


def prompt(index: int, value: float, text: str = "'8 + 4?'", **fields) -> PromptOfU:
    given = {"responses": 8, "tokens": 9, "mean_reward": 0.5, "right": None, "above_mean": 4}
    given |= {"advantage_low": -1.0, "advantage_high": 1.0, "marginal": 0.0} | fields
    return PromptOfU(prompt_index=index, text=text, share=value, **given)


DOWN = Region(
    name="mlp.down_proj of layers 20 to 29",
    modules=10,
    of_modules=210,
    fraction=0.61,
    total=share(-36.0, 1.0),
)


def section(**fields) -> AttributionSection:
    empty = {name: share(0.0) for name in ("decay", "direct", "score", "control")}
    given = {
        "level": "summary",
        "unit": "nats per token per unit of learning rate",
        "momentum": share(-440.0, 20.0),
        "update": share(-60.0, 5.0),
        "whole": share(-500.0, 21.0),
        "dropout": 0.0,
        "marginals": share(3.0, 4.0),
        "marginals_less_shares": share(63.0, 5.0),
        "marginals_differ": True,
        "U_prompts": (prompt(17, -28.2, right=7), prompt(3, -20.0), prompt(4, -11.8)),
        "region": None,
        "update_region": DOWN,
        "families": (
            Family(name="tensors", sum=1, residual=2e-7, sum_absolute=4, relative=5e-8),
            Family(name="tokens of E", sum=1, residual=0, sum_absolute=4, relative=0.0),
        ),
        "blocks": 16,
        **dict.fromkeys(("modules", "layers", "projections", "factors", "E_prompts"), ()),
    }
    return AttributionSection(**empty | given | fields)


@pytest.fixture
def said(run_one):
    results = load(run_one)

    def call(eta: float = 1e-5, clip: float = 1.0, **fields) -> list[str]:
        lr = results.next_lr.model_copy(update={"value": eta})
        entries = {"attribution": section(**fields), "next_lr": lr, "clip_coefficient": clip}
        results_here = results.model_copy(update=entries)
        return [*causes(results_here), *beyond_shares(results_here)]

    return call


def test_shares_of_one_sign_are_percentages(said):
    first, marginals, residuals = said()
    assert first == (
        "Causes of the predicted change: 88 % is momentum of earlier steps, 12 % is this batch; of "
        "this batch's 12 %, prompt 17 ('8 + 4?', 7 of 8 right) makes 47 %; 61 % of the batch's part is "
        "in mlp.down_proj of layers 20 to 29 (10 of 210 modules)"
    )
    assert marginals == (
        "This batch's shares sum to -6.0e-04 ± 1.0e-04, its marginals, the derivative in a common "
        "weight of all of it, to +3.0e-05 ± 8.0e-05 nats per token (difference +6.3e-04 ± 1.0e-04 on "
        "the same samples): Adam's second moment, which divides the whole step, grows with the gradient"
    )
    assert residuals.endswith("sum of absolute shares: tensors 5e-08, tokens of E 0e+00")
    assert said(clip=0.5)[1].endswith("grows with the gradient, and clipping fixes its norm")
    assert len(said(marginals_differ=False)) == 2


def test_parts_of_opposite_sign_are_amounts(said):
    first = said(momentum=share(100.0, 60.0))[0]
    assert first.startswith(
        "Causes of the predicted change: +4.0e-04 nats per token in all, momentum of earlier steps "
        "+1.0e-03 (indistinguishable from 0) and this batch -6.0e-04; of this batch's -6.0e-04, prompt "
    )
    three = said(momentum=share(100.0), decay=share(-10.0))[0]
    assert "+1.0e-03, this batch -6.0e-04 and weight decay -1.0e-04; " in three


def test_prompts_of_opposite_sign_are_amounts(said):
    prompts = (prompt(2, -91.0, right=7), prompt(9, 44.0, right=3), prompt(1, -13.0))
    first = said(U_prompts=prompts)[0]
    assert (
        "; within this batch's 12 % (-6.0e-04), prompt 2 ('8 + 4?', 7 of 8 right) makes -9.1e-04 and "
        "prompt 9 ('8 + 4?', 3 of 8 right) makes +4.4e-04 nats per token; 61 %"
    ) in first
    # One prompt more than all of it, with another that lacks in the list of ten.
    assert (
        "prompt 2 ('8 + 4?', mean reward 0.5) makes -6.3e-04 nats"
        in said(U_prompts=(prompt(2, -63.0),))[0]
    )


def test_prompts_that_are_not_listed_may_cancel(said):
    """Ten prompts of -5 and a rest of -10, whose prompts make 300 in absolute value."""
    prompts = tuple(prompt(i, -5.0) for i in range(10))
    assert "prompt 0 ('8 + 4?', mean reward 0.5) makes 8 %" in said(U_prompts=prompts)[0]
    assert (
        "prompt 0 ('8 + 4?', mean reward 0.5) makes -5.0e-05 nats per token"
        in (said(U_prompts=prompts, U_prompts_absolute=350.0)[0])
    )


def test_a_region_among_modules_of_either_sign_is_an_amount(said):
    opposed = Region(**DOWN.model_dump() | {"spread": 7.6})
    assert said(update_region=opposed)[0].endswith(
        "; in the batch's part, of modules of either sign, mlp.down_proj of layers 20 to 29 (10 of 210 "
        "modules) makes -3.6e-04 nats per token"
    )


@pytest.mark.parametrize(
    ("values", "expected"), [({0.0, 1.0}, 2), ({0.0, 0.5}, None), ({1.0, 2.0}, None), ({1.0}, None)]
)
def test_a_response_is_right_from_the_configured_reward_on(values, expected):
    """A partial credit is no right answer, and two degrees of right are not right and wrong."""
    rewards = [min(values), max(values), max(values)]
    assert _right(rewards, values, 1.0) == expected


def test_no_part_at_all(said):
    """As where the policy is certain of every token, and X is 0."""
    none = dict.fromkeys(("momentum", "update", "whole"), share(0.0))
    first = said(**none, update_region=None, U_prompts=(prompt(1, 0.0),))[0]
    assert first.endswith(
        "predicted change: nothing changes to first order; this batch has no gradient"
    )


def test_nothing_is_said_of_nothing(said):
    whole = Region(**DOWN.model_dump() | {"name": "layer 4", "fraction": 1.0})
    still = {"update": share(0.0), "U_prompts": (prompt(1, 0.0), prompt(2, 0.0)), "region": whole}
    assert said(**still)[0] == (
        "Causes of the predicted change: 100 % is momentum of earlier steps; this batch has no "
        "gradient; 100 % of the whole is in layer 4 (10 of 210 modules)"
    )
    alone = said(momentum=share(0.0), update_region=None, U_prompts=(prompt(7, -60.0),))[0]
    assert alone == (
        "Causes of the predicted change: all of it is this batch; of it, prompt 7 ('8 + 4?', mean "
        "reward 0.5) makes 100 %"
    )
    noise = Region(**DOWN.model_dump() | {"total": share(-36.0, 30.0)})
    assert "of the batch's part" not in said(update_region=noise)[0]
    little = said(update=share(-0.001), U_prompts=(prompt(7, -0.001),))[0]
    assert little == "Causes of the predicted change: 100 % is momentum of earlier steps"
    assert "; of this batch's 1 %" in said(update=share(-4.5), U_prompts=(prompt(7, -4.5),))[0]
    assert "under 1 % is this batch" in said(update=share(-3.0), U_prompts=(prompt(7, -3.0),))[0]


def test_without_a_learning_rate_amounts_are_per_unit_of_it(said):
    first = said(eta=0.0, momentum=share(100.0))[0]
    assert "+4.0e+01 nats per token per unit of learning rate in all, momentum of earlier" in first


def test_without_rewards_none_are_said(said):
    prompts = (prompt(17, -60.0, mean_reward=None, above_mean=None),)
    assert "prompt 17 ('8 + 4?') makes 100 %" in said(U_prompts=prompts)[0]


def test_no_attribution_no_line(run_one):
    results: Results = load(run_one)
    assert causes(results.model_copy(update={"attribution": None})) == []


@pytest.mark.parametrize(
    "text",
    ["\x1b[31mred\x1b[0m", "a\r\nb\n\n  c", "[bold]x[/bold]", "\u202eabc", "y" * 500, "", "'\"" * 30],
)
def test_text_of_a_prompt_is_short_and_obeyed_by_nothing(text):
    short = shortened(text)
    assert len(short) < 60
    assert short.isprintable()


# Where in the adapter


def modules(value, layers: int = 6) -> dict[str, float]:
    kinds = ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
    return {
        f"base_model.model.model.layers.{i}.{kind}": float(value(i, kind))
        for i in range(layers)
        for kind in kinds
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda i, k: 10 * (i in {2, 3} and k == "mlp.up_proj") + 0.1, "mlp.up_proj of layers 2 to 3"),
        (lambda i, k: 10 * (i == 4) + 0.1 + 0 * len(k), "mlp of layer 4"),
        (lambda i, k: 9 * (i in {4, 5} and k[0] == "m") + 0.1, "mlp of layers 4 to 5"),
        (lambda i, k: (k == "self_attn.q_proj") + 0 * i, "self_attn.q_proj of layers 0 to 2"),
        (lambda i, k: -8.0 if (i, k) == (5, "mlp.up_proj") else -0.1, "mlp.up_proj of layer 5"),
    ],
)
def test_the_smallest_region_that_holds_half(value, expected):
    values = modules(value)
    found = region(values)
    assert found.name == expected
    assert 0.5 <= found.fraction <= 1
    inside = sum(values[name] for name in found.modules)
    assert found.fraction == pytest.approx(inside / sum(values.values()))


def test_a_spread_part_has_no_region():
    layers = {f"m.layers.{2 * i}.x": (-1.0) ** i + 0.01 for i in range(6)}
    assert region(layers) is None or region(layers).fraction <= 1
    alternating = {f"m.layers.{i}.x": 1.0 if i % 2 else -0.4 for i in range(8)}
    assert region(alternating) is None or len(region(alternating).modules) <= 4
    assert region({"a": 0.0, "b": 0.0}) is None
    assert region({"a": 1.0, "b": -1.0}) is None
    assert region({"lm_head": 5.0, "model.layers.0.x": 1.0, "model.layers.1.x": 1.0}).name == "lm_head"
    only = region({"base_model.model.lm_head": 2.0})
    assert (only.name, only.fraction) == ("lm_head", 1.0)
    two = {
        f"model.{tower}.{i}.x": float(tower == "vision") for tower in ("vision", "text") for i in (0, 1)
    }
    assert region(two).name == "layer 0 of vision"
