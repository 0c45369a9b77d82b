"""Numbers of printed sentences as the page writes them; what others wrote stays as it is."""

import re

import pytest
from markupsafe import Markup

pytest.importorskip("jinja2")

from funcprobe.adapters.report.typeset import typeset

KEPT = [
    "policy-2 at step 20 of toy-4/checkpoint-20, 2026-11-30",
    "prompt 210 ('-5.9e-03 = 1e-7', 3 of 8 right)",
    'prompt 1 ("it\'s -5.9e-03")',
    "funcprobe run x.toml --set measure.eta=1e-7",
    "entropy_bonus:1e-07 keeps the entropy; 3 of 8, version 1.2.3-4",
]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("this batch's -5.9e-03, momentum", "this batch's −0.0059, momentum"),
        ("+9.3e-05 ± 8.0e-05", "+9.3\u00a0×\u00a010^−5 ± 8.0\u00a0×\u00a010^−5"),
        ("(-0.314 to +0.02)", "(−0.314 to +0.02)"),
        ("a residual of 0e+00, 2e-16", "a residual of 0, 2\u00a0×\u00a010^−16"),
        ("< 1e-09; odds 1e+582", "< 1\u00a0×\u00a010^−9; odds 1\u00a0×\u00a010^582"),
        ("1.5e+03 at lr 6.66667e-05.", "1500 at lr 6.66667\u00a0×\u00a010^−5."),
    ],
)
def test_numbers_are_the_pages(printed, shown):
    plain = re.sub(r"<sup>(.*?)</sup>", r"^\1", typeset(printed))
    assert Markup(plain).unescape() == shown


@pytest.mark.parametrize("text", KEPT)
def test_names_commands_and_quotations_stay(text):
    assert Markup(typeset(text)).unescape() == text


def test_texts_are_escaped_and_made_visible():
    shown = typeset("'</p><img src=x onerror=alert(1)>' <b> \u202e -1e-9")
    assert "<b>" not in shown
    assert "<img" not in shown
    assert "⟨U+202E⟩ −1\u00a0×\u00a010<sup>−9</sup>" in shown
    assert typeset(Markup("<b>-1e-9</b>")) == "<b>-1e-9</b>"
