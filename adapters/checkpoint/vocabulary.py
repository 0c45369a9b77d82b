"""Whether a tokenizer fits the model beside it."""

from typing import TYPE_CHECKING

from funcprobe.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raise InputError if the tokenizer can produce an id the model has no row for.

    A model with more rows than the tokenizer has tokens is normal: they are padded to a multiple.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer's token {token!r} has id {largest} and the model has {vocab_size} "
            "rows: give the tokenizer this model was trained with"
        )
