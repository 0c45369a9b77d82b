"""Rewards on real GSM8K rows, on the traps of reading numbers, and with a user's functions."""

import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.adapters.sampling.rewards import load_reward
from funcprobe.types import InputError

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"


def gsm8k(split):
    path = GSM8K / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"GSM8K is not here ({path}); it is no part of the repository")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def score(reward, completions, rows):
    found = reward(["p"] * len(rows), completions, [[1]] * len(rows), rows)
    assert found.dtype == torch.float64
    return found.tolist()


def score_one(spec, completion, answer):
    return score(load_reward(spec, answer_column="answer"), [completion], [{"answer": answer}])[0]


@pytest.mark.parametrize("split", ["test", "train"])
def test_numeric_on_every_gsm8k_row(split):
    rows = gsm8k(split)
    assert len(rows) == {"test": 1319, "train": 7473}[split]
    answers = [row["answer"] for row in rows]
    numbers = [Decimal(a.split("####")[-1].strip().replace(",", "")) for a in answers]
    reward = load_reward("numeric", answer_column="answer")
    assert score(reward, answers, rows) == [1.0] * len(rows)
    assert score(reward, [f"It is {n + 1}." for n in numbers], rows) == [0.0] * len(rows)
    assert score(reward, [f"So: ${n:,}.00." for n in numbers], rows) == [1.0] * len(rows)


def test_math_on_gsm8k_rows():
    rows = gsm8k("test")[:60]
    answers = [row["answer"].split("####")[-1].strip() for row in rows]
    reward = load_reward("math", answer_column="answer")
    right = [rf"So the answer is \boxed{{{a}}}." for a in answers]
    assert score(reward, right, rows) == [1.0] * len(rows)
    assert score(reward, [r"\boxed{123456}"] * len(rows), rows) == [0.0] * len(rows)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("It is 19.0", "19", 1),
        ("It is 19", "#### 19.00", 1),
        ("#### 18\nAnd 5 more", "#### 18", 1),  # first number behind the mark, not the last
        ("#### 4\n#### 18", "#### 18", 1),
        ("18 it is\n####", "#### 18", 0),  # cut off behind the mark
        ("$1,234,567.50 in all", "1234567.5", 1),
        ("lakh: 12,34,567", "1234567", 1),
        ("1,234 in all", "#### 1,234.0", 1),
        ("1,23 in all", "123", 0),
        ("1,2345 in all", "2345", 1),
        ("12345,678 in all", "678", 1),
        ("a sum of 1,234,56", "56", 1),
        ("the pair is (1,2)", "12", 0),
        ("the pair is (1,2)", "2", 1),
        ("a loss of -$5", "-5", 1),
        ("a loss of $-5", "-5", 1),
        ("a loss of \u22125", "-5", 1),
        ("10-3", "3", 1),  # subtraction, not minus three
        ("x = -3", "3", 0),
        ("- 3 eggs", "3", 1),  # an item of a list
        ("about .5.", "0.5", 1),
        ("exactly 0.1", "0.10000000000000001", 0),  # equal as floats
        ("12345678901234567890123456789012", "12345678901234567890123456789011", 0),
        ("-12345678901234567890123456789012", "-12345678901234567890123456789011", 0),
        ("no number at all", "1", 0),
        ("", "1", 0),
        ("50%", "50", 1),
        ("it is 7", 7, 1),
        ("it is 0.25", 0.25, 1),
    ],
)
def test_numeric_cases(completion, answer, expected):
    assert score_one("numeric", completion, answer) == expected


@given(st.integers(-(10**9), 10**9), st.integers(0, 3), st.booleans())
def test_numeric_reads_back_any_decimal(units, places, commas):
    number = Decimal(units).scaleb(-places)
    text = f"{number:,f}" if commas else f"{number:f}"
    assert score_one("numeric", f"Well, 3 of them: {text}.", f"4 + 4\n#### {number:f}") == 1.0


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", 1),
        (r"\boxed{2}", r"2\sqrt{3}", 0),  # a bare parse of the reference reads 2
        (r"\boxed{3}", r"3\pi", 0),
        (r"\boxed{x^2+2x+1}", r"$(x+1)^2$", 1),
        (r"\boxed{(1,2)}", "$1<x<2$", 1),  # math_verify takes an interval for a relation,
        (r"\boxed{1<x<2}", "$(1,2)$", 0),  # not the other way round
        ("I pay 18 dollars.", "18 dollars", 1),
        ("no idea", "18", 0),
    ],
)
def test_math_cases(completion, answer, expected):
    assert score_one("math", completion, answer) == expected


@pytest.mark.parametrize("spec", ["numeric", "math"])
def test_unusable_references(spec):
    with pytest.raises(InputError, match="no column 'answer', its columns are: anser; did you"):
        score(load_reward(spec, answer_column="answer"), ["1"], [{"anser": "1"}])
    with pytest.raises(InputError, match="response 0: column 'answer'"):
        score_one(spec, "1", "")
    for value in (None, True, ["1"]):
        with pytest.raises(InputError, match="expected text or a number"):
            score_one(spec, "1", value)
    with pytest.raises(InputError, match=r"response 1: .*'eighteen', expected a number"):
        score(load_reward("numeric"), ["1", "2"], [{"answer": "1"}, {"answer": "eighteen"}])


