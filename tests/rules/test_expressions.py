"""Expressions over U's tokens: against a reference on floats, and what is not one is refused."""

import bisect
import contextlib
import itertools
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe import InputError
from funcprobe.rules.columns import COLUMNS, column
from funcprobe.rules.expressions import evaluate
from funcprobe.rules.grammar import DEEPEST, FUNCTIONS, LONGEST, parse
from funcprobe.rules.registry import rule
from support.rule_cases import case

CASE = case()
INPUTS = CASE.inputs
VALUES = {
    name: {at: float(column(name, INPUTS)[at]) for at in CASE.tokens} for name in COLUMNS
}  # checked against loops below


def test_columns_are_loops():
    """Every column at every token in the loss, from the inputs in plain Python."""
    i = INPUTS
    logp, h, old, ref = (
        x.tolist() for x in (i.stats.logp_NR, i.stats.entropy_NR, i.old_logp_NR, i.ref_logp_NR)
    )
    expected = {
        "advantage": lambda n, k: i.advantage_NR[n, k].item(),
        "reward": lambda n, k: i.reward_N[n].item(),
        "logp": lambda n, k: logp[n][k],
        "surprisal": lambda n, k: -logp[n][k],
        "probability": lambda n, k: math.exp(logp[n][k]),
        "entropy": lambda n, k: h[n][k],
        "position": lambda n, k: k,
        "length": lambda n, k: (5, 3, 6, 2, 4, 6)[n],
        "prompt": lambda n, k: (3, 3, 8, 8, 8, 3)[n],
        "sequence": lambda n, k: n,
        "old_logp": lambda n, k: old[n][k],
        "ratio": lambda n, k: math.exp(logp[n][k] - old[n][k]),
        "ref_logp": lambda n, k: ref[n][k],
        "coefficient": lambda n, k: i.update.coef_NR[n, k].item(),
        "share": lambda n, k: i.share_NR[n, k].item(),
        "marginal": lambda n, k: i.marginal_NR[n, k].item(),
    }
    assert expected.keys() == COLUMNS.keys()
    for name, value in expected.items():
        assert column(name, INPUTS).dtype == torch.float64
        for at in CASE.tokens:
            assert VALUES[name][at] == pytest.approx(value(*at), rel=1e-14, abs=0), (name, at)


@pytest.mark.parametrize("name", [name for name, one in COLUMNS.items() if one.needs is not None])
def test_a_column_that_the_inputs_lack(name):
    bare = INPUTS._replace(**{COLUMNS[name].needs: None})
    with pytest.raises(
        InputError, match=rf"^{name} needs {COLUMNS[name].needs}, which is None: supply"
    ):
        evaluate(parse(f"{name} > 0", "condition"), bare)
    assert rule(f"mask:{name} > 0 or length > 2").needs == (COLUMNS[name].needs,)


# A tree is text, its value by token in plain Python, and whether its value is a condition.
def reference(tree):
    """{token: value} of a tree, by Python's floats; OverflowError and the like where it has none."""
    kind, *parts = tree
    if kind == "number":
        return dict.fromkeys(CASE.tokens, parts[0])
    if kind == "column":
        return VALUES[parts[0]]
    values = [reference(part) for part in parts]
    if kind in {"mean", "rank", "quantile"}:
        each = sorted(values[0].values())
        if kind == "mean":
            return dict.fromkeys(CASE.tokens, math.fsum(each) / len(each))
        if kind == "rank":
            return {at: bisect.bisect_left(each, x) / len(each) for at, x in values[0].items()}
        place = next(iter(values[1].values())) * (len(each) - 1)
        low = math.floor(place)
        high = min(low + 1, len(each) - 1)
        return dict.fromkeys(CASE.tokens, each[low] + (place - low) * (each[high] - each[low]))
    return {at: OPERATIONS[kind](*(value[at] for value in values)) for at in CASE.tokens}


OPERATIONS = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "negative": lambda x: -x,
    "square": lambda x: x**2,
    "abs": abs,
    "exp": math.exp,
    "log": math.log,
    "min": min,
    "max": max,
    "where": lambda c, x, y: x if c else y,
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "not": lambda x: not x,
}


