"""What `funcprobe whatif` prints is a screen, and no number of its table is cut off."""

import io

import pytest
from rich.console import Console

from funcprobe.adapters import whatif as command
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results.whatif_sections import WhatIf
from funcprobe.adapters.results.whatif_table import Scale, print_whatif
from support.checkpoints import sets


@pytest.fixture(scope="module")
def document(checkpoint, tmp_path_factory) -> WhatIf:
    folder = tmp_path_factory.mktemp("whatif")
    (folder / "c.toml").touch()
    given = checkpoint.settings() | {"run.folder": str(folder / "runs"), "sampling.B_E": 16}
    config = read_config(folder / "c.toml", sets(given)[1::2])
    rules = ("negative_only", "entropy_bonus:0.5", "mask:surprisal < 2 and not (advantage > 1)")
    return command.whatif(config, command.Question(rules, eta=1e-3), Narrator())[0]


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [80, 120])
def test_no_number_of_the_table_is_cut_off(document, width, verbose) -> None:
    text = shown(document, width, verbose=verbose)
    lines = text.splitlines()
    (rule,) = [i for i, line in enumerate(lines) if line.startswith("──")]
    assert "…" not in text
    assert max(len(line.rstrip()) for line in lines) <= width
    assert lines[rule + 1].split()[0] == "own"
    assert ("touched" in lines[rule - 1]) is (verbose and width == 120)
    for row in document.rules:
        (line,) = [x for x in lines[rule:] if x.startswith(row.rule[:20])][:1]
        assert line.count("±") == (3 if row.rule != "own" else 2)
    assert verbose or len(lines) <= 29


def shown(document: WhatIf, width: int, *, verbose: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_whatif(document, console, verbose=verbose)
    return console.file.getvalue()


def test_the_end_is_a_screen_and_names_what_is_left_out(document) -> None:
    """With forty rules: the run's own, what was solved for, and those that raise the entropy most."""
    own, *others = document.rules
    many = [
        one.model_copy(update={"rule": f"mask:surprisal < {i} and advantage > 0.{i} and entropy < 1"})
        for i, one in enumerate((others * 40)[:40])
    ]
    document = document.model_copy(update={"rules": (own, *many)})
    text = shown(document, 80)
    assert len(text.splitlines()) <= 29
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("rule "))
    rows = [line for line in lines[header:] if line.startswith(("own ", "mask:"))]
    assert f"{len(many) + 1 - len(rows)} rules more with -v" in text
    assert rows[0].startswith("own ")
    largest = max(many, key=lambda one: one.entropy.difference.value)
    assert any(row.startswith(largest.rule[:18]) for row in rows)
    assert len(shown(document, 80, verbose=True).splitlines()) > 60


def test_zero_has_one_sign() -> None:
    assert Scale(-3, 3).signed(-6.8e-21) == "+0.000"
    assert Scale(-3, 3).signed(-1e-6) == "-0.001"