def users_file(tmp_path, body):
    path = tmp_path / "my_rewards.py"
    path.write_text(body, encoding="utf-8")
    return f"{path}:f"


def call(spec, n=2):
    rows = [{"answer": str(i), "level": i} for i in range(n)]
    return load_reward(spec)(["p"] * n, ["a", "bb"][:n], [[1], [2, 3]][:n], rows)


@pytest.mark.parametrize(
    "body",
    [
        "def f(prompts, completions, completion_ids, **columns):\n"
        "    assert columns['trainer_state'] is None\n"
        "    columns['log_extra']('x', completions)\n"
        "    assert sorted(columns) == ['answer', 'level', 'log_extra', 'log_metric',"
        " 'trainer_state']\n"
        "    return [len(c) + l + len(i) for c, l, i in"
        " zip(completions, columns['level'], completion_ids)]",
        "def f(completions, level, *, completion_ids, unknown=5):\n"
        "    assert unknown == 5\n"
        "    return [len(c) + l + len(i) for c, l, i in zip(completions, level, completion_ids)]",
        "import torch\ndef f(level): return torch.tensor([2.0, 5.0])",
        "import numpy\ndef f(level): return [numpy.float32(2), numpy.int64(5)]",
        "import torch\ndef f(level): return [torch.tensor(2.0), True + 4]",
        "import numpy\ndef f(level): return [numpy.bool_(True) * 2, numpy.array([5])]",
        "class F:\n    def __call__(self, level): return [2, 5]\nf = F()",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def f(level): return [A(2).x, 5]",
    ],
)
def test_a_users_function_gets_what_it_takes(tmp_path, body):
    found = call(users_file(tmp_path, body))
    assert found.dtype == torch.float64
    assert found.tolist() == [2.0, 5.0]


def test_a_users_function_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine_1.py").write_text("def g(level): return [0.1] * len(level)")
    monkeypatch.syspath_prepend(tmp_path)
    assert call("rewards_of_mine_1:g").tolist() == [0.1, 0.1]
    with pytest.raises(InputError, match="no function 'h', its functions are: g"):
        load_reward("rewards_of_mine_1:h")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(level): return [1.0]", "returned 1 values, expected a list of 2"),
        ("def f(level): return 1.0", "returned <class 'float'>"),
        ("def f(level): pass", "returned <class 'NoneType'>"),
        ("def f(level): return [None, None]", "None .*not applicable.* for all 2 responses"),
        ("import numpy\ndef f(level): return numpy.ones((2, 2))", "returned list for response 0"),
        ("def f(level): return [1.0, 'x']", "returned str for response 1"),
        ("def f(level): return [float('nan'), 1.0]", "returned nan for response 0"),
        ("def f(level): return [0.0, float('-inf')]", "returned -inf for response 1"),
        ("def f(level): return [0.0, 10**9999]", "returned a number out of range for response 1"),
        ("def f(level): raise KeyError('deep')", "raised KeyError: 'deep'"),
        ("import sys\ndef f(level): sys.exit(3)", "raised SystemExit: 3"),
        ("def f(solution): return [1.0, 1.0]", "no column 'solution', its columns are: answer, l"),
        ("async def f(level): return [1.0, 1.0]", "is asynchronous"),
        (
            "class F:\n    async def __call__(self, level): return [1.0, 1.0]\nf = F()",
            "is asynchronous",
        ),
        ("async def f(solution_str, ground_truth): return 1.0", "is asynchronous"),
        ("f = 3", "has no function 'f'"),
        ("import no_such_module_9", "raised ModuleNotFoundError"),
        ("def f(:", "raised SyntaxError"),
    ],
)
def test_a_users_function_that_cannot_be_used(tmp_path, body, message):
    with pytest.raises(InputError, match=message) as caught:
        call(users_file(tmp_path, body))
    assert "\n" not in str(caught.value)


def test_none_is_nan_where_others_are_numbers(tmp_path):
    found = call(users_file(tmp_path, "def f(level): return [None, -2]"))
    assert found[0].isnan()
    assert found[1] == -2


@pytest.mark.parametrize("asked", ["prompts, completions, **_", "completions, prompts"])
def test_messages_where_the_dataset_is_of_chats(tmp_path, asked):
    body = (
        f"def f({asked}): return [len(c[0]['content']) + len(p) for c, p in zip(completions, prompts)]"
    )
    reward = load_reward(users_file(tmp_path, body), conversational=True)
    chats = [[{"role": "user", "content": "p"}]] * 2
    assert reward(chats, ["abc", ""], [[1], [2]], [{}, {}]).tolist() == [4.0, 1.0]
    with pytest.raises(InputError, match="only to functions with TRL's signature"):
        load_reward("numeric", conversational=True)