def written(tree):
    kind, *parts = tree
    if kind in {"number", "column"}:
        return repr(parts[0]) if kind == "number" else parts[0]
    texts = [written(part) for part in parts]
    if kind in FUNCTIONS:
        return f"{kind}({', '.join(texts)})"
    if kind == "negative":
        return f"-({texts[0]})"
    if kind == "square":
        return f"({texts[0]})**2"
    if kind == "not":
        return f"not ({texts[0]})"
    return f"({texts[0]}) {kind} ({texts[1]})"


leaves = st.one_of(
    st.tuples(st.just("number"), st.floats(0, 100).map(lambda x: round(x, 3))),
    st.tuples(st.just("column"), st.sampled_from(sorted(COLUMNS))),
)


def grown(number):
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "/", "min", "max"]), number, number),
        st.tuples(st.sampled_from(["negative", "square", "abs", "exp", "log", "mean", "rank"]), number),
        st.tuples(st.just("quantile"), number, st.tuples(st.just("number"), st.floats(0, 1))),
        st.tuples(st.just("where"), conditions(number), number, number),
    )


def conditions(number):
    compared = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), number, number)
    return st.one_of(
        compared,
        st.tuples(st.sampled_from(["and", "or"]), compared, compared),
        st.tuples(st.just("not"), compared),
    )


trees = st.recursive(leaves, grown, max_leaves=6)


@given(st.one_of(trees, conditions(trees)))
@settings(max_examples=100)
def test_values_are_those_of_plain_python(tree):
    text = written(tree)
    kind = (
        "condition" if tree[0] in {"<", "<=", ">", ">=", "==", "!=", "and", "or", "not"} else "number"
    )
    if len(text) > LONGEST:
        with pytest.raises(InputError, match="characters, at most"):
            parse(text, kind)
        return
    expression = parse(text, kind)
    assert expression.text == " ".join(text.split())
    try:
        expected = reference(tree)
        defined = all(math.isfinite(x) for x in expected.values())
    except (OverflowError, ZeroDivisionError, ValueError):
        defined = False
    try:
        found = evaluate(expression, INPUTS)
    except InputError:
        # Python raises for exp(1000), or 1 / 0; so may an operand whose value is not used.
        assert not defined or "where" in text or "max" in text or "min" in text
        return
    if not defined:
        # exp(1000) is inf on the way to a number, as in 1 / exp(1000), and no error.
        assert found.isfinite().all()
        return
    assert not found[~INPUTS.mask_NR].any()
    if kind == "condition":
        # Two sides equal to rounding may compare otherwise.
        differ = [at for at in CASE.tokens if bool(found[at]) != expected[at]]
        assert not differ or near_ties(tree)
        return
    if not near_ties(tree):
        # Some operations, each of relative error 1e-15, of values whose differences may cancel.
        scale = max(1.0, *(abs(x) for x in expected.values()))
        for at in CASE.tokens:
            assert float(found[at]) == pytest.approx(expected[at], rel=1e-9, abs=1e-9 * scale)


def near_ties(tree):
    """Whether some comparison, or order, in the tree is between values equal to rounding."""
    if tree[0] in {"number", "column"}:
        return False
    if any(near_ties(part) for part in tree[1:]):
        return True
    if tree[0] in {"<", "<=", ">", ">=", "==", "!="}:
        x, y = map(reference, tree[1:])
        return any(close(x[at], y[at]) for at in CASE.tokens)
    if tree[0] == "rank" and tree[1][0] not in {"number", "column"}:
        each = sorted(reference(tree[1]).values())
        return any(close(x, y) for x, y in itertools.pairwise(each))
    return False


def close(x, y):
    return math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9)


