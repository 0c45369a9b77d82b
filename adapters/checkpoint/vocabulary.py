"""Tokens of a tokenizer for which its model has no row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from funcprobe.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER = "use the tokenizer with which this model was trained"


def tokens_without_row(
    tokenizer: "PreTrainedTokenizerBase", rows: int, end_ids: Sequence[int]
) -> list[str]:
    """A line on tokens that have no row in the model, if there are any.

    They are harmless where no prompt has one: the model cannot sample them. (Gemma 3 has such a token
    for images.) More rows than tokens are normal: models pad them to a multiple. InputError if a token
    that ends a response or pads it has no row.
    """
    names = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    pad = tokenizer.pad_token_id
    for what, i in (*(("end-of-sequence", i) for i in end_ids), ("padding", pad)):
        if i is not None and i >= rows:
            raise InputError(
                f"the {what} token {names.get(i, '')!r} has id {i}, but the model has {rows} rows: if "
                "the vocabulary was resized in training, save the adapter with "
                f"save_embedding_layers=True or set policy.base to the resized model; else {_OTHER}"
            )
    if not names:
        return []
    first = min(names)
    return [
        f"note: {len(names)} of the tokenizer's tokens have no row in the model, as {names[first]!r} "
        f"(id {first}, {rows} rows): prompts that contain one are rejected"
    ]


def require_rows(
    prompt_ids: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", rows: int
) -> None:
    """InputError for a prompt with an id for which the model has no row."""
    for number, ids in enumerate(prompt_ids, 1):
        if (largest := max(ids)) >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"prompt {number}: the tokenizer's token {token!r} has id {largest}, but the model has "
                f"{rows} rows: {_OTHER}"
            )
