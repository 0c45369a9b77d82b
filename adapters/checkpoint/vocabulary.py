"""Whether a tokenizer matches its model."""

from typing import TYPE_CHECKING

from funcprobe.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raise InputError if the tokenizer can produce an id for which the model has no row.

    More rows than tokens are normal: models pad them to a multiple.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer's token {token!r} has id {largest}, but the model has {vocab_size} "
            "rows: use the tokenizer with which this model was trained"
        )