def test_functions_over_all_tokens():
    """On the numbers of the tokens in the loss alone, whatever is off the mask."""
    values = [VALUES["entropy"][at] for at in CASE.tokens]
    h_NR = torch.where(INPUTS.mask_NR, INPUTS.stats.entropy_NR, math.nan)
    inputs = INPUTS._replace(stats=INPUTS.stats._replace(entropy_NR=h_NR))
    at = CASE.tokens[0]

    def value(text):
        return float(evaluate(parse(text, "number"), inputs)[at])

    assert value("mean(entropy)") == pytest.approx(sum(values) / len(values), rel=1e-14)
    for q in (0, 0.1, 0.5, 0.77, 1):
        theirs = torch.quantile(torch.tensor(values, dtype=torch.float64), q)
        assert value(f"quantile(entropy, {q})") == pytest.approx(float(theirs), rel=1e-14)
    ranks = evaluate(parse("rank(entropy)", "number"), inputs)
    for place, n in zip(CASE.tokens, values, strict=True):
        assert float(ranks[place]) == sum(x < n for x in values) / len(values)
    assert evaluate(parse("rank(entropy) >= 0.75", "condition"), inputs).sum() == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("1 - 2 - 3", -4),
        ("8 / 4 / 2", 1),
        ("1 + 2 * 3", 7),
        ("where(not 1 < 2 or 3 > 2 and 1 == 1, 1, 0)", 1),
        ("where(1 < 2 < 3 != 4, 1, 0)", 1),
        ("where(1 < 3 < 2, 1, 0)", 0),
        ("max(1, 2, 3) - min(4, 0.5, 2)", 2.5),
        (".5 + 1. + 1e2 + 1E-1", 101.6),
        ("+1", 1),
        ("  abs(\n-3 )\t", 3),
        ("1 / exp(1000)", 0),
    ],
)
def test_precedence_is_pythons(text, expected):
    found = evaluate(parse(text, "number"), INPUTS)
    assert float(found[CASE.tokens[0]]) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the expression is empty"),
        (" \n ", "the expression is empty"),
        ("advntage < 0", "unknown column 'advntage', did you mean advantage?"),
        ("advantage", "is a number, expected a condition: compare it"),
        ("entropy and reward > 0", "'entropy' is a number, expected a condition"),
        ("(entropy > 1) + 1 > 0", "'entropy > 1' is a condition, expected a number"),
        ("not entropy", "'entropy' is a number, expected a condition"),
        ("(entropy < 1) < 1", "'entropy < 1' is a condition, expected a number"),
        ("where(entropy, 1, 0) > 0", "'entropy' is a number, expected a condition"),
        ("sin(entropy) > 0", "unknown function 'sin', did you mean min?"),
        ("log > 0", "log is a function, log(x): natural logarithm"),
        ("log() > 0", "0 arguments of log(x)"),
        ("log(1, 2) > 0", "2 arguments of log(x)"),
        ("max(1) > 0", "1 arguments of max(x, y, ...)"),
        ("quantile(entropy) > 0", "1 arguments of quantile(x, q)"),
        ("quantile(entropy, 1.1) > 0", "q of quantile(x, q) is '1.1', expected a number from 0 to 1"),
        ("quantile(entropy, reward) > 0", "q of quantile(x, q) is 'reward'"),
        ("quantile(entropy, -0.1) > 0", "q of quantile(x, q) is '-0.1'"),
        ("quantile(entropy, None) > 0", "None is no number and no column"),
        ("True", "True is no number and no column"),
        ("1e999 > 0", "a number beyond 1.8e308"),
        (f"{'9' * 400} > 0", "a number beyond 1.8e308"),
        ("entropy > 1 > ", "cannot be read: invalid syntax"),
        ("entropy >", "cannot be read"),
        ("(" * 300, "cannot be read"),
        ("-" * 200 + "1 > 0", f"nests more than {DEEPEST} operations"),
        ("+".join(["1"] * 40) + " > 0", f"nests more than {DEEPEST} operations"),
        ("not " * 40 + "1 > 0", f"nests more than {DEEPEST} operations"),
        ("1 > 0" + " " * 10 + "# " + "x" * 600, "characters, at most"),
        ("entropy > 1 # note", "cannot be read at '# note'"),
        ("entropy = 1", "cannot be read at '= 1'"),
        ("entropy := 1", "cannot be read at ':= 1'"),
        ("entropy.real > 1", "cannot be read at '.real > 1'"),
        ("entropy[0] > 1", "cannot be read at '[0] > 1'"),
        ("'a' > 1", "cannot be read at"),
        ("0x10 > 1", "cannot be read at '0x10 > 1'"),
        ("1_000 > 1", "cannot be read at '1_000 > 1'"),
        ("1j > 1", "cannot be read at '1j > 1'"),
        ("1if 1 else 2", "cannot be read at '1if 1 else'"),
        ("1 // 2 > 0", "FloorDiv is not part of an expression"),
        ("entropy % 2 > 0", "cannot be read at '% 2 > 0'"),
        ("1 if entropy > 0 else 2", "IfExp is not part of an expression"),
        ("entropy is reward", "Is is not part of an expression"),
        ("entropy in reward", "In is not part of an expression"),
        ("entropy, reward", "Tuple is not part of an expression"),
        ("(yield entropy)", "Yield is not part of an expression"),
        ("max(*entropy) > 0", "1 arguments of max"),
        ("max(*entropy, 1) > 0", "Starred is not part of an expression"),
        ("abs(x for x in entropy) > 0", "GeneratorExp is not part of an expression"),
        ("abs(1)(2) > 0", "Call is not part of an expression"),
        ("__import__(entropy) > 0", "unknown function '__import__'"),
        ("eval(entropy) > 0", "unknown function 'eval'"),
        ("ｅntropy > 0", "cannot be read at 'ｅntropy > '"),
        ("entropy > ٣", "cannot be read at '٣'"),
        ("entropy\0 > 1", "cannot be read at"),
        ("entropy\x1b[2J > 1", "cannot be read at"),
    ],
)
def test_what_is_no_expression(text, message):
    with pytest.raises(InputError) as raised:
        parse(text, "condition")
    assert message in str(raised.value)
    require_one_line(str(raised.value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9 ** 9 ** 9", "'9 ** 9 ** 9' is inf at token 0 of response 0"),
        ("log(0)", "'log(0)' is -inf at token 0 of response 0"),
        ("reward / reward", "'reward / reward' is nan at token 0 of response 1"),
        ("log(position)", "'log(position)' is -inf at token 0 of response 0"),
        ("mean(log(position))", "'log(position)' is -inf at token 0 of response 0"),
        ("where(log(position) < 0, 1, 0)", "'log(position)' is -inf at token 0 of response 0"),
        ("advantage ** 0.5", "'advantage ** 0.5' is nan at token 0 of response 1"),
    ],
)
def test_a_value_that_is_not_finite_names_its_token(text, message):
    with pytest.raises(InputError) as raised:
        evaluate(parse(text, "number"), INPUTS)
    assert message in str(raised.value)
    require_one_line(str(raised.value))


