"""Prompts from small files of every kind, with a tokenizer made on the spot."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from funcprobe.adapters.checkpoint.vocabulary import require_rows, tokens_without_row
from funcprobe.adapters.sampling.encoding import encode_prompts
from funcprobe.adapters.sampling.prompts import (
    Example,
    Prompt,
    draw_distinct,
    draw_with_replacement,
    load_prompts,
    render_prompts,
)
from funcprobe.types import InputError

ROWS = [
    {"question": "How many?", "answer": "#### 3", "level": 1},
    {"question": "Wo\u2028hin, 道?", "answer": "#### 4", "level": 2},
]
WORDS = ["<s>", "</s>", "<unk>", "user", "system", "assistant", ":", "how", "many", "be", "brief"]
CHAT = (
    "<s> {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(chat_template=CHAT, template="<s> $A"):
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def write(tmp_path, name, rows=ROWS):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    return str(path)


def write_text(tmp_path, text, name="x.jsonl"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_files_of_every_kind(tmp_path, name):
    prompts = load_prompts(write(tmp_path, name), prompt_column="question")
    assert prompts == [
        Example("How many?", {"question": "How many?", "answer": "#### 3", "level": 1}),
        Example("Wo\u2028hin, 道?", {"question": "Wo\u2028hin, 道?", "answer": "#### 4", "level": 2}),
    ]
    assert len(load_prompts(write(tmp_path, name), prompt_column="question", limit=1)) == 1


def test_json_lines_with_a_mark_blank_lines_and_carriage_returns(tmp_path):
    text = b'\xef\xbb\xbf{"q": "a"}\r\n\r\n  {"q": "b"}'
    for name in ("x.jsonl", "x.json"):
        prompts = load_prompts(write_text(tmp_path, text, name), prompt_column="q")
        assert [p.given for p in prompts] == ["a", "b"]


def test_a_template_over_the_columns(tmp_path):
    rows = [{"the.q": "How many?", "n[0]": 7, "null": None}]
    prompts = load_prompts(
        write(tmp_path, "a.jsonl", rows),
        prompt_column="the.q",
        template="Q: {the.q} ({n[0]:03d}) \\boxed{{}}\nA:",
    )
    assert prompts[0].given == "Q: How many? (007) \\boxed{}\nA:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {anser}", r"unknown field \{anser\}; .*answer, level, question"),
        ("{question} \\boxed{}", r"unknown field \{0\}.*literal brace twice"),
        ("{question} }", "literal brace twice"),
        ("{question.__class__}", "unknown field"),
        ("{question:d}", "row 1 of .*: template .*Unknown format code 'd'"),
        ("{level:>{width}}", r"unknown field \{width\}"),
    ],
)
def test_templates_that_do_not_fit(tmp_path, template, message):
    with pytest.raises(InputError, match=message):
        load_prompts(write(tmp_path, "a.jsonl"), prompt_column="question", template=template)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"qestion": "a", "answer": "b"}], "no column 'question', .*answer, qestion; did you m"),
        ([{"question": "a"}, {"answer": "b"}], "row 2 of .*no column 'question'"),
        ([{"question": ""}], "row 1 of .* an empty string, expected text"),
        ([{"question": " \n"}], "an empty string, expected text"),
        ([{"question": None}], "contains NoneType, expected text"),
        ([{"question": {"role": "user", "content": "a"}}], "contains dict, expected text or messages"),
        ([{"question": []}], "row 1 of .* is an empty list"),
        ([{"question": ["a"]}], "message 1 of row 1 .* found str, expected role and content"),
        ([{"question": [{"from": "human", "value": "a"}]}], "found from, value, expected role"),
        ([{"question": [{"role": "user", "content": None}]}], "content is NoneType, expected text"),
        ([{"question": [{"role": "user", "content": [{"type": "image"}]}]}], "content of type image"),
        (
            [{"question": "a"}, {"question": [{"role": "user", "content": "a"}]}],
            "row 2 .* has messages",
        ),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(write(tmp_path, "a.jsonl", rows), prompt_column="question")
    assert "\n" not in str(caught.value)


def test_a_null_in_the_template(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"q": "a", "hint": None}])
    with pytest.raises(InputError, match=r"null in column \{hint\}"):
        load_prompts(path, prompt_column="q", template="{q} {hint}")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"q": "a"}\n\n{"q": }\n', "x.jsonl", "x.jsonl, line 3: Expecting value; expected one"),
        ('[{"q": "a"},\n {"q": }]', "x.json", "x.json, line 2: Expecting value"),
        ('{\n"q": "a"}', "x.json", "x.json, line 1: .*one JSON object per line"),
        ('{"q": "a"}\n3\n', "x.jsonl", "row 2: int, expected a JSON object"),
        ('[{"q": "a"}, "b"]', "x.json", "row 2: str, expected a JSON object"),
        (b'{"q": "\xff"}', "x.jsonl", "expected UTF-8 text"),
        ("", "x.jsonl", "has no rows"),
        ('{"q": "a"}\n{"q": "\\ud800"}', "x.jsonl", "row 2 of .*not Unicode text"),
        ("[" * 100_000, "x.jsonl", "line 1: nested too deeply"),
        ("not parquet", "x.parquet", "cannot be read as Parquet"),
        ("q\na\n", "x.tsv", "expected a file of type .jsonl, .json, .parquet, .csv"),
        ('q,r\n"a', "x.csv", "x.csv cannot be read as CSV"),
        ("q,r\n\n", "x.csv", "has no rows"),
        ("", "x.csv", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, name, message):
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(write_text(tmp_path, text, name), prompt_column="q")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no/such.jsonl", "./no_such", "/no/such", "~/no_such_9"])
def test_a_path_that_does_not_exist(source):
    with pytest.raises(InputError, match="file not found"):
        load_prompts(source, prompt_column="q")


def test_options_that_contradict_each_other(tmp_path):
    path = write(tmp_path, "a.jsonl")
    with pytest.raises(InputError, match="limit is 0"):
        load_prompts(path, prompt_column="question", limit=0)
    texts, without = load_prompts(path, prompt_column="question"), tokenizer(chat_template=None)
    for chat, tok in ((False, tokenizer()), ("auto", without)):
        with pytest.raises(InputError, match="system_prompt is set, but the prompts are text"):
            render_prompts(texts, tok, chat=chat, system_prompt="be brief")
    with pytest.raises(InputError, match="chat is true, but the tokenizer has no chat template"):
        render_prompts(texts, without, chat=True)


class Calls(list):
    def __call__(self, *args, **kwargs):
        self.append((args, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_dataset_by_name(monkeypatch):
    calls = Calls()
    calls.answer = ROWS
    monkeypatch.setattr("datasets.load_dataset", calls)
    prompts = load_prompts("openai/gsm8k:main", prompt_column="question", split="test")
    load_prompts("imdb", prompt_column="question")
    row = {"question": "How many?", "answer": "#### 3", "level": 1}
    assert prompts[0] == Example("How many?", row)
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("imdb", None), {"split": "train"}),
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("no\nnetwork"), ValueError("Unknown split"), RuntimeError("scripts")]
)
def test_a_dataset_that_cannot_be_loaded(monkeypatch, error):
    calls = Calls()
    calls.answer = error
    monkeypatch.setattr("datasets.load_dataset", calls)
    with pytest.raises(InputError, match=r"dataset 'openai/nothing' \(configuration None") as caught:
        load_prompts("openai/nothing", prompt_column="q")
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_a_folder_goes_to_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "train.jsonl")
    prompts = load_prompts(str(tmp_path / "data"), prompt_column="question")
    assert [p.row["level"] for p in prompts] == [1, 2]
    with pytest.raises(InputError, match=r"split 'test'.*Unknown split"):
        load_prompts(str(tmp_path / "data"), prompt_column="question", split="test")


def test_chat_renders_and_encodes_with_one_bos(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"q": "how many"}])
    tok = tokenizer()
    texts = load_prompts(path, prompt_column="q")
    chat, _ = render_prompts(texts, tok, chat=True, system_prompt="be brief")
    assert chat[0].text == "<s> system : be brief user : how many assistant :"
    assert encode_prompts(chat, tok) == ([[0, 4, 6, 9, 10, 3, 6, 7, 8, 5, 6]], [])
    plain, _ = render_prompts(texts, tok, chat=False)
    assert encode_prompts(plain, tok) == ([[0, 7, 8]], [])


def test_a_chat_template_that_refuses(tmp_path):
    refusing = tokenizer(chat_template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(InputError, match="System role not supported"):
        render_prompts([Example("how", {})], refusing, chat=True)


def test_encodings_that_cannot_be_used():
    two = [Prompt("how", {}, "how"), Prompt("how many", {}, "how many")]
    assert encode_prompts(two, tokenizer(), max_prompt_tokens=3) == ([[0, 7], [0, 7, 8]], [])
    with pytest.raises(InputError, match="prompt 2 has 3 tokens, at most 2"):
        encode_prompts(two, tokenizer(), max_prompt_tokens=2)
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        encode_prompts([Prompt(" ", {}, " ")], tokenizer(), add_special_tokens=False)
    with pytest.raises(InputError, match="appends '</s>' to prompt 1"):
        encode_prompts(two, tokenizer(template="<s> $A </s>"))


def test_tokens_without_a_row():
    assert tokens_without_row(tokenizer(), len(WORDS), [0]) == []
    assert tokens_without_row(tokenizer(), 128, [0]) == []
    (line,) = tokens_without_row(tokenizer(), len(WORDS) - 1, [0])
    assert "1 of the tokenizer's tokens have no row in the model, as 'brief' (id 10, 10 rows)" in line
    with pytest.raises(InputError, match=r"the end-of-sequence token 'brief' has id 10, .* 10 rows"):
        tokens_without_row(tokenizer(), len(WORDS) - 1, [0, 10])
    added = tokenizer()
    added.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(InputError, match="the padding token '<pad>' has id 11, but the model has 11"):
        tokens_without_row(added, len(WORDS), [0])


def test_prompts_must_have_rows():
    require_rows([[0], [10, 3]], tokenizer(), len(WORDS))
    with pytest.raises(InputError, match=r"prompt 2: .* 'brief' has id 10, but the model has 10 rows"):
        require_rows([[0], [10, 3]], tokenizer(), len(WORDS) - 1)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**63 - 1))
def test_draws(count, population, seed):
    state = torch.random.get_rng_state()
    with_replacement = draw_with_replacement(count, population, seed)
    assert with_replacement == draw_with_replacement(count, population, seed)
    assert len(with_replacement) == count
    assert set(with_replacement) <= set(range(population))
    if count <= population:
        distinct = draw_distinct(count, population, seed)
        assert distinct == draw_distinct(population, population, seed)[:count]
        assert len(set(distinct)) == count
        assert set(distinct) <= set(range(population))
    else:
        with pytest.raises(InputError, match="request fewer"):
            draw_distinct(count, population, seed)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_are_uniform_and_depend_on_the_seed():
    draws = torch.tensor(draw_with_replacement(6000, 6, seed=3))
    # 1,000 of each are expected; 5 standard errors are 5 sqrt(6000 / 6 * 5 / 6) = 145.
    assert bool(((torch.bincount(draws, minlength=6) - 1000).abs() < 145).all())
    assert draw_with_replacement(20, 100, 1) != draw_with_replacement(20, 100, 2)
    assert draw_distinct(20, 100, 1) != draw_distinct(20, 100, 2)


@pytest.mark.parametrize("draw", [draw_with_replacement, draw_distinct])
def test_empty_draws_are_refused(draw):
    for count, population in ((0, 3), (1, 0)):
        with pytest.raises(InputError, match="expected at least 1"):
            draw(count, population, 0)
