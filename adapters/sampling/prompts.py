"""Prompts: from a file or a dataset to text, to token ids, to the draws of E and U."""

import difflib
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from jinja2.exceptions import TemplateError

from funcprobe.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_TYPES = (".jsonl", ".json", ".parquet")

Row = dict[str, object]


class Prompt(NamedTuple):
    """The policy's input text, and the other columns of its row (the answer, for instance)."""

    text: str
    row: Row


def load_prompts(
    source: str,
    *,
    prompt_column: str,
    split: str = "train",
    template: str | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of a file or of a dataset, in its order, the first `limit` of them.

    `source` is a .jsonl, .json or .parquet file, or a folder or name that `datasets.load_dataset`
    takes ("openai/gsm8k:main": the configuration after a colon, `split` of it; a file has no
    splits). `template` is a Python format string over the columns; without one the prompt is the
    column's own text. With `chat` the tokenizer's chat template renders [system, user] up to the start
    of the assistant's turn.
    Raises InputError if source, columns, template or tokenizer cannot be used.
    """
    if system_prompt is not None and not chat:
        raise InputError("system_prompt is set but chat is off: set chat = true, or remove it")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1 prompt")
    rows = _rows(source, split)[:limit]
    if not rows:
        raise InputError(f"{source} has no rows, expected at least one prompt: check file and split")
    texts = [_text(row, i, source, prompt_column, template) for i, row in enumerate(rows, 1)]
    if chat:
        texts = _chat(texts, tokenizer, system_prompt)
    # A reward may use any column, but receives the prompt itself as `prompts`, as in TRL.
    rest = (
        {k: v for k, v in row.items() if (k, prompt_column) != ("prompt", "prompt")} for row in rows
    )
    return [Prompt(text, row) for text, row in zip(texts, rest, strict=True)]


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat: bool,
    max_prompt_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of every prompt. A chat template has already written the special tokens (BOS).

    Raises InputError for an empty encoding, one over `max_prompt_tokens`, and for a tokenizer that
    appends EOS to the prompt, after which a trained policy gives no response.
    """
    texts = [prompt.text for prompt in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    eos, eos_text = tokenizer.eos_token_id, str(tokenizer.eos_token)
    for number, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True), 1):
        if not tokens:
            raise InputError(
                f"prompt {number} has no tokens, expected at least one: drop the row ({prompt.text!r})"
            )
        if max_prompt_tokens is not None and len(tokens) > max_prompt_tokens:
            raise InputError(
                f"prompt {number} has {len(tokens)} tokens, at most {max_prompt_tokens} are "
                "allowed: raise max_prompt_tokens or drop the row"
            )
        if not chat and tokens[-1] == eos and not prompt.text.endswith(eos_text):
            raise InputError(
                f"the tokenizer appends {eos_text!r} to prompt {number}: disable this in its settings"
            )
    return ids


def draw_with_replacement(count: int, population: int, seed: int) -> list[int]:
    """`count` independent, uniform indices below `population`: the prompts of E.

    Raises InputError for a count or a population below 1.
    """
    generator = _generator(count, population, seed)
    return [int(i) for i in torch.randint(population, (count,), generator=generator)]


def draw_distinct(count: int, population: int, seed: int) -> list[int]:
    """`count` distinct indices below `population`, in random order: the prompts of U.

    A smaller draw with the same seed is the beginning of a larger one.
    Raises InputError for a count below 1 or above the population.
    """
    generator = _generator(count, population, seed)
    if count > population:
        raise InputError(
            f"{count} distinct prompts requested, {population} available: request fewer or give more"
        )
    return [int(i) for i in torch.randperm(population, generator=generator)[:count]]


def missing_column(column: str, columns: Iterable[str], where: str) -> InputError:
    """The error for a missing column, with the existing ones and the most similar of them."""
    columns = sorted(columns)
    near = [f"; did you mean {c!r}?" for c in difflib.get_close_matches(column, columns, n=1)]
    there = (", ".join(columns) or "none") + "".join(near)
    return InputError(f"{where} has no column {column!r}, its columns are: {there}")


