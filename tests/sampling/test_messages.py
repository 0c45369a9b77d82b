"""Prompts as messages, and rendered text: the tokens are those of TRL, whatever the file."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import trl
from datasets import Dataset, DatasetDict
from jinja2.exceptions import TemplateError
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from funcprobe.adapters.sampling.encoding import encode_prompts
from funcprobe.adapters.sampling.prompts import Example, load_prompts, render_prompts
from funcprobe.types import InputError

SPECIAL = ["<s>", "</s>", "<pad>", "<|start|>", "<|end|>", "<image>"]
CHAT = (
    "{{ bos_token }}{% if tools %}tools {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}:{{ m['content'] or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% if thinking is defined %}think {{ thinking }}:"
    "{% endif %}{% endif %}"
)
U, A, S = "user", "assistant", "system"


def said(role, content, **more):
    return {"role": role, "content": content} | more


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
OTHER = {"type": "function", "function": {"name": "now", "arguments": {"zone": "x"}}}
TALKS = [
    [said(U, "one")],
    [said(S, "be brief"), said(U, "two\nlines")],
    [said(U, "a"), said(A, "b"), said(U, "c")],
    [said(U, "a"), said(A, "", tool_calls=[CALL]), said("tool", "3", name="add"), said(U, "d")],
    [said(U, "a"), said(A, "", tool_calls=[OTHER]), said("tool", "4", name="now")],
    [said(U, "a"), said(A, "the sum is")],
]


def tokenizer(template=CHAT, processor="<s> $A", special=SPECIAL):
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *characters]))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = Fuse()
    if processor:
        made.post_processor = TemplateProcessing(
            single=processor, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(dict.fromkeys(special[3:])),
        chat_template=template,
    )


def by_trl(prompts, tok, tools=None, **arguments):
    """Token ids as TRL 1.16's GRPOTrainer makes them."""
    trainer = SimpleNamespace(
        processing_class=tok,
        _is_vlm=False,
        environment_factories=None,
        tools=tools,
        chat_template=None,
        chat_template_kwargs=arguments,
    )
    return GRPOTrainer._tokenize_prompts(trainer, prompts)[0]


def ours(examples, tok, **settings):
    prompts, lines = render_prompts(examples, tok, **settings)
    ids, more = encode_prompts(prompts, tok)
    return ids, [*lines, *more]


def examples(prompts):
    return [Example(prompt, {}) for prompt in prompts]


