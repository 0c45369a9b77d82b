"""Functions of the user's, from files and modules, whatever they are for."""

import sys

import pytest

from funcprobe.adapters.sampling.functions import load_function, users_code
from funcprobe.types import InputError

EXPECTED = "a function of (logp, entropy, batch)"


def load(spec):
    return load_function(str(spec), "objective.loss", EXPECTED)


def test_two_files_of_one_name_stay_apart(tmp_path):
    """A reward and a loss in files of the same name, or in one: each is the one that was named."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        body = f"WHERE = {folder!r}\ndef f(): return WHERE\n"
        (tmp_path / folder / "mine.py").write_text(body, encoding="utf-8")
    loss = load(f"{tmp_path / 'a' / 'mine.py'}:f")
    reward = load_function(f"{tmp_path / 'b' / 'mine.py'}:f", "reward", "a reward")
    assert (loss(), reward()) == ("a", "b")
    assert sys.modules[loss.__module__].f is loss
    assert sys.modules[reward.__module__].f is reward


def test_classes_of_the_file_can_be_looked_up(tmp_path):
    body = (
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass\nclass Settings:\n    beta: 'ClassVar[float]' = 0.5\n"
        "def f(): return Settings.beta\n"
    )
    (tmp_path / "with_classes.py").write_text(body, encoding="utf-8")
    assert load(f"{tmp_path / 'with_classes.py'}:f")() == 0.5


@pytest.mark.parametrize(
    ("body", "spec", "message"),
    [
        ("", "ppo", "unknown objective.loss 'ppo': expected a function of"),
        ("", "FILE:", "unknown objective.loss"),
        ("def g(): pass\ndef f2(): pass\nf = 3\n", "FILE:f", "no function 'f', .* are: f2, g$"),
        ("x = 1\n", "FILE:f", "no function 'f', its functions are: none"),
        ("async def f(): pass\n", "FILE:f", "objective.loss '.*:f' is asynchronous"),
        ("1 / 0\n", "FILE:f", "importing .*users.py raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(2)\n", "FILE:f", "raised SystemExit: 2"),
        ("", "nowhere/users.py:f", "file not found: nowhere/users.py"),
        ("", "no_such_module_8:f", r"give a file by its path, such as \./no_such_module_8.py:f"),
    ],
)
def test_what_names_no_function_is_one_line(tmp_path, body, spec, message):
    path = tmp_path / "users.py"
    path.write_text(body, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load(spec.replace("FILE", str(path)))
    assert "\n" not in str(caught.value)


def test_an_exception_of_several_lines_is_put_on_one():
    def raises():
        raise ValueError("a\n  b\n")

    with pytest.raises(InputError, match=r"^calling it raised ValueError: a b; see here$") as caught:
        users_code(raises, "calling it", "; see here")
    assert isinstance(caught.value.__cause__, ValueError)
