"""Prompts: from the rows of a data set to text, to token ids, to the draws of E and U."""

import difflib
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from funcprobe.types import InputError

from .messages import NO_TEMPLATE, Messages, as_messages, marks, render, with_system
from .sources import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """A row of the data set: its prompt as given, text or messages, and the other columns."""

    given: str | Messages
    row: Row  # the answer, for instance


class Prompt(NamedTuple):
    """The policy's input as text, and what a reward function is given."""

    text: str
    row: Row
    given: str | Messages
    messages: Messages | None = None  # that were rendered, a system message included


def load_prompts(
    source: str | Sequence[Row],
    *,
    prompt_column: str,
    split: str = "train",
    template: str | None = None,
    limit: int | None = None,
    where: str | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Example]:
    """The prompts of a source (`sources.read_rows`) or of rows, in order, the first `limit` of them.

    `template` is a Python format string over the columns; without one the prompt is the column's own
    text, or its messages (`messages.as_messages`). For messages: `where` rows are from, and their
    `numbers` there, by default from 1.
    Raises InputError if source, columns or template cannot be used, and for text beside messages.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1 prompt")
    where = where or (source if isinstance(source, str) else "the data set")
    rows = (read_rows(source, split) if isinstance(source, str) else source)[:limit]
    if not rows:
        raise InputError(f"{where} has no rows, expected at least one prompt: check file and split")
    numbers = numbers or range(1, len(rows) + 1)
    given = [
        _given(row, f"row {i} of {where}", prompt_column, template)
        for i, row in zip(numbers, rows, strict=False)
    ]
    for i, (one, other) in zip(numbers[1:], pairwise(given), strict=False):
        if isinstance(one, str) != isinstance(other, str):
            raise InputError(
                f"row {i} of {where}: column {prompt_column!r} has {_kind(other)}, the row before "
                f"{_kind(one)}: give one of the two in all rows"
            )
    # A reward may use any column, but receives the prompt itself as `prompts`, as in TRL.
    rest = (
        {k: v for k, v in row.items() if (k, prompt_column) != ("prompt", "prompt")} for row in rows
    )
    return [Example(prompt, row) for prompt, row in zip(given, rest, strict=True)]


def render_prompts(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat: bool | Literal["auto"] = "auto",
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Prompt], list[str]]:
    """The policy's input for every prompt, and lines that state how it was made.

    Messages are rendered by the tokenizer's chat template; so is text, as one user message, with
    chat = True, or if there is a template, unless it contains `messages.marks`: it is rendered already.
    Raises InputError for messages without a template or with chat = False, and where some texts only
    are rendered already.
    """
    arguments = chat_template_kwargs or {}
    texts = [e.given for e in examples if isinstance(e.given, str)]
    if texts and not _is_wrapped(texts, tokenizer, chat):
        if system_prompt is not None:
            raise InputError(
                "prompts.system_prompt is set, but the prompts are text that no chat template renders: "
                "remove it, or prompts.chat = false, or use a tokenizer with a chat template"
            )
        why = "as prompts.chat = false" if chat is False else _why_plain(texts, tokenizer)
        return [Prompt(str(e.given), e.row, e.given) for e in examples], [f"prompts: text, {why}"]
    if not texts and chat is False:
        raise InputError(
            "prompts.chat is false, but the prompts are messages, which only a chat template renders: "
            "remove prompts.chat"
        )
    if not tokenizer.chat_template:
        found = "prompts.chat is true" if texts else "the prompts are messages"
        raise InputError(f"{found}, but {NO_TEMPLATE}")
    prompts = []
    for i, (given, row) in enumerate(examples, 1):
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        messages = with_system(messages, system_prompt, f"prompt {i}")
        text = _unicode(render(messages, tokenizer, arguments, row, f"prompt {i}"), f"prompt {i}")
        prompts.append(Prompt(text, row, given, messages))
    lines = _rendered_lines(prompts, arguments, explicit=chat is True)
    if "strftime_now" in str(tokenizer.chat_template) and "date_string" not in arguments:
        lines.append(
            "warning: the chat template writes today's date, in training it wrote that day's: set "
            "prompts.chat_template_kwargs = { date_string = ... }, which templates as Llama's read"
        )
    if texts and (marked := _rendered(texts, tokenizer)):
        lines.append(
            f"warning: {len(marked)} of {len(texts)} prompts contain marks of the chat template and "
            "are rendered as user messages all the same, since prompts.chat = true"
        )
    return prompts, lines


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


def _given(row: Row, where: str, prompt_column: str, template: str | None) -> str | Messages:
    if prompt_column not in row:
        raise missing_column(prompt_column, row, where)
    value = row[prompt_column]
    messages = as_messages(value, f"{where}, column {prompt_column!r},")
    if messages is not None and template is None:
        return messages
    if messages is not None:
        raise InputError(
            f"{where}: prompts.template makes text, but column {prompt_column!r} contains messages: "
            "remove the template, or choose another prompt_column"
        )
    if not isinstance(value, str) or not value.strip():
        found = "an empty string" if isinstance(value, str) else type(value).__name__
        raise InputError(
            f"{where}: column {prompt_column!r} contains {found}, expected text or messages: choose "
            "another prompt_column or drop the row"
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
    return _unicode(text, where)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()  # JSON can contain half a surrogate pair, which no tokenizer accepts
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: not Unicode text ({error.reason}): correct or drop the row"
        ) from error
    return text


def _kind(given: str | Messages) -> str:
    return "text" if isinstance(given, str) else "messages"


def _is_wrapped(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", chat: bool | Literal["auto"]
) -> bool:
    """Whether text becomes a user message. InputError if that is not the same for all."""
    if chat is False or not tokenizer.chat_template:
        return chat is True
    rendered = _rendered(texts, tokenizer)
    if 0 < len(rendered) < len(texts) and chat == "auto":
        raise InputError(
            f"{len(rendered)} of {len(texts)} prompts contain marks of a chat template, as "
            f"{', '.join(marks(tokenizer))}, the others none: set prompts.chat = true to render all of "
            "them as user messages, or false to take all as they are"
        )
    return len(rendered) < len(texts)


def _rendered(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    signs = marks(tokenizer)
    return [text for text in texts if any(mark in text for mark in signs)]


def _why_plain(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        return "as it is: the tokenizer has no chat template"
    found = [mark for mark in marks(tokenizer) if mark in texts[0]]
    return f"rendered already, as it contains {', '.join(found)}: taken as it is"


def _rendered_lines(
    prompts: Sequence[Prompt], arguments: Mapping[str, Any], *, explicit: bool
) -> list[str]:
    lines, of_text = [], isinstance(prompts[0].given, str)
    if of_text:
        hint = (
            "" if explicit else ", as it has one; if training had plain text, set prompts.chat = false"
        )
        lines.append(
            f"prompts: text, rendered as a user message by the tokenizer's chat template{hint}"
        )
    else:
        lines.append("prompts: messages, rendered by the tokenizer's chat template")
    if columns := [c for c in ("tools", "chat_template_kwargs") if any(p.row.get(c) for p in prompts)]:
        lines.append(
            f"prompts: the columns {' and '.join(columns)} are passed to the chat template, as TRL's "
            "apply_chat_template does; its GRPOTrainer (1.16) passes its own arguments instead"
        )
    continued = sum(p.messages[-1]["role"] == "assistant" for p in prompts if p.messages)
    if continued and arguments.get("add_generation_prompt", True):
        lines.append(
            f"prompts: {continued} of {len(prompts)} end in an assistant's message: a new one is "
            "begun, as by the GRPOTrainer of TRL 1.16; to continue it, set "
            "prompts.chat_template_kwargs = {add_generation_prompt = false, "
            "continue_final_message = true}"
        )
    return lines


def _generator(count: int, population: int, seed: int) -> torch.Generator:
    if count < 1 or population < 1:
        raise InputError(f"{count} of {population} prompts are to be drawn, expected at least 1")
    return torch.Generator().manual_seed(seed)