def require_one_line(message):
    assert message.isprintable()
    assert len(message) < 700


EVENTS: list[str] = []
WATCHED = re.compile(
    r"exec|import|open|os\..*|subprocess.*|socket.*|ctypes.*|code.*|marshal.*|pickle.*"
)


def watch(event, _):
    if WATCHED.fullmatch(event):
        EVENTS.append(event)


PIECES = (
    "advantage entropy log ( ) , . [ ] { } ' \" : ; = == < > + - * / ** not and or if else for in",
    "lambda import __import__ exec eval open os system 1 0 9 1e9 99999999 0.5 \\ \n \0 # @ % & | ^ ~ !",
    "True None where quantile rank mean max __class__ f'{1}' 1j 0x1 _ é",
)
pieces = st.sampled_from([piece for line in PIECES for piece in line.split(" ")])


@pytest.fixture(scope="module")
def watched():
    """What the interpreter's audit events say is run, opened or imported, after a first expression."""
    sys.addaudithook(watch)
    for text in ("advantage < 0", "advantage <", "lambda"):
        with contextlib.suppress(InputError):
            evaluate(parse(text, "condition"), INPUTS)
    return EVENTS


@given(
    st.one_of(
        st.text(max_size=80), st.lists(pieces, max_size=25).map(" ".join), st.lists(pieces).map("".join)
    )
)
@settings(max_examples=100)
def test_hostile_text_runs_nothing(watched, text):
    for kind in ("condition", "number"):
        before = len(watched)
        try:
            evaluate(parse(text, kind), INPUTS)
        except InputError as error:
            require_one_line(str(error))
        assert watched[before:] == []


def test_the_watch_sees(watched):
    before = len(watched)
    exec("1")
    assert watched[before:] == ["exec"]
