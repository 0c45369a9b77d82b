"""The text that every token of a response completes, so that their concatenation is the response's."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode: TypeAlias = Callable[[list[int]], str]

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
WINDOW, KEPT = 64, 8  # tokens that are decoded together, and those of them kept for context


def token_texts(
    responses: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[str]]:
    """Text of every token, "" where a later one completes its character.

    The texts of a response concatenate to `decode` of all of its ids, special tokens included and
    spaces as they are; bytes that are no character are U+FFFD, as there. A token's text is taken from
    its decoding after another token, since sentencepiece drops the space before the first one, and
    kept if the sum is right; where it is not, decoding is incremental.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    distinct = sorted({token for response in responses for token in response})
    alone = {token: decode([token]) for token in distinct}
    plain = (i for i in distinct if alone[i].strip() and INCOMPLETE not in alone[i])
    anchor = next((i for i in plain if i not in special_ids(tokenizer)), None)
    if anchor is None:
        return [_incremental(list(ids), decode(list(ids)), decode) for ids in responses]

    def after_anchor(ids: list[int]) -> str:
        return decode([anchor, *ids]).removeprefix(alone[anchor])

    known = {token: after_anchor([token]) for token in distinct}
    incomplete = {token for token, text in known.items() if INCOMPLETE in text}
    joined: dict[tuple[int, ...], list[str]] = {}

    def of_response(ids: list[int]) -> list[str]:
        whole = decode(ids)
        texts = [known[token] for token in ids]
        for start, end in _runs(ids, incomplete):
            run = tuple(ids[start:end])
            if run not in joined:
                joined[run] = _completed(ids[start:end], after_anchor)
            texts[start:end] = joined[run]
        if "".join(texts) != whole and ids:
            texts[0] = "" if ids[0] in incomplete else alone[ids[0]]
        return texts if "".join(texts) == whole else _incremental(ids, whole, decode)

    return [of_response(list(ids)) for ids in responses]


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids that `decode` leaves out with `skip_special_tokens`."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _runs(ids: Sequence[int], members: set[int]) -> Iterator[tuple[int, int]]:
    """Bounds of the longest stretches of tokens in `members`."""
    start = None
    for k, token in enumerate(ids):
        if token in members:
            start = k if start is None else start
        elif start is not None:
            yield start, k
            start = None
    if start is not None:
        yield start, len(ids)


def _completed(ids: list[int], decode: Decode) -> list[str]:
    """Of tokens that are pieces of characters: text goes to the token with a character's last byte."""
    texts: list[str] = []
    start, prefixes = 0, []
    for k in range(len(ids)):
        prefixes.append(decode(ids[start : k + 1]))
        if k + 1 == len(ids) or not prefixes[-1].endswith(INCOMPLETE):
            texts += _between(prefixes, prefixes[-1])
            start, prefixes = k + 1, []
    return texts


def _between(prefixes: Sequence[str], whole: str) -> list[str]:
    """What every prefix has in common with the whole, less what the prefixes before it have."""
    ends = [0]
    for prefix in prefixes:
        ends.append(_agreed(prefix, whole, ends[-1]))
    ends[-1] = len(whole)
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def _agreed(prefix: str, whole: str, least: int) -> int:
    """Leading characters that two texts have in common, at least `least`."""
    if whole.startswith(prefix):
        return max(least, len(prefix))
    if prefix[:least] != whole[:least]:
        return least
    pairs = enumerate(zip(prefix[least:], whole[least:], strict=False), least)
    return next((i for i, (a, b) in pairs if a != b), min(len(prefix), len(whole)))


def _incremental(ids: list[int], whole: str, decode: Decode) -> list[str]:
    """By decoding a window that ends with each token, and begins where the text is certain.

    The window moves on where its text agrees with the whole, and where that of its last tokens alone
    is the end of it. For a tokenizer whose text of a token depends on its neighbours.
    """
    ends, start, before = [0], 0, 0
    for k in range(len(ids)):
        text = decode(ids[start : k + 1])
        rest = whole[before:]
        ends.append(before + _agreed(text, rest, ends[-1] - before))
        if k - start >= WINDOW and rest.startswith(text):
            kept = decode(ids[k + 1 - KEPT : k + 1])
            if kept and text.endswith(kept):
                start, before = k + 1 - KEPT, before + len(text) - len(kept)
    ends[-1] = len(whole)
    return [whole[a:b] for a, b in itertools.pairwise(ends)]
