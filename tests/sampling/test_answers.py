"""Answers as people write them: many forms of one number, several values, boxes, bare formulas."""

from decimal import Decimal

import pytest

from funcprobe.adapters.sampling.rewards import load_reward
from funcprobe.types import InputError


def score(spec, completion, answer):
    return float(load_reward(spec)(["q"], [completion], [[1]], [{"answer": answer}])[0])


MINUSES = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
THOUSANDS = [
    "9750",
    "9,750",
    "9{,}750",
    r"9\,750",
    r"9\ 750",
    r"9\;750",
    r"9\!750",
    r"9,\!750",
    "9\u00a0750",
    "9\u2009750",
    "9\u202f750",
    "9'750",
    "9\u2019750",
]
PLACES = ["She earns {}.", "$\\boxed{{{}}}$", "so x={} in all", "#### {}", "It is ({})", "**{}**"]


@pytest.mark.parametrize("digits", THOUSANDS)
def test_thousands_in_every_notation(digits):
    for place in PLACES:
        for minus in ("", "-", "\u2212"):
            text, sign = place.format(minus + digits), "-" if minus else ""
            assert score("numeric", text, f"{sign}9750") == 1, text
            assert score("numeric", text, "750") == 0, text
            assert score("numeric", text, "9750" if minus else "-9750") == 0, text
    assert score("numeric", "9750", digits) == 1  # as a reference
    assert score("math", rf"\boxed{{{digits}}}", "9750") == 1
    assert score("math", rf"\boxed{{{digits}}}", "750") == 0
    assert score("math", r"\boxed{9750}", digits) == 1


@pytest.mark.parametrize("minus", MINUSES)
def test_minus_in_every_notation(minus):
    for number in ("18", r"\$18", "$18", "\u20ac18", "\u20ac 18", "\u00a318", r"\$\,18"):
        text = f"a loss of {minus}{number}"
        assert score("numeric", text, "-18") == 1, text
        assert score("numeric", text, "18") == 0, text
    assert score("numeric", f"a loss of ${minus}18", "-18") == 1
    assert score("numeric", f"from 10{minus}18", "18") == 1  # a range, or a subtraction
    assert score("numeric", f"{minus} 18 eggs", "18") == 1  # an item of a list
    assert score("numeric", "-18", f"{minus}18") == 1
    assert score("math", rf"\boxed{{{minus}18}}", "-18") == 1
    assert score("math", r"\boxed{-18}", f"{minus}18") == 1
    assert score("math", rf"\boxed{{{minus}18}}", "18") == 0


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("1{,}234{,}567", "1234567", 1),
        (r"1\,234\,567.50", "1234567.5", 1),
        ("3{,}14", "3.14", 1),  # LaTeX's decimal comma
        ("1234{,}567", "1234.567", 1),
        ("9 750", "750", 1),  # two numbers: spaces separate words first of all
        ("{1,2}", "2", 1),
        ("7\u20139", "9", 1),
        ("18%", "18", 1),
        (r"18\%", "18%", 1),
        ("18", "18%", 1),
        ("18 \u20ac", "18 \u20ac", 1),
        ("18", "$18", 1),
        ("18", "$18$", 1),
        ("18", "+18", 1),
        ("-18", r"-\$18.", 1),
        ("90", r"90^\circ", 1),
        ("90 degrees", "90\u00b0", 1),
        ("x^{-2}+18", "18", 1),
        ("18 (checked twice)", "18", 1),
        ("18 (checked in 2 ways)", "18", 0),  # the last number, as documented
        ("18 (checked in 2 ways)\n#### 18 eggs, or 1.5 dozen", "18", 1),  # the first after the mark
    ],
)
def test_numeric_forms(completion, answer, expected):
    assert score("numeric", completion, answer) == expected


@pytest.mark.parametrize("answer", ["18 or 19", "18-19", "2 1/2", "eighteen", "18 19", "9.750,00"])
def test_numeric_references_that_are_no_number(answer):
    with pytest.raises(InputError, match="expected a number"):
        score("numeric", "18", answer)


def test_numbers_in_other_scripts_of_currency_round_trip():
    for number in (Decimal("-1234567.25"), Decimal("0.5"), Decimal("1000")):
        for text in (f"{number:,}", f"{number:,}".replace(",", "{,}"), f"{number:,} \u20ac"):
            assert score("numeric", f"Of 3 it is {text}", str(number)) == 1, text


