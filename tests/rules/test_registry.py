"""Rules by name: what a text asks for, and what the page of the rules says of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcprobe import InputError
from funcprobe.rules.columns import COLUMNS
from funcprobe.rules.grammar import FUNCTIONS
from funcprobe.rules.named import LONGEST_LABEL, bind
from funcprobe.rules.registry import NAMED, rule
from funcprobe.rules.rule import SUPPLIES, RuleInputs
from support.paths import ROOT
from support.rule_cases import case

PAGE = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
# One text of every rule, with an argument where there is no default.
EXAMPLES = {name: name for name in NAMED} | {
    "advantage": "advantage:mean",
    "drop_prompt": "drop_prompt:3",
    "temperature": "temperature:0.7",
    "mask": "mask:advantage < 0",
    "weight": "weight:1 / (1 + surprisal)",
}


@pytest.mark.parametrize("name", NAMED)
def test_every_rule_applies(name):
    bound, inputs = rule(EXAMPLES[name]), case().inputs
    found = bound.apply(inputs)
    assert bound.name == name
    assert bound.named is NAMED[name]
    assert found.batch is inputs.update.batch
    assert found.coef_NR.shape == inputs.mask_NR.shape
    assert not found.coef_NR[~inputs.mask_NR].any()
    assert not found.entropy_coef_NR[~inputs.mask_NR].any()
    again = rule(bound.text)
    assert (again.text, again.label, again.needs) == (bound.text, bound.label, bound.needs)
    assert 0 < len(bound.label) <= LONGEST_LABEL
    assert bound.needs == tuple(n for n in SUPPLIES if n in bound.needs)


@pytest.mark.parametrize("name", NAMED)
def test_what_a_rule_needs_is_stated(name):
    """With every other optional input None it applies, and with one of its own None it says so."""
    bound, inputs = rule(EXAMPLES[name]), case().inputs
    optional = RuleInputs._field_defaults
    assert SUPPLIES.keys() == optional.keys()
    bound.apply(inputs._replace(**{n: None for n in optional if n not in bound.needs}))
    for need in bound.needs:
        with pytest.raises(InputError, match=rf"needs {need}, which is None: supply {SUPPLIES[need]}"):
            bound.apply(inputs._replace(**{need: None}))


def test_defaults_and_arguments():
    assert rule("clip").argument == (0.2, 0.28)
    assert rule("clip:0.1").argument == (0.1, 0.28)
    assert rule(" clip : 0.1 , 3 ").text == "clip:0.1,3"
    assert rule("kl_cov").argument == (0.0002, 0.1)
    assert rule("stare_two_sided:1.05,0.95").argument == (1.05, 0.95, 0.1)
    assert rule("dr_grpo").argument is None
    assert rule("dr_grpo:512").argument == (512.0,)
    assert rule("drop_prompt:07").argument == 7
    assert rule("advantage:mean_std").argument == "mean_std"
    assert rule("temperature:0.7").temperature == 0.7
    assert rule("steer").temperature is None
    assert rule("mask:share<0  and\n ratio < 2").text == "mask:share<0 and ratio < 2"
    assert rule("mask:share < 0 and ratio < 2").needs == ("old_logp_NR", "share_NR")
    assert bind(NAMED["entropy_bonus"], -1 / 3).argument == (-1 / 3,)
    assert bind(NAMED["entropy_bonus"], 1 / 3).label == "entropy bonus 0.3333"
    assert rule(bind(NAMED["entropy_bonus"], 1 / 3).text).argument == (1 / 3,)
    assert bind(NAMED["entropy_bonus"]).argument == (0.01,)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_coefficient_is_kept_to_its_last_bit(x):
    bound = bind(NAMED["entropy_bonus"], x)
    assert bound.argument == (x,)
    assert rule(bound.text).argument == (x,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steerr", "unknown rule 'steerr', did you mean steer? expected one of own, positive_only"),
        ("", "unknown rule '': expected one of own"),
        ("own:1", "rule own takes no argument, found '1'"),
        ("steer:", "rule steer needs its argument: write steer:smallest"),
        ("steer:0", "rule steer: smallest is '0', expected a number above 0 to 1"),
        ("steer:1.5", "rule steer: smallest is '1.5', expected a number above 0 to 1"),
        ("steer:high", "rule steer: smallest is 'high', expected a number above 0 to 1"),
        ("steer:0.8,0.9", "rule steer: 2 numbers, at most 1 (smallest)"),
        ("clip:-0.1", "rule clip: low is '-0.1', expected a number from 0"),
        ("clip:0.1,inf", "rule clip: high is 'inf', expected a number from 0"),
        ("clip:0.1,,", "rule clip: 3 numbers, at most 2 (low,high)"),
        ("clip:,0.1", "rule clip: low is '', expected a number from 0"),
        ("entropy_bonus:nan", "rule entropy_bonus: coef is 'nan', expected a number"),
        ("random_tokens:0.1,1.5", "rule random_tokens: seed is '1.5', expected a whole number from 0"),
        ("random_tokens:0", "rule random_tokens: amount is '0', expected a number above 0"),
        ("drop_prompt", "rule drop_prompt needs its argument: write drop_prompt:index"),
        ("drop_prompt:-1", "rule drop_prompt: '-1' is no index of a prompt, from 0 on"),
        ("drop_prompt:²", "rule drop_prompt: '²' is no index of a prompt"),
        ("drop_prompt:99999999999999999999", "is no index of a prompt"),
        ("advantage", "write advantage:mode, one of mean, mean_std, leave_one_out"),
        ("advantage:men", "rule advantage: unknown mode 'men', did you mean mean?"),
        ("temperature:0", "rule temperature: T is '0', expected a number above 0"),
        ("temperature", "rule temperature needs its argument: write temperature:T"),
        ("mask", "rule mask needs its argument: write mask:condition"),
        ("mask:advantage", "is a number, expected a condition"),
        ("weight:advantage < 0", "is a condition, expected a number: write where(condition, 1, 0)"),
        ("x" * 5000, "unknown rule 'xxxx"),
    ],
)
def test_what_is_no_rule(text, message):
    with pytest.raises(InputError) as raised:
        rule(text)
    found = str(raised.value)
    assert message in found
    assert found.isprintable()
    assert len(found) < 700


@given(st.one_of(st.text(max_size=60), st.sampled_from(sorted(NAMED)).flatmap(
    lambda name: st.text(max_size=40).map(lambda argument: f"{name}:{argument}")
)))  # fmt: skip
def test_any_text_is_a_rule_or_one_line(text):
    found = None
    try:
        found = rule(text).text
    except InputError as error:
        message = str(error)
    if found is None:
        assert message.isprintable()
    else:
        assert rule(found).text == found


def table(heading):
    """Cells of the rows of the page's table below a heading, without the heads."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def escaped(text):
    return text.replace("|", r"\|")


def test_the_page_lists_the_rules():
    def argument(named):
        if named.argument is None:
            return "", ""
        return f"`{named.argument}`", "" if named.default is None else f"`{named.default}`"

    assert table("The rules") == [
        [f"`{n}`", escaped(r.equation), *argument(r), ", ".join(f"`{x}`" for x in r.needs), r.source]
        for n, r in NAMED.items()
    ]
    for name, named in NAMED.items():
        assert f"\n- `{name}` {named.about}" in PAGE


def test_the_page_lists_columns_and_functions():
    assert table("Columns") == [
        [f"`{name}`", one.about, one.unit, "" if one.needs is None else f"`{one.needs}`"]
        for name, one in COLUMNS.items()
    ]
    assert table("Functions") == [
        [f"`{call}`", about] for call, about in (text.split(": ", 1) for text in FUNCTIONS.values())
    ]
    assert list(FUNCTIONS) == [text.split("(")[0] for text in FUNCTIONS.values()]
