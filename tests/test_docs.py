"""What the README, docs/ and the benchmarks' pages state about the repository is so.

Every link and anchor, file, test, dotted name, configuration key, command, TOML and Python block. The
checkers are tried on planted errors first.
"""

import ast
import functools
import importlib
import importlib.util
import itertools
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import funcprobe
from funcprobe.adapters import cli
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import Config
from funcprobe.losses.custom import custom_loss
from funcprobe.losses.trl import TrlLoss, trl_loss
from funcprobe.types import InputError

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md"), *ROOT.glob("benchmarks/*.md")]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
TEST = re.compile(r"(test_\w+\.py)::(\w+)")
FOLDERS = (
    *("funcprobe/", "adapters/", "tests/", "benchmarks/", "configs/", "docs/", "notebooks/", ".ci/"),
)
DOTTED = re.compile(r"funcprobe(?:\.[A-Za-z_]\w*)+")
KEY = re.compile(r"(\w+)\.(\w+)(?: ?= ?.+)?")
OTHER_TOOLS = {"pytest", "ruff", "mypy", "lint-imports", "mkdocs", "git", "pip"}
SUFFIXES = {"log", "pt", "bin", "py", "json"}  # of files whose names begin as a section's, as run.log
UsageError: Any = typer.BadParameter.__base__  # click's, which typer has a copy of
# Words that docs/terms.md has better ones for.
AVOIDED = re.compile(
    r"\b(brought|told|mended|hygiene|tell from|whoever|by hand|takes over|bends?)\b", re.IGNORECASE
)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, without their indentation."""
    return [
        re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        for indent, found, body in FENCE.findall(text)
        if found == language
    ]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings; mkdocs, which makes its own, is strict about them."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(text)):
        plain = re.sub(r"[`*\\]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        numbered = (f"{slug}-{i}" for i in itertools.count(1))
        found.add(next(s for s in itertools.chain([slug], numbered) if s not in found))
    return found


def wrong_links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(SPAN.sub("", prose(text))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if name and not path.exists():
            yield f"link {target}: no such file"
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8") if name else text):
            yield f"link {target}: no such heading"


def wrong_files(page: Path, text: str) -> Iterator[str]:
    """Paths from the root, and bare names of Python files of ours."""
    for span in SPAN.findall(prose(text)):
        named = span.partition("::")[0]
        if named.startswith(FOLDERS) and not re.search(r"[\s<>*{}]", named):
            if not (ROOT / named).exists():
                yield f"{span}: no such file"
        elif re.fullmatch(r"\w+\.py", named) and not any(
            any((ROOT / folder).rglob(named)) for folder in FOLDERS
        ):
            yield f"{span}: no file of this name"


def wrong_tests(page: Path, text: str) -> Iterator[str]:
    for name, function in TEST.findall(text):
        sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(name)]
        if not any(re.search(rf"^def {function}\(", source, re.MULTILINE) for source in sources):
            yield f"{name}::{function}: no such test"


def wrong_names(page: Path, text: str) -> Iterator[str]:
    """Dotted names; but for the changelog's, which tells what they were before."""
    if page.name == "CHANGELOG.md":
        return
    for span in SPAN.findall(prose(text)):
        yield from (f"{name}: no such name" for name in DOTTED.findall(span) if not is_there(name))


def is_there(name: str) -> bool:
    """Whether it is a module, or something in one."""
    found: Any = funcprobe
    for i, part in enumerate(parts := name.split(".")[1:]):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(["funcprobe", *parts[: i + 1]]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def wrong_keys(page: Path, text: str) -> Iterator[str]:
    for span in SPAN.findall(prose(text)):
        match = KEY.fullmatch(span)
        section: Any = Config.model_fields.get(match[1]) if match else None
        if section is not None and match[2] not in SUFFIXES | section.annotation.model_fields.keys():
            yield f"{span}: no such key"


def wrong_commands(page: Path, text: str) -> Iterator[str]:
    """Lines that start with $, and what else starts as one of our commands."""
    lines = [line for _, language, body in FENCE.findall(text) for line in body.splitlines()]
    spans = [span for span in SPAN.findall(prose(text)) if not span.endswith(":")]
    for line in (*lines, *spans):
        typed = re.sub(r"  #.*", "", line).strip()
        if not typed.startswith(("$ ", "funcprobe ", "python ", "--set ")) or "…" in typed:
            continue
        for part in typed.removeprefix("$ ").split(" && "):
            problem = of_command(
                [word for word in shlex.split(part) if not re.match(r"[A-Z_]+=", word)]
            )
            if problem:
                yield f"{line}: {problem}"


def of_command(words: list[str]) -> str | None:
    """What is wrong with a command line, or None."""
    match words:
        case ["--set", *_]:
            return of_settings(words)
        case ["funcprobe"]:
            return None
        case ["funcprobe", name, *rest]:
            known = typer.main.get_command(cli.app).commands
            if name.startswith("-"):
                return None if name in {"--version", "--help"} else f"no option {name}"
            if name not in known:
                return f"no command {name}"
            try:
                known[name].make_context(name, list(rest))
            except UsageError as error:
                return None if not rest else error.format_message()
            return of_settings(rest)
        case ["python", "-m", module, *_]:
            return None if importlib.util.find_spec(module) else f"no module {module}"
        case ["python", script, *rest]:
            if not (ROOT / script).is_file():
                return f"no file {script}"
            source = (ROOT / script).read_text(encoding="utf-8")
            unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
            return f"no option {unknown[0]}" if unknown else None
        case ["pip", "install", *rest]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            asked = ",".join(re.findall(r"\.\[([\w,]+)\]", " ".join(rest))).split(",")
            lacking = set(asked) - {""} - project["optional-dependencies"].keys()
            return f"no extra {min(lacking)}" if lacking else None
        case [tool, *_] if tool in OTHER_TOOLS:
            return None
    return "not a command that is known here"


def of_settings(words: list[str]) -> str | None:
    """--set KEY=VALUE as a run reads it, for the keys alone."""
    given = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    given = [value for value in given if value != "KEY=VALUE"]
    try:
        if given:
            read_config(ROOT / "configs" / "quickstart.toml", given)
    except InputError as error:
        return str(error)
    return None


def wrong_toml(page: Path, text: str) -> Iterator[str]:
    for block in blocks(text, "toml"):
        try:
            Config.model_validate(tomllib.loads(block))
        except (tomllib.TOMLDecodeError, ValidationError) as error:
            yield f"TOML block: {error}"


def wrong_python(page: Path, text: str) -> Iterator[str]:
    """Blocks that do not compile, or import from us what is not there."""
    for block in blocks(text, "python"):
        try:
            tree = ast.parse(block, str(page))
        except SyntaxError as error:
            yield f"Python block: {error}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("funcprobe"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (f"Python block: no {name}" for name in names if not is_there(name))


def wrong_words(page: Path, text: str) -> Iterator[str]:
    for found in AVOIDED.findall(text):
        yield f"{found}: another word is in docs/terms.md"


CHECKERS: tuple[Callable[[Path, str], Iterator[str]], ...] = (
    wrong_links,
    wrong_files,
    wrong_tests,
    wrong_names,
    wrong_keys,
    wrong_commands,
    wrong_toml,
    wrong_python,
    wrong_words,
)


def test_the_source_keeps_to_the_terms():
    """Messages, descriptions, docstrings, comments and names of both rooms; the notebooks' text."""
    rooms = ("funcprobe", "adapters", "notebooks")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 100
    found = {
        str(path.relative_to(ROOT)): words
        for path in sources
        if (words := AVOIDED.findall(path.read_text(encoding="utf-8").replace("_", " ")))
    }
    assert not found


PLANTED = {
    "a page that is not there": "[x](nowhere.md)",
    "a heading that is not there": "[x](terms.md#no-such-heading)",
    "a heading of its own": "# One\n\n[x](#two)",
    "a file": "`funcprobe/nowhere.py`",
    "a folder": "`adapters/nowhere/`",
    "a bare file": "`nowhere.py`",
    "a test": "`test_docs.py::test_nowhere`",
    "a test's file": "`tests/nowhere/test_nowhere.py`",
    "a module": "`funcprobe.statistics.nowhere`",
    "an attribute": "`funcprobe.adapters.optimizer.nowhere(path)`",
    "a key": "`sampling.B_X`",
    "a key with a value": '`objective.advantages = "rollouts"`',
    "a command": "```console\n$ funcprobe predict mine.toml\n```",
    "an option": "```console\n$ funcprobe run mine.toml --dry\n```",
    "an option in a sentence": "`funcprobe inspect checkpoint-5 --jsonl`",
    "a setting": "```console\n$ funcprobe run mine.toml --set sampling.BE=4\n```",
    "a setting's value": "`--set entropy.per=word`",
    "a script": "`python benchmarks/nowhere.py`",
    "a script's option": "`python benchmarks/passes.py --shapes small`",
    "an extra": "```console\n$ pip install -e '.[tests]'\n```",
    "another program": "```console\n$ funcprob run mine.toml\n```",
    "TOML": "```toml\n[sampling\n```",
    "a key in TOML": "```toml\n[sampling]\nB_X = 1\n```",
    "Python": "```python\nif x\n```",
    "an import": "```python\nfrom funcprobe.statistics.intervals import nowhere\n```",
    "a module of a command": "```console\n$ python -m funcprobe.nowhere docs\n```",
    "a word": "Rollouts that are brought.",
}
RIGHT = """
# One `thing`, and *another*

[x](#one-thing-and-another) [y](terms.md#terms) [z](https://example.org/no.md)
`funcprobe/statistics/estimators.py`, `estimators.py`, `adapters/optimizer/`,
`adapters/optimizer/<format>.py`, `test_docs.py::test_a_page_is_right`,
`funcprobe.statistics.intervals.student(x, y)`, `run.log`, `results.json`, `sampling.B_E`,
`objective.advantage = "rollouts"`, `--set measure.resample=true`, `funcprobe run mine.toml`.

```console
$ THP_MEM_ALLOC_ENABLE=1 funcprobe run mine.toml --set sampling.B_E=4   # why
$ pip install -c constraints.txt -e '.[dev,docs]' && pytest
```
"""


def problems(page: Path, text: str) -> list[str]:
    return [problem for check in CHECKERS for problem in check(page, text)]


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_error_is_found(text):
    assert len(problems(DOCS / "planted.md", text)) == 1


def test_what_is_right_passes():
    assert problems(DOCS / "planted.md", RIGHT) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_right(page):
    assert problems(page, page.read_text(encoding="utf-8")) == []


def test_there_is_something_to_check():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(LINK.findall(text)) > 20
    assert len(TEST.findall(text)) > 15
    assert len(DOTTED.findall(text)) > 20
    assert len(blocks(text, "toml")) >= 3
    assert text.count("\n$ ") > 10


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"(\S+\.md)$", navigation, re.MULTILINE))
    assert {path.name for path in DOCS.glob("*.md")} <= listed


def test_the_configuration_page_is_generated():
    generated = runpy.run_path(str(DOCS / "generate_configuration.py"))
    found = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert found == generated["page"](), "run python docs/generate_configuration.py"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {f"funcprobe.{name}" for name in funcprobe.__all__} <= set(listed)
    assert not list(wrong_names(DOCS / "api.md", "\n".join(f"`{name}`" for name in listed)))


@pytest.mark.slow
def test_the_output_that_is_explained_is_a_runs(command, checkpoint, tmp_path):
    """The end of a run and its details: the lines begin as a run's do, and each is explained."""
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    (tmp_path / "c.toml").touch()
    given = checkpoint.settings() | {"measure.etas": [1e-8, 1e-7, 1e-6, 1e-5], "run.report": True}
    pairs = [("--set", f"{key}={json.dumps(value)}") for key, value in given.items()]
    heads = []
    sections = (("The lines", []), ("More with -v", ["-v"]))
    for shown, (title, flags) in zip(blocks(text, "text"), sections, strict=True):
        outcome = command("run", tmp_path / "c.toml", *itertools.chain(*pairs), *flags)
        assert outcome.status == 0, outcome.err
        labels = first_column(text, title)
        assert len(labels) >= 6
        printed = [line.strip() for line in outcome.out.splitlines()]
        for label in labels:
            assert any(line.startswith(label) for line in printed), label
            assert any(line.strip().startswith(label) for line in shown.splitlines()), label
        lines, table = before_and_in_table(shown)
        others = [line for line in lines if not line.strip().startswith((*labels, "Change of the "))]
        assert [line for line in others if not line.startswith("  ")] == []
        if table:
            assert [x.split() for x in table[:2]] == [x.split() for x in table_of(outcome.out)[:2]]
        heads = [*heads, *table_of(outcome.out)[:2]]
    words = " ".join(heads)
    columns = first_column(text, "The columns")
    assert len(columns) == 7
    for column in columns:
        assert set(column.split()) <= set(words.split()), column
    checks = json.loads((tmp_path / "runs" / "probe" / "results.json").read_text())["checks"]
    assert {check["name"] for check in checks} == set(first_column(text, "The sanity checks"))


def before_and_in_table(text: str) -> tuple[list[str], list[str]]:
    """The lines of prose, and those of the first table, of which a rule of dashes is the third."""
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("──")]
    if not rules:
        return lines, []
    start = rules[0] - 2
    row = re.compile(r"(next lr|\s)")
    end = next(i for i in range(rules[0] + 1, len(lines)) if not row.match(lines[i]))
    return lines[:start] + lines[end:], lines[start:end]


def table_of(text: str) -> list[str]:
    return before_and_in_table(text)[1]


def first_column(text: str, title: str) -> list[str]:
    """Of the table in the section of this title."""
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", section, re.MULTILINE)
    return [name.strip("`") for cell in cells for name in cell.split("`, `")]


def test_the_inspection_that_is_shown_has_the_lines_of_one(command, checkpoint):
    (shown,) = blocks((DOCS / "checkpoints.md").read_text(encoding="utf-8"), "text")
    outcome = command("inspect", checkpoint.adapter)
    assert outcome.status == 0, outcome.err
    printed = outcome.out.partition("\nGroups")[0].splitlines()
    labels = [[line.partition("  ")[0] for line in lines] for lines in (shown.splitlines(), printed)]
    assert len(labels[1]) > 5
    assert set(labels[1]) <= set(labels[0])  # it has no sidecar, of which the others are


def test_the_notebook_runs(checkpoint, capsys):
    code = "\n".join(blocks((DOCS / "notebook.md").read_text(encoding="utf-8"), "python"))
    assert "checkpoint-500" in code
    code = code.replace("checkpoint-500", str(checkpoint.adapter))
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(14, (count,), generator=draw).tolist()

    asked = [tokens(1 + i) for i in range(5)]
    names = {
        "peft_model": PeftModel.from_pretrained(base, checkpoint.adapter, is_trainable=True),
        "rewards": [1.0, 0.0, 0.5, 2.0, 0.0, 1.0],
        "eval_prompt_index": [i % 5 for i in range(8)],
        "update_prompt_index": [i // 2 for i in range(6)],
        "eval_response_ids": [tokens(1 + i % 4) for i in range(8)],
        "update_response_ids": [tokens(1 + i % 3) for i in range(6)],
    }
    for batch in ("eval", "update"):
        names[f"{batch}_prompt_ids"] = [asked[i] for i in names[f"{batch}_prompt_index"]]
    exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    derivative, measured, star = (float(printed[i].split()[0]) for i in (0, 1, 3))
    assert measured / (1e-5 * derivative) == pytest.approx(1, abs=0.05)  # what first order misses
    missed = measured - 1e-5 * derivative
    assert abs(missed / measured) == pytest.approx(1e-5 / star, rel=0.1)  # the quadratic term
    assert printed[2].startswith("Interval(low=")
    assert float((names["tangent"].logp_NR.sum(1) - names["s"]).abs().max()) < 1e-9
    left = names["left"]
    assert float(printed[-1]) / (1e-5 * left.without) == pytest.approx(1, abs=0.05)
    assert left.share == pytest.approx(names["found"].share_M[0].derivative, rel=1e-9)
    assert names["who"].derivative == pytest.approx(derivative, rel=1e-12)
    lowest = names["who"].marginal.token_NR[names["lowest_NR"]]
    assert len(lowest)
    assert float(lowest.max()) < 0


def test_the_loss_of_the_page_is_trls():
    """The function that docs/losses.md shows, at settings of which each matters: ratios are clipped."""
    (code,) = blocks((DOCS / "losses.md").read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    exec(code, names)
    draw = torch.Generator().manual_seed(0)
    U = funcprobe.collate([[1]] * 6, [[2] * T for T in (4, 1, 3, 5, 2, 5)], [0, 0, 1, 1, 2, 2])
    mask_NR = funcprobe.response_mask(U)
    l_NR, h_NR, gap_NR, other_NR = torch.rand(4, *mask_NR.shape, generator=draw).double() * mask_NR
    inputs = funcprobe.LossInputs(
        advantage_N=torch.randn(6, generator=draw).double(),
        mask_NR=mask_NR,
        prompt_N=U.prompt_N,
        microbatch_N=torch.zeros_like(U.prompt_N),
        process_N=torch.zeros_like(U.prompt_N),
        old_logp_NR=gap_NR - 2 * l_NR,
        ref_logp_NR=other_NR - l_NR,
    )
    stats = funcprobe.TokenStats(-l_NR, h_NR)
    own = custom_loss(functools.partial(names["clipped_with_kl"], clip=0.3, beta=0.1, bonus=0.2))
    settings = TrlLoss(epsilon=0.3, beta=0.1, entropy_coef=0.2, use_bias_correction_kl=False)
    found, report = funcprobe.loss_update(U, stats, inputs, own)
    expected, logged = funcprobe.loss_update(U, stats, inputs, trl_loss(settings))
    exact = {"rtol": 1e-12, "atol": 1e-15}  # the same sums in another order
    assert torch.allclose(found.coef_NR, expected.coef_NR, **exact)
    assert torch.allclose(found.entropy_coef_NR, expected.entropy_coef_NR, **exact)
    assert report.loss == pytest.approx(logged.loss, rel=1e-12)
    assert logged.metrics["clip_ratio/region_mean"] > 0
    for name in ("kl", "entropy"):
        assert report.metrics[name] == pytest.approx(logged.metrics[name], rel=1e-12)
    share_N = expected.normaliser_N / expected.normaliser_N.sum()
    by_prompt = [float(x_N[U.prompt_N == 1].sum()) for x_N in (found.normaliser_N, share_N)]
    assert by_prompt[0] == pytest.approx(by_prompt[1], rel=1e-12)
    assert report.divisor_residual < 1e-12