# verl's signature. GSM8K as verl 0.9.1 scores it (verl/utils/reward_score/gsm8k.py), in other words:
# the last "#### number" in the final 300 characters, commas dropped, compared as text.
VERL = """
import re

SEEN = []

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    SEEN.append((data_source, solution_str, ground_truth, extra_info))
    found = re.findall(r"#### (-?[0-9.,]+)", solution_str[-300:])
    right = bool(found) and found[-1].replace(",", "") == ground_truth
    return {"acc": not right, "score": float(right)} if data_source == "dict" else right

def f(solution_str, ground_truth, method="strict", format_score=0.1):
    return compute_score("", solution_str, ground_truth) or format_score

def g(*, ground_truth, solution_str, **rest):
    assert sorted(rest) == ["data_source", "extra_info"]
    return len(rest["extra_info"])

def h(solution_str, ground_truth, data_source, router): return 1
"""


def verl_rows(source="openai/gsm8k"):
    """As verl's data preparation writes them (examples/data_preprocess/gsm8k.py)."""
    return [
        {
            "data_source": source,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": "train", "index": i, "answer": f"so it is\n#### {truth}"},
            "answer": "not this",
        }
        for i, truth in enumerate(["1200", "7", "-3"])
    ]


@pytest.mark.parametrize("source", ["openai/gsm8k", "dict"])
def test_a_function_of_verls(tmp_path, source):
    spec = users_file(tmp_path, VERL).replace(":f", ":compute_score")
    rows = verl_rows(source)
    completions = ["#### 7\n#### 1,200", "7", "#### -3" + 300 * " "]
    assert score(load_reward(spec), completions, rows) == [1.0, 0.0, 0.0]
    seen = sys.modules["funcprobe_reward_my_rewards"].SEEN
    assert [x[:3] for x in seen] == [
        (source, text, row["reward_model"]["ground_truth"])
        for text, row in zip(completions, rows, strict=True)
    ]
    added = {"num_turns": None, "rollout_reward_scores": {}}  # by verl's reward managers
    assert [x[3] for x in seen] == [row["extra_info"] | added for row in rows]
    assert rows == verl_rows(source)  # and not into the dataset's rows


def test_a_function_of_verls_on_other_data(tmp_path):
    spec = users_file(tmp_path, VERL)
    rows = [{"truth": "18"}, {"truth": "18", "reward_model": {"style": "rule"}}]
    reward = load_reward(spec, answer_column="truth")
    assert score(reward, ["#### 18", "18"], rows) == [1.0, 0.1]
    rest = load_reward(spec.replace(":f", ":g"))
    assert score(rest, ["", "", ""], verl_rows()) == [5.0] * 3


@pytest.mark.parametrize(
    ("row", "name", "said"),
    [
        (
            {"data_source": "a"},
            "f",
            "response 0 has no ground truth, neither in verl's reward_model nor",
        ),
        (
            {"answer": "1"},
            "compute_score",
            "response 0 has no column 'data_source', its columns are: a",
        ),
        ({"answer": "1", "data_source": "a"}, "h", "no column 'router'"),
        ({"answer": "1", "data_source": "", "extra_info": "{}"}, "f", "'extra_info' contains str"),
    ],
)
def test_rows_that_a_function_of_verls_cannot_use(tmp_path, row, name, said):
    reward = load_reward(users_file(tmp_path, VERL).replace(":f", f":{name}"))
    with pytest.raises(InputError) as caught:
        score(reward, ["1"], [row])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("{'acc': 1}", "returned a dict without score for response 0, its keys are: acc;"),
        ("None", "returned NoneType for response 0"),
        ("{'score': '1'}", "returned str for response 0"),
        ("float('nan')", "returned nan for response 0"),
        ("1 / 0", "my_rewards.py:f', response 0, raised ZeroDivisionError"),
    ],
)
def test_scores_that_are_none(tmp_path, result, said):
    spec = users_file(tmp_path, f"def f(solution_str, ground_truth): return {result}")
    with pytest.raises(InputError) as caught:
        score(load_reward(spec), ["1"], [{"answer": "1"}])
    assert said in str(caught.value)
    with pytest.raises(InputError, match="only to functions with TRL's signature"):
        load_reward(spec, conversational=True)


def test_the_users_exception_is_the_cause(tmp_path):
    with pytest.raises(InputError) as caught:
        call(users_file(tmp_path, "def f(level): raise KeyError('deep')"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_column_with_the_name_of_an_argument(tmp_path):
    reward = load_reward(users_file(tmp_path, "def f(completions): return [1.0]"))
    with pytest.raises(InputError, match="column 'completions' has the name of an argument"):
        reward(["p"], ["c"], [[1]], [{"completions": "mine"}])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numerics", "unknown reward 'numerics': expected one of numeric, math"),
        (":f", "unknown reward"),
        ("module:", "unknown reward"),
        ("no_such_module_9:f", "ModuleNotFoundError.*give a file by its path"),
        ("no/such/file.py:f", "file not found: no/such/file.py"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(InputError, match=message):
        load_reward(spec)


def test_lists_of_different_lengths():
    with pytest.raises(InputError, match="one entry per response"):
        load_reward("numeric")(["p"], ["1", "2"], [[1]], [{"answer": "1"}])