def stored(folder, kind):
    rows = [{"prompt": talk, "answer": i} for i, talk in enumerate(TALKS)]
    as_json = [{"prompt": json.dumps(talk), "answer": i} for i, talk in enumerate(TALKS)]
    path = folder / f"x.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":  # as verl's: Arrow gives every message every field
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json-in-parquet":
        path = path.with_suffix(".parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_json), path)
    elif kind == "csv":
        Dataset.from_list(as_json).to_csv(path)
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    elif kind == "splits":
        few = Dataset.from_list(rows[:1])
        DatasetDict({"test": few, "train": Dataset.from_list(rows)}).save_to_disk(path)
    return str(path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json-in-parquet", "csv", "saved", "splits"])
def test_messages_of_every_kind_of_file_have_trls_tokens(tmp_path, kind):
    tok = tokenizer()
    loaded = load_prompts(stored(tmp_path, kind), prompt_column="prompt")
    assert [e.given for e in loaded] == TALKS  # without the nulls that Arrow adds, at any depth
    assert [e.row for e in loaded] == [{"answer": i} for i in range(len(TALKS))]
    ids, lines = ours(loaded, tok)
    assert ids == by_trl(TALKS, tok)
    assert ids[0].count(0) == 1
    assert lines[0] == "prompts: messages, rendered by the tokenizer's chat template"


TEMPLATES = sorted(
    path
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training")  # the same, with marks of the assistant's tokens
)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_published_templates_have_trls_tokens(path):
    """Also where a template rejects a system message, or calls of tools."""
    template = path.read_text(encoding="utf-8")
    found = re.findall(r"<\|?[a-zA-Z_/]+\|?>|\[/?[A-Z_]+\]", template)
    tok = tokenizer(template, special=[*SPECIAL, *(x for x in found if "think" not in x)])
    for talk in TALKS:
        try:
            expected = by_trl([talk], tok)
        except (TemplateError, TypeError):  # the second: arguments of a call as an object
            with pytest.raises(InputError, match="the chat template rejects the messages of prompt 1"):
                ours(examples([talk]), tok)
        else:
            assert ours(examples([talk]), tok)[0] == expected
    rendered = tok.apply_chat_template(TALKS[0], tokenize=False, add_generation_prompt=True)
    assert "rendered already" in ours(examples([rendered]), tok)[1][0]
    assert "as a user message" in ours(examples(["1 <b>2</b> [3] | <think>"]), tok)[1][0]


def test_a_template_with_a_date_is_pointed_out():
    tok = tokenizer(CHAT + "{% if not date_string %}{{ strftime_now('%d %b %Y') }}{% endif %}")
    assert "warning: the chat template writes today's date" in ours(examples(TALKS), tok)[1][-1]
    given = {"date_string": "26 Jul 2024"}
    ids, lines = ours(examples(TALKS), tok, chat_template_kwargs=given)
    assert ids == by_trl(TALKS, tok, **given)
    assert not any("date" in line for line in lines)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_split_that_is_not_there_is_named(tmp_path):
    path = stored(tmp_path, "splits")
    assert len(load_prompts(path, prompt_column="prompt", split="test")) == 1
    with pytest.raises(InputError, match="no split 'validation', its splits are: test, train"):
        load_prompts(path, prompt_column="prompt", split="validation")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_csv_has_the_types_that_datasets_gives_it(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeffprompt,answer,note\n"a, ""b""\nc",72,\nd,3,x\n'.encode())
    loaded = load_prompts(str(path), prompt_column="prompt")
    assert loaded[0] == Example('a, "b"\nc', {"answer": 72, "note": None})
    assert loaded[1] == Example("d", {"answer": 3, "note": "x"})


def test_a_saved_data_set_that_is_damaged(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(InputError, match="is a saved data set that cannot be read"):
        load_prompts(str(tmp_path), prompt_column="prompt")


def test_arguments_and_tools_reach_the_template():
    tok, tools = tokenizer(), [{"type": "function", "function": {"name": "add"}}]
    ids, _ = ours(examples(TALKS), tok, chat_template_kwargs={"thinking": False})
    assert ids == by_trl(TALKS, tok, thinking=False)
    assert ids != by_trl(TALKS, tok)
    for given in (tools, json.dumps(tools), [tools[0] | {"strict": None}]):
        ids, lines = ours([Example(t, {"tools": given}) for t in TALKS], tok)
        assert ids == by_trl(TALKS, tok, tools=tools)
        assert any("the columns tools are passed" in line for line in lines)
    # A row's own arguments before those of the configuration; no tools are none.
    rows = [Example(TALKS[0], {"tools": [], "chat_template_kwargs": {"thinking": True}})]
    ids, _ = ours(rows, tok, chat_template_kwargs={"thinking": False})
    assert ids == by_trl(TALKS[:1], tok, thinking=True)
    with pytest.raises(InputError, match="prompt 1: column 'tools' contains int"):
        ours([Example(TALKS[0], {"tools": 3})], tok)
    with pytest.raises(InputError, match="rejects the messages of prompt 1"):
        ours(examples(TALKS), tok, chat_template_kwargs={"continue_final_message": True})


def test_a_last_turn_of_the_assistant_is_continued_on_request():
    tok = tokenizer()
    ids, lines = ours(examples(TALKS[-1:]), tok)
    assert tok.decode(ids[0]).endswith("the sum is<|end|><|start|>assistant:")
    assert any("1 of 1 end in an assistant's message" in line for line in lines)
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    ids, lines = ours(examples(TALKS[-1:]), tok, chat_template_kwargs=asked)
    assert tok.decode(ids[0]).endswith("the sum is")
    assert len(lines) == 1


def test_text_becomes_a_user_message_unless_it_is_rendered():
    tok = tokenizer()
    as_text = [talk[0]["content"] for talk in TALKS[:1]]
    ids, lines = ours(examples(as_text), tok)
    assert ids == by_trl(TALKS[:1], tok)
    assert "as a user message" in lines[0]
    assert "prompts.chat = false" in lines[0]
    ids, lines = ours(examples(as_text), tok, chat=True)
    assert ids == by_trl(TALKS[:1], tok)
    assert "prompts.chat" not in lines[0]
    ids, lines = ours(examples(as_text), tok, chat=False)
    assert ids == by_trl(as_text, tok)
    ids, lines = ours(examples(as_text), tokenizer(template=None))
    assert ids == by_trl(as_text, tok)
    assert lines == ["prompts: text, as it is: the tokenizer has no chat template"]


@pytest.mark.parametrize("chat", ["auto", True, False])
def test_rendered_text_is_not_rendered_again(chat):
    """Also with other marks than BOS: the second text begins in the middle of a conversation."""
    tok = tokenizer()
    texts = [tok.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in TALKS[:2]]
    ids, lines = ours(examples(texts), tok, chat=chat)
    assert ids == by_trl(TALKS[:2], tok)
    assert ids[0][:2] != [0, 0]
    assert any("2 of 2 begin with '<s>'" in line for line in lines)
    assert ("rendered already" in lines[0]) == (chat is not False)
    without = [text.removeprefix("<s>") for text in texts]
    ids, lines = ours(examples(without), tok, chat=chat)
    assert ids == by_trl(TALKS[:2], tok)  # the tokenizer's BOS
    assert len(lines) == 1


def test_text_of_which_some_is_rendered():
    tok, mixed = tokenizer(), examples(["one", "<|start|>user:two<|end|>"])
    with pytest.raises(InputError, match=r"1 of 2 prompts contain marks .*prompts.chat = true to"):
        ours(mixed, tok)
    ids, lines = ours(mixed, tok, chat=True)
    assert tok.decode(ids[1]).count("<|start|>") == 3
    assert "warning: 1 of 2 prompts contain marks" in lines[1]
    # What no template writes is no mark of one: a token for images, a tag of reasoning.
    ids, lines = ours(examples(["<image>", "think in <think>"]), tok)
    assert "as a user message" in lines[0]


def test_messages_ask_for_a_template():
    with pytest.raises(InputError, match="the prompts are messages, but the tokenizer has no chat"):
        ours(examples(TALKS), tokenizer(template=None))
    with pytest.raises(InputError, match=r"prompts.chat is false, but the prompts are messages"):
        ours(examples(TALKS), tokenizer(), chat=False)


def test_a_system_message_is_given_once():
    tok = tokenizer()
    ids, _ = ours(examples([TALKS[0], TALKS[2]]), tok, system_prompt="be brief")
    system = said(S, "be brief")
    assert ids == by_trl([[system, *TALKS[0]], [system, *TALKS[2]]], tok)
    with pytest.raises(InputError, match="system_prompt is set, but prompt 2 has a system message"):
        ours(examples(TALKS[:2]), tok, system_prompt="be brief")


def test_messages_under_a_template_of_text(tmp_path):
    path = stored(tmp_path, "jsonl")
    with pytest.raises(InputError, match=r"template makes text, but column 'prompt' contains mess"):
        load_prompts(path, prompt_column="prompt", template="{answer}")


def test_special_tokens_are_as_asked_for():
    tok, text = tokenizer(template=None), examples(["<s>ab"])
    prompts, _ = render_prompts(text, tok)
    assert encode_prompts(prompts, tok, add_special_tokens=True)[0] == by_trl(["<s>ab"], tok)
    assert encode_prompts(prompts, tok, add_special_tokens=True)[0][0][:2] == [0, 0]
    assert "begin with '<s>' twice" in encode_prompts(prompts, tok, add_special_tokens=True)[1][0]
    plain, _ = render_prompts(examples(["ab"]), tok)
    assert encode_prompts(plain, tok, add_special_tokens=False)[0][0][0] != 0
    # A prefix of several tokens counts as a whole.
    two = tokenizer(template=None, processor="<s> </s> $A")
    for given, count in (("<s></s>ab", 1), ("<s>ab", 2), ("ab", 1)):
        prompts, _ = render_prompts(examples([given]), two)
        assert encode_prompts(prompts, two)[0][0].count(0) == count


def test_a_prompt_that_ends_with_eos_is_pointed_out():
    closing = tokenizer(template=CHAT + "</s>")
    ids, lines = ours(examples(TALKS[:2]), closing)
    assert all(x[-1] == 1 for x in ids)
    assert any("warning: 2 of 2 prompts end with '</s>'" in line for line in lines)
    assert not any(line.startswith("warning") for line in ours(examples(TALKS), tokenizer())[1])


def test_a_text_that_begins_with_a_bracket_stays_text(tmp_path):
    texts = ["[1, 2] is a list", "[]", '[{"a": 1}]', "[{", '["role"]']
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    assert [e.given for e in load_prompts(str(path), prompt_column="prompt")] == texts
