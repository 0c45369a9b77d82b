"""Token ids of prompts, each special token once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from funcprobe.types import InputError

from .prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    add_special_tokens: bool | None = None,
    max_prompt_tokens: int | None = None,
) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt, and lines on their special tokens.

    By default the tokenizer adds its own (BOS) to text, unless the text begins with them, and none to
    what the chat template rendered, which writes its own. Raises InputError for an empty encoding, one
    over `max_prompt_tokens`, and for a tokenizer that appends EOS to the prompt, after which a trained
    policy gives no response.
    """
    texts = [prompt.text for prompt in prompts]
    bare: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    own: list[int] = tokenizer("")["input_ids"]  # that the tokenizer adds to any text
    full: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"] if own else bare
    ids, begun = [], 0
    for prompt, with_own, without in zip(prompts, full, bare, strict=True):
        begins = bool(own) and without[: len(own)] == own and prompt.messages is None
        begun += begins and add_special_tokens is None
        default = prompt.messages is None and not begins
        ids.append(
            with_own if (default if add_special_tokens is None else add_special_tokens) else without
        )
    lines = []
    if begun:
        lines.append(
            f"prompts: {begun} of {len(ids)} begin with {tokenizer.decode(own)!r}, so that the "
            "tokenizer adds no second one; TRL's GRPOTrainer does with text: if the run had it "
            "twice, set prompts.add_special_tokens = true"
        )
    _require_encodings(prompts, ids, tokenizer, max_prompt_tokens)
    return ids, [*lines, *_warnings(ids, tokenizer)]


def _require_encodings(
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int | None,
) -> None:
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
        if tokens[-1] == eos and not prompt.text.rstrip().endswith(eos_text):
            raise InputError(
                f"the tokenizer appends {eos_text!r} to prompt {number}: disable this in its settings"
            )


def _warnings(ids: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    bos, eos, lines = tokenizer.bos_token_id, tokenizer.eos_token_id, []
    if twice := sum(bos is not None and list(x[:2]) == [bos, bos] for x in ids):
        lines.append(f"warning: {twice} of {len(ids)} prompts begin with {tokenizer.bos_token!r} twice")
    if ended := sum(x[-1] == eos for x in ids):
        lines.append(
            f"warning: {ended} of {len(ids)} prompts end with {tokenizer.eos_token!r}, after which the "
            "responses begin: correct only if training had the same"
        )
    return lines
