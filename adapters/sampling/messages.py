"""Prompts as messages: read from a data set's column, rendered by the tokenizer's chat template."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from funcprobe.types import InputError

from .. import strict_json
from ..checkpoint.template import UNRENDERABLE, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]

NO_TEMPLATE = (
    "the tokenizer has no chat template: use the tokenizer of the training run (tokenizer files and "
    "chat_template.jinja in the checkpoint)"
)


def as_messages(value: object, where: str) -> Messages | None:
    """The messages of a column's value, a list of them or its JSON text; None for any other text.

    Null fields, which Arrow adds to every message if one has the field, are removed, at any depth.
    InputError for a list of something else, and for content other than text.
    """
    if isinstance(value, str):
        value = _decoded(value)
    if not isinstance(value, list):
        return None
    if not value:
        raise InputError(f"{where} is an empty list, expected at least one message: drop the row")
    return [_message(message, f"message {i} of {where}") for i, message in enumerate(value, 1)]


def render(
    messages: Messages,
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, Any],
    row: Mapping[str, object],
    where: str,
) -> str:
    """The text in which the policy's turn begins, by the tokenizer's chat template.

    As the GRPOTrainer of TRL 1.16 and verl 0.9.1 do, the generation prompt is added whatever the last
    role is; `arguments` (prompts.chat_template_kwargs) may ask for something else. The row's columns
    tools and chat_template_kwargs, where it has them, are passed as well. InputError if the template
    rejects messages or arguments.
    """
    of_row = _column(row, "chat_template_kwargs", dict, where) or {}
    tools = _column(row, "tools", list, where) or None  # []: some templates render a list of no tools
    given = {"add_generation_prompt": True, "tools": tools} | dict(arguments) | of_row
    try:
        return str(rendered(tokenizer, messages, tokenize=False, **given))
    # TemplateError: some templates reject a system role; the others: a type the template does not
    # expect, an argument of the tokenizer's own, two arguments that exclude each other.
    except UNRENDERABLE as error:
        raise InputError(
            f"the chat template rejects the messages of {where}, or prompts.chat_template_kwargs: "
            f"{' '.join(str(error).split())}"
        ) from error


def with_system(messages: Messages, system_prompt: str | None, where: str) -> Messages:
    """The messages after a system message. InputError if they have one."""
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise InputError(f"prompts.system_prompt is set, but {where} has a system message: remove it")
    return [{"role": "system", "content": system_prompt}, *messages]


def marks(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Special tokens by which text shows that it is rendered: BOS, EOS, and the chat template's own.

    Others that a tokenizer has (of tools, images, reasoning) may occur in the text of a prompt.
    """
    found = {t for t in (tokenizer.bos_token, tokenizer.eos_token) if t}
    if tokenizer.chat_template:
        sample = render([{"role": "user", "content": "?"}], tokenizer, {}, {}, "a sample")
        added = tokenizer.added_tokens_decoder.values()
        special = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
        found |= {t for t in special if t in sample}
    return sorted(found)


def _decoded(text: str) -> object:
    """The list of messages in JSON, as exports to CSV and Parquet have it; else the text itself."""
    if not text.lstrip().startswith("["):
        return text
    try:
        found = json.loads(text)
        strict_json.require_shallow(found)
    except (ValueError, RecursionError):  # a prompt that begins with a bracket
        return text
    messages = isinstance(found, list) and all(isinstance(m, dict) and "role" in m for m in found)
    return found if messages and found else text


def _message(message: object, where: str) -> dict[str, Any]:
    found = without_nulls(message)
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(message).__name__
        raise InputError(f"{where}: found {keys or 'nothing'}, expected role and content")
    content = found.get("content", "" if found.get("tool_calls") else None)
    parts = content if isinstance(content, list) else []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where}: content of type {kind}, only text can be probed: drop the row")
    if not isinstance(content, str | list):
        raise InputError(f"{where}: content is {type(content).__name__}, expected text")
    return found


def without_nulls(value: object) -> Any:
    """Without the fields of objects that are null, at any depth."""
    if isinstance(value, Mapping):
        return {str(k): without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value


def _column(row: Mapping[str, object], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = strict_json.parse(value, nan=True) if value.strip() else None
        except ValueError as error:
            raise InputError(f"{where}: column {name!r} is not JSON ({error}): correct it") from error
    if value is not None and not isinstance(value, kind):
        raise InputError(
            f"{where}: column {name!r} contains {type(value).__name__}, which the chat template is "
            f"given as {name}: expected {kind.__name__}; rename the column"
        )
    return without_nulls(value)