class _ByColumn(string.Formatter):
    """Fields are column names and nothing else, so that names may contain dots and brackets."""

    def get_field(self, field_name: str, _: object, row: Any) -> tuple[object, str]:
        if row.get(field_name) is None:
            found = "null in column" if field_name in row else "unknown field"
            raise LookupError(f"{found} {{{field_name}}}")
        return row[field_name], field_name


def _text(row: Row, number: int, source: str, prompt_column: str, template: str | None) -> str:
    where = f"row {number} of {source}"
    if prompt_column not in row:
        raise missing_column(prompt_column, row, where)
    value = row[prompt_column]
    if not isinstance(value, str) or not value.strip():
        found = "an empty string" if isinstance(value, str) else type(value).__name__
        raise InputError(
            f"{where}: column {prompt_column!r} contains {found}, expected text: choose another "
            "prompt_column or drop the row"
        )
    try:
        text = value if template is None else _ByColumn().vformat(template, (), row)
    except (LookupError, ValueError, TypeError) as error:  # the last two: a malformed field
        raise InputError(
            f"{where}: template {template!r}: {error}; expected {{column}} with a column of: "
            f"{', '.join(sorted(row))}; write a literal brace twice"
        ) from error
    if not text.strip():
        raise InputError(f"{where}: template {template!r} gives an empty prompt: add a column")
    try:
        text.encode()  # JSON can contain half a surrogate pair, which no tokenizer accepts
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: not Unicode text ({error.reason}): correct or drop the row"
        ) from error
    return text


def _chat(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase | None", system_prompt: str | None
) -> list[str]:
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(
            "chat = true needs a tokenizer with a chat template: set chat = false, or use the "
            "tokenizer of an instruction-tuned model"
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    messages = [[*system, {"role": "user", "content": text}] for text in texts]
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:  # some templates reject a system role
        raise InputError(f"the chat template rejects these messages: {_line(error)}") from error
    return [str(text) for text in rendered]


def _rows(source: str, split: str) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise InputError(f"{source}: expected a file of type {', '.join(FILE_TYPES)}")
        return _parquet(path) if path.suffix == ".parquet" else _json(path)
    looks_like_a_path = path.suffix in FILE_TYPES or source.startswith((".", "/", "~"))
    if looks_like_a_path and not path.is_dir():
        raise InputError(f"file not found: {source} (from {Path.cwd()}): correct the path")
    return _dataset(str(path) if path.is_dir() else source, split)


def _json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read, expected UTF-8 text: {error}") from error
    whole = text.lstrip().startswith("[")
    rows: list[Row] = []
    # Not splitlines(), which also splits at U+2028 and similar, allowed inside a JSON string.
    for number, chunk in [(1, text)] if whole else enumerate(text.split("\n"), 1):
        if not chunk.strip():
            continue
        try:
            found = json.loads(chunk)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number + error.lineno - 1}: {error.msg}; expected one JSON object "
                "per line, or one array of objects: correct or drop the line"
            ) from error
        except RecursionError as error:
            raise InputError(
                f"{path}, line {number}: nested too deeply: correct or drop the line"
            ) from error
        rows += found if whole else [found]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: {type(row).__name__}, expected a JSON object")
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet: {_line(error)}") from error
    return rows


def _dataset(source: str, split: str) -> list[Row]:
    # Imported here, as it takes a second and local files do not need it.
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split)
    # Not found or no network: OSError; unknown configuration or split: ValueError; a dataset that
    # needs a script: RuntimeError (datasets 4 and later).
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(
            f"dataset {name!r} (configuration {configuration or None!r}, split {split!r}) cannot be "
            f"loaded: {_line(error)}; expected a name on the Hub (openai/gsm8k:main) or a local file"
        ) from error
    return [dict(row) for row in found]


def _generator(count: int, population: int, seed: int) -> torch.Generator:
    if count < 1 or population < 1:
        raise InputError(f"{count} of {population} prompts are to be drawn, expected at least 1")
    return torch.Generator().manual_seed(seed)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
