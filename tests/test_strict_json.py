"""One JSON reader: what it accepts is what Python's accepts, less what would be silent."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.adapters.strict_json import parse

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
trees = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3))


@given(trees)
def test_values_come_back(value):
    assert parse(json.dumps(value), nan=True) == value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "Expecting property name"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' occurs twice"),
        (r'{"\ud800": 1}', r"key '\\ud800' is not Unicode text"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("9" * 5000, "Exceeds the limit"),
        ("[" * 10**6, "maximum recursion"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(ValueError, match=said) as error:
        parse(given)
    assert "\n" not in str(error.value)


def test_nan_is_a_number_where_it_is_asked_for():
    assert math.isnan(parse("[NaN]", nan=True)[0])
    assert parse("[Infinity, -Infinity]", nan=True) == [math.inf, -math.inf]