@pytest.mark.parametrize(
    ("answer", "wholes", "parts"),
    [
        ("27 and 64", [r"\boxed{27, 64}", r"$27$ and $64$", r"\boxed{64 \text{ and } 27}"], "27 64"),
        ("3 or 5", [r"\boxed{3, 5}", r"\boxed{3}, \boxed{5}"], "3 5"),
        ("x=2 or x=3", [r"\boxed{x=2 \text{ or } x=3}", r"\boxed{2, 3}"], "2 3 x=2"),
        ("-4 or 4", [r"\boxed{-4, 4}", r"\boxed{\pm 4}"], "4 -4"),
        ("1, 2, and 3", [r"\boxed{1,2,3}", r"\boxed{3, 1, 2}"], "1 3 1,2 6"),
        ("1,2,3", [r"\boxed{1,2,3}"], "3 1.2"),
        (r"\frac{1}{2} and \frac{1}{3}", [r"\boxed{\frac13, 0.5}"], r"\frac12 3"),
        ("$5 and $10", [r"\boxed{5, 10}", r"\boxed{\$5, \$10}"], "5 10"),
        (r"3 \text{ or } 5", [r"\boxed{3 \text{ or } 5}"], "3 5"),
        (r"\boxed{27} and \boxed{64}", [r"\boxed{27, 64}"], "27 64"),
        ("(2,3) and (4,5)", [r"\boxed{(2,3), (4,5)}"], "(2,3) (4,5) 5"),
    ],
)
def test_math_references_of_several_values(answer, wholes, parts):
    for whole in wholes:
        assert score("math", whole, answer) == 1, whole
    for part in parts.split():
        assert score("math", rf"\boxed{{{part}}}", answer) == 0, part


@pytest.mark.parametrize(
    "answer",
    [
        "2 hours 30 minutes",
        "5 feet 11 inches",
        "18 dollars and 50 cents",
        r"2 \text{ h } 30 \text{ min}",
        r"\boxed{2 \text{ hours } 30 \text{ minutes}}",
        "either 3 or 5",
        "between 3 and 5 apples",
        "July 4, 2021",
        "27 64",
        r"0.\overline{3}",
    ],
)
def test_math_references_that_would_be_read_in_part(answer):
    with pytest.raises(InputError, match="cannot be read as an answer"):
        score("math", r"\boxed{30}", answer)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        # a formula outside delimiters
        (r"The answer is 2\sqrt{3}.", r"2\sqrt{3}", 1),
        (r"The answer is 2\sqrt{3}.", "2", 0),
        (r"The answer is a 2\sqrt{3} of it", r"\sqrt{12}", 1),
        (r"so x = \frac{1}{2} + 3", "3.5", 1),
        (r"the point (3, \frac{\pi}{2})", r"(3, \frac{\pi}{2})", 1),
        ("2sqrt(3)", r"2\sqrt{3}", 1),
        ("2pi", r"2\pi", 1),
        ("2pi", "2", 0),
        (r"\boxed{2\pi}", "2pi", 1),
        (r"\boxed{2}", "2pi", 0),
        (r"Half, \frac{1}{2}, of 36 is 18", "18", 1),  # a number follows: it is the answer
        # mixed numbers
        (r"\boxed{2 1/2}", "2.5", 1),
        (r"\boxed{2.5}", "2 1/2", 1),
        (r"\boxed{2\frac{1}{2}}", r"2\frac{1}{2}", 1),
        # a box that is not closed: cut off before the answer
        (r"\boxed{5}, so that \boxed{7", "5", 0),
        (r"\boxed{5}, so that \boxed{\frac{7}{2}", "5", 0),
        (r"\boxed{7}, not \boxed{5}", "5", 0),
        (r"so that \boxed{\{5\}}", r"\{5\}", 1),
        (r"\boxed{5}. In words: five}", "5", 1),
        # one value with its unit
        (r"\boxed{12}", r"12 \text{ cm}^2", 1),
        (r"\boxed{18}", "18 cm^2", 1),
        (r"\boxed{0.75}", "3/4 cup", 1),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3} cm", 1),
        (r"\boxed{18}", "18%", 1),
        (r"\boxed{18}", r"\$18", 1),
        (r"\boxed{-18}", "-$18", 1),
        (r"\boxed{18}", "-$18", 0),
        (r"\boxed{18}", "18 \u20ac", 1),
        (r"\boxed{0.5}", ".5", 1),
        # a worked solution as the reference
        (r"\boxed{8}", r"5 apples and 3 pears are \boxed{8} fruits, not 9.", 1),
        (r"\boxed{3}", r"\log_2 8", 1),
    ],
)
def test_math_forms(completion, answer, expected):
    assert score("math", completion, answer) == expected


@pytest.mark.parametrize(
    "completion",
    [
        r"We have $x^2 = 4$ and $x > 0$, so $x = 2$. The answer is $\boxed{2}$.",
        r"Then \[ \frac{3 \pm \sqrt{9 - 8}}{2} \] and the larger root is \boxed{2}.",
        "Step 1: 3 * 4 = 12. Step 2: 12 / 6 = 2. The final answer is 2.",
        r"There are \(\binom{4}{2} = 6\) ways; half a third of 12 is 2, so I answer **2**.",
        "The answer is $2.00.",
        "1,234 apples - 1,232 apples = 2 apples",
        "no answer",
        "",
        r"\boxed{\text{two}}",
        r"\boxed{(1, 2)}",
    ],
)
def test_common_completions_score_as_with_math_verify_itself(completion):
    from math_verify import parse, verify

    for answer in ("2", "6", "12", "(1,2)"):
        expected = float(verify(parse(f"${answer}$"), parse(completion)))
        assert score("math", completion, answer) == expected
