"""The text of every token: exact in sum, and every character with the token that completes it."""

import itertools
import time
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from funcprobe.adapters.results.token_texts import special_ids, token_texts

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 12 + 7 = 19, and so on.",
    "Über den Wolken, naïve café; 日本語の文章と中文字符。 한국어 문장.",
    "emoji 🤷🏽‍♀️ 👨‍👩‍👧‍👦 🇩🇪 and e\u0301 a\u0308 \u200bzero\ttab\nline  two spaces",
] * 3
SPECIAL = ["<s>", "</s>", "<|im_start|>"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def wrapped(inner: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen and Llama 3: pieces of bytes, some of them of half a character."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
        ),
    )
    return wrapped(inner)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: a space of its own character, bytes where a character has no token."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    every_byte = [f"<0x{i:02X}>" for i in range(256)]
    inner.train_from_iterator(
        ["▁" + CORPUS[0].replace(" ", "▁"), "▁▁two"],
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=[*SPECIAL, *every_byte], show_progress=False
        ),
    )
    return wrapped(inner)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As T5 and XLNet: the space belongs to the word that follows; none before the first."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return wrapped(inner)


@cache
def suffixes() -> PreTrainedTokenizerFast:
    """As the first GPT: a space after every word but the last, by what follows."""
    inner = Tokenizer(models.BPE(unk_token="<s>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.BPEDecoder("</w>")
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return wrapped(inner)


TOKENIZERS = (byte_level, byte_fallback, metaspace, suffixes)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def common(a: str, b: str) -> int:
    """Leading characters in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def by_whole_prefixes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """Every prefix decoded from the beginning, and what it has in common with the whole."""
    whole, ends = decoded(tokenizer, ids), [0]
    for k in range(len(ids)):
        prefix = decoded(tokenizer, ids[: k + 1])
        ends.append(max(ends[-1], common(prefix, whole)))
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def by_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bytes]:
    """Bytes of every token of a byte-level tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    of = {chr(i): i for i in printable} | {chr(256 + k): i for k, i in enumerate(others)}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [t.encode() if t in SPECIAL else bytes(of[c] for c in t) for t in tokens]


HARD = [
    "🤷🏽\u200d♀️",
    "👨\u200d👩\u200d👧",
    "e\u0301",
    "a\u0308\u0323",
    "漢字",
    "\ufffd",
    " ",
    "  ",
    "\n",
]
texts = st.lists(
    st.one_of(st.sampled_from([*CORPUS, *HARD, *SPECIAL]), st.text(max_size=8)), max_size=6
).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_texts_concatenate_to_what_is_decoded(
    tokenizer: Callable[[], PreTrainedTokenizerFast], data: st.DataObject
) -> None:
    """Of encoded text cut anywhere, and of any ids: characters left unfinished, bytes that are none."""
    tok = tokenizer()
    some = st.one_of(
        st.tuples(texts, st.integers(0, 3)).map(
            lambda x: tok(x[0], add_special_tokens=False)["input_ids"][: -x[1] or None]
        ),
        st.lists(st.integers(0, len(tok) - 1), max_size=30),
    )
    responses = data.draw(st.lists(some, min_size=1, max_size=4))
    found = token_texts(responses, tok)
    assert [len(row) for row in found] == [len(ids) for ids in responses]
    for ids, row in zip(responses, found, strict=True):
        assert "".join(row) == decoded(tok, ids)
        # Llama's bytes are characters all together or none of them: by what follows, far away.
        if tokenizer is not byte_fallback or "\ufffd" not in decoded(tok, ids):
            assert row == by_whole_prefixes(tok, ids)


@settings(max_examples=200, deadline=None)
@given(text=texts.filter(lambda text: "\ufffd" not in text), cut=st.integers(0, 3))
@example("🤷🏽‍♀️漢字", 1)
def test_a_character_is_the_token_s_that_has_its_last_byte(text: str, cut: int) -> None:
    """Against the bytes themselves: empty for all but the last of a character's pieces."""
    tok = byte_level()
    ids = tok(text, add_special_tokens=False)["input_ids"]
    ids = ids[: max(len(ids) - cut, 0)]
    pieces, (found,) = by_bytes(tok, ids), token_texts([ids], tok)
    seen = b""
    complete = b"".join(pieces).decode("utf-8", errors="ignore")  # but for a last, cut character
    for k, (piece, own) in enumerate(zip(pieces, found, strict=True)):
        before, seen = seen, seen + piece
        new = seen.decode("utf-8", "ignore")[len(before.decode("utf-8", "ignore")) :]
        if len("".join(found[: k + 1])) <= len(complete):
            assert own == new, (k, ids)


def test_the_pieces_of_an_emoji() -> None:
    tok = byte_level()
    ids = tok("go 🦑!", add_special_tokens=False)["input_ids"]
    (found,) = token_texts([ids], tok)
    squid = found.index(next(text for text in found if "🦑" in text))
    assert found[squid - 1] == ""
    assert "\ufffd" not in "".join(found)


def test_a_space_before_a_word_stays() -> None:
    """Decoded alone it is lost, but for the first word, before which there is none."""
    tok = byte_fallback()
    ids = tok("fox fox", add_special_tokens=False)["input_ids"]
    (found,) = token_texts([ids], tok)
    assert "".join(found) == "fox fox"
    assert any(text.startswith(" ") for text in found[1:])
    space = next(i for i, text in zip(ids, found, strict=True) if text.startswith(" "))
    assert not decoded(tok, [space]).startswith(" ")


def test_special_tokens_are_those_that_decode_leaves_out() -> None:
    tok = byte_level()
    dropped = {
        i for i in range(len(tok)) if decoded(tok, [i]) != tok.decode([i], skip_special_tokens=True)
    }
    assert special_ids(tok) == dropped == {0, 1, 2}


def test_a_batch_of_usual_size_takes_seconds() -> None:
    """512 responses of 1,000 tokens; the bound is of a loaded machine of two cores."""
    tok = byte_level()
    ids = tok("".join(CORPUS) * 20, add_special_tokens=False)["input_ids"]
    responses = [(ids[i:] + ids[:i])[:1000] for i in range(512)]
    assert {len(x) for x in responses} == {1000}
    began = time.process_time()
    found = token_texts(responses, tok)
    assert time.process_time() - began < 5
    assert "".join(found[7]) == decoded(tok, responses[7])
