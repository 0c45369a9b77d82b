"""The responses in a page: every character, every colour and every number of tokens.parquet."""

import base64
import itertools
import json
import math
import zlib
from html.parser import HTMLParser

import numpy as np
import pyarrow.compute as pc
import pytest

from funcprobe.adapters.report.page import report_html
from funcprobe.adapters.report.responses import batches, responses, view
from funcprobe.adapters.report.responses.marks import mark, mark_text, shown_units
from funcprobe.adapters.report.responses.packing import pack, three_digits
from funcprobe.adapters.results.saved import load_run
from support.saved_runs import copied
from support.spoken import Said, speaking, tokens_of

EMOJI = Said(["Hi", " ", "", "", "", "😀", "!", "\n", "<eos>"], special=[8])
ODD = [
    EMOJI,
    Said(["a  b", "\tc\r", "\n", "\n", "  d ", "e", " "]),
    Said(["<b>", "&amp;", "</script>", '"', "'", "<!--"], prompt="</p><img src=x>", prompt_index=1),
    Said(["\u202eevil", "\u2066", "\x00\x1b[31m", "\x7f", "\u200b", "\ufeff", "\U000e0041"]),
    Said(["\u00a0", "\u3000", " \u2003", "e\u0301", "\u0634\u0639", "👩\u200d", "👧", "\ufffd"]),
    Said(["word"] * 3, prompt="long " * 50, prompt_index=2),
    Said([""], prompt_index=2, prompt="long " * 50),
    Said([" x"], prompt_index=2, prompt="long " * 50),
]


class Articles(HTMLParser):
    """What a browser would show: by id of an article (element, text) of its tokens, in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.found, self.inside, self.stack = {}, None, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "article":
            self.inside = self.found[attributes["id"]] = []
        elif self.inside is not None and "tokens" in (attributes.get("class") or "").split():
            self.stack = ["p"]
        elif self.stack:
            self.stack.append(tag)
            if tag == "m-p":
                self.inside.append((tuple(self.stack[1:]), ""))

    def handle_endtag(self, tag):
        if self.stack:
            assert self.stack.pop() == tag

    def handle_data(self, text):
        if self.stack:
            self.inside.append((tuple(self.stack[1:]), text))

    def text(self, identity):
        """The text itself: names of characters that are not seen replaced by the characters."""
        return "".join(
            _character(text) if "m-c" in place else text for place, text in self.found[identity]
        )


def _character(name):
    if name.startswith("U+"):
        return chr(int(name[2:], 16))
    return "\x7f" if name == "␡" else chr(ord(name) - 0x2400)


@pytest.fixture(scope="module")
def odd(run_folder, tmp_path_factory):
    folder = speaking(run_folder, tmp_path_factory.mktemp("odd") / "odd", ODD)
    return load_run(folder)


@pytest.fixture(scope="module")
def shown(odd):
    return responses(odd)


def _data(html):
    text = str(html).split('id="responses-data">')[1].split("</script>")[0]
    return json.loads(text)


def test_the_text_of_every_response_is_whole(odd, shown):
    found = Articles(shown.html)
    assert len(found.found) == 2 * len(ODD)
    for batch, (i, said) in itertools.product("UE", enumerate(ODD)):
        assert found.text(f"{batch}-{i}") == "".join(said.tokens)
        assert [row["text"] for row in tokens_of(odd.folder, batch, i)] == said.tokens


def test_texts_of_a_run_are_those_of_its_table(saved_run):
    found = Articles(responses(saved_run).html)
    rows = saved_run.table("sequences").to_pylist()
    assert len(found.found) == len(rows)
    for row in rows:
        tokens = tokens_of(saved_run.folder, row["batch"], row["sequence"])
        assert found.text(f"{row['batch']}-{row['sequence']}") == "".join(t["text"] for t in tokens)
        plain = "".join(t["text"] for t in tokens if not t["special"])
        assert plain.strip() == row["response"].strip()


def test_what_is_not_seen_has_a_mark(shown):
    places = {
        text: place[-1]
        for found in Articles(shown.html).found.values()
        for place, text in found
        if place
    }
    of_marks = {text: name for text, name in places.items() if name.startswith("m-")}
    for text, name in {
        "U+202E": "m-c",
        "U+2066": "m-c",
        "␀": "m-c",
        "␛": "m-c",
        "␡": "m-c",
        "␍": "m-c",
        "U+200B": "m-c",
        "U+E0041": "m-c",
        "\t": "m-t",
        "\n": "m-n",
        "  ": "m-s",
        "\u00a0": "m-w",
        "\u3000": "m-w",
        "<eos>": "m-k",
        "": "m-p",
    }.items():
        assert of_marks[text] == name, text
    for kept in ("👩\u200d", "👧", "e\u0301"):
        assert any(kept in text for text in places) or kept in str(shown.html)


def test_a_character_in_pieces_is_shown_once(shown):
    found = Articles(shown.html).found["U-0"]
    assert [text for _, text in found if "😀" in text] == ["😀"] or any(
        text.startswith("😀") for _, text in found
    )
    assert sum(text.count("😀") for _, text in found) == 1
    assert sum(place[-1:] == ("m-p",) for place, _ in found) == 3
    assert "\ufffd" not in "".join(text for _, text in found)


def test_texts_become_no_elements(shown):
    for payload in ("<img", "<b>", "<!--"):
        assert payload not in str(shown.html).split("responses-data")[0]
    assert "</script>" not in str(shown.html).split('id="responses-data">')[1][:-60]


@pytest.mark.parametrize("batch", ["U", "E"])
def test_colours_are_those_of_the_shares(saved_run, batch):
    """A loop over the table: quantile, level and element of each token, one at a time."""
    rows = [row for row in saved_run.table("tokens").to_pylist() if row["batch"] == batch]
    eta = saved_run.results.next_lr.value
    sizes = sorted(abs(row["share"] * eta) for row in rows)
    full = sizes[math.ceil(0.98 * (len(sizes) - 1))]
    found = Articles(responses(saved_run).html)
    seen = set()
    for (i, _), of_response in itertools.groupby(rows, lambda row: (row["sequence"], 0)):
        expected = []
        for row in of_response:
            share = row["share"] * eta
            level = min(int(10 * abs(share) / full + 0.5), 10)
            name = f"{'f' if share < 0 else 'r'}-{level}" if level else ""
            expected += [name] * shown_units(row["text"])
            seen.add(name)
        shown = []
        for place, text in found.found[f"{batch}-{i}"]:
            name = next((p for p in place if p[:2] in ("f-", "r-")), "")
            shown += [name] * (len(text.encode("utf-16-le")) // 2)
        assert shown == expected
    assert len(seen) > 4
    legend = str(responses(saved_run).html).split(f'id="responses-{batch}"')[1]
    assert view.number(full) in legend.split("</figure>")[0]


@pytest.mark.parametrize("batch", ["U", "E"])
def test_the_data_are_the_tables_to_three_digits(odd, shown, batch):
    data = _data(shown.html)[batch]
    raw = zlib.decompress(base64.b64decode(data["packed"]), wbits=-15)
    count = data["tokens"]
    assert len(raw) == 2 * count * (len(data["columns"]) + 1)
    columns = [
        [raw[2 * k * count + i] + 256 * raw[(2 * k + 1) * count + i] for i in range(count)]
        for k in range(len(data["columns"]) + 1)
    ]
    eta, start = odd.results.next_lr.value, 0
    for sequence, _, share, _, length in data["responses"]:
        rows = tokens_of(odd.folder, batch, sequence)
        assert len(rows) == length
        assert share == pytest.approx(sum(row["share"] for row in rows) * eta)
        for i, row in enumerate(rows, start=start):
            assert columns[-1][i] == shown_units(row["text"])
            for (name, lowest), codes in zip(data["columns"], columns[:-1], strict=True):
                value = row[name] * (eta if name in batches.SHARES else 1)
                assert f"{_decoded(codes[i], lowest):.2e}" == f"{value:.2e}", name
        start += length
    assert start == count
    sizes = [abs(one[2]) for one in data["responses"]]
    assert sizes == sorted(sizes, reverse=True)


def _decoded(code, lowest):
    if code == 0:
        return 0.0
    size, negative = (code - 1) // 2, (code - 1) % 2
    return float(f"{'-' if negative else ''}{100 + size % 900}e{lowest + size // 900 - 2}")


def test_three_digits_are_the_nearest():
    draw = np.random.default_rng(0)
    values = draw.standard_normal(20_000) * 10.0 ** draw.integers(-300, 300, 20_000)
    edges = [0.0, 1.0, 9.995, 9.994999, 99.95, 1e-300, 1e300, 999.5, -1000.0, 1e-5, 5e-324]
    values = np.concatenate([values, edges, [np.nan, np.inf]])
    shown = three_digits(values)
    assert shown.missing[-2:].all()
    assert not shown.missing[:-2].any()
    assert np.isnan(shown.values[-1])
    for value, digits, exponent, negative in zip(
        values[:-2], shown.digits, shown.exponent, shown.negative, strict=False
    ):
        size = abs(float(value))
        if size < 1e-305:
            continue
        assert 100 <= digits <= 999
        assert abs(float(f"{digits}e{exponent - 2}") - size) <= 0.5001 * 10.0 ** (exponent - 2)
        assert negative == (value < 0)


def test_numbers_far_below_the_largest_are_0_and_missing_ones_stay_missing():
    data = pack({"x": three_digits(np.array([1e3, 1e-40, np.nan, -2.5]))}, [1, 1, 1, 1])
    raw = zlib.decompress(base64.b64decode(data["packed"]), wbits=-15)
    codes = [raw[i] + 256 * raw[4 + i] for i in range(4)]
    lowest = data["columns"][0][1]
    assert [_decoded(codes[i], lowest) for i in (0, 1, 3)] == [1000.0, 0.0, -2.5]
    assert codes[2] == 0xFFFF


def test_a_prompt_stands_once(odd, shown):
    html = str(shown.html)
    long = ODD[5].prompt
    assert html.count(long.rstrip()) == 2  # U's and E's
    first, *others = (i for i, _, *_ in _data(shown.html)["U"]["responses"] if i in (5, 6, 7))
    assert html.count(f'href="#U-{first}-prompt"') == len(others) == 2
    assert "Prompt 0 in full" not in html  # it is short


def test_a_very_long_prompt_is_shown_without_its_middle(run_folder, tmp_path):
    prompt = "".join(f"line {i}\n" for i in range(2000))
    folder = speaking(run_folder, tmp_path / "long", [Said([" x"], prompt=prompt)])
    html = str(responses(load_run(folder)).html)
    kept = view.LONGEST_PROMPT
    assert f"{len(prompt) - kept:,} characters: sequences.parquet has them" in html
    assert "line 0<m-n>" in html
    assert "line 1999<m-n>" in html
    assert "line 1000<m-n>" not in html
    assert len(html) < 2 * 20 * kept


def test_a_response_without_tokens_is_no_error(run_folder, tmp_path):
    folder = speaking(run_folder, tmp_path / "empty", [Said([]), Said([" x"])])
    assert Articles(responses(load_run(folder)).html).found["U-0"] == []


def test_older_runs_show_the_tokens_as_they_were_decoded(odd, tmp_path):
    import pyarrow.parquet as pq

    folder = copied(odd.folder, tmp_path / "older")
    table = pq.read_table(folder / "tokens.parquet").drop_columns(["text", "special"])
    pq.write_table(table, folder / "tokens.parquet")
    found = Articles(responses(load_run(folder)).html)
    assert found.text("U-0") == "".join(EMOJI.tokens)
    assert "m-k" not in {name for place, _ in found.found["U-0"] for name in place}


def test_without_tokens_the_responses_are_there_without_colour(odd, tmp_path):
    folder = copied(odd.folder, tmp_path / "summary")
    (folder / "tokens.parquet").unlink()
    shown = responses(load_run(folder))
    assert Articles(shown.html).text("E-1") == "".join(ODD[1].tokens)
    assert "none of tokens" in shown.html
    assert "<f-" not in shown.html
    assert "<r-" not in shown.html
    (folder / "sequences.parquet").unlink()
    shown = responses(load_run(folder))
    assert "no shares of its responses" in shown.html
    assert "<article" not in shown.html
    assert not shown.script


def test_the_part_of_the_batch_is_that_of_the_results(saved_run):
    html = str(responses(saved_run).html)
    eta, attribution = saved_run.results.next_lr.value, saved_run.results.attribution
    assert view.number(attribution.update.share * eta) in html
    assert view.number(attribution.whole.share * eta) in html
    assert f"learning rate {view.plain(eta)}" in html


def test_beyond_the_bound_the_largest_are_shown_and_the_rest_counted(odd, monkeypatch):
    monkeypatch.setattr(view, "MOST_TOKENS", 12)
    html = responses(odd).html
    data = _data(html)["U"]
    kept = len(data["responses"])
    assert 0 < kept < len(ODD)
    assert sum(one[4] for one in data["responses"]) <= 12 or kept == 1
    assert f"Here are {kept} of {len(ODD)} responses, the largest by |share|" in html
    assert sum(name.startswith("U-") for name in Articles(html).found) == kept


@pytest.mark.slow
def test_a_large_run_is_small_enough(large_run):
    html = report_html(large_run)
    assert len(html.encode()) < 8e6
    assert html.count("<article") == 2 * 512
    part = '<article id="U-3"' + html.split('<article id="U-3"')[1].split("</article>")[0]
    rows = large_run.table("tokens").filter(pc.field("sequence") == 3).to_pylist()
    said = [row["text"] for row in rows if row["batch"] == "U"]
    assert len(said) == 300
    assert Articles(part).text("U-3") == "".join(said)


def test_marks_are_those_of_a_scan_of_the_text():
    """Of random texts, whatever the levels: nothing is lost, doubled or in another token's element."""
    draw = np.random.default_rng(3)
    letters = np.array(list("ab  \n\t<&\x00\u202e😀\u00a0"))
    for _ in range(300):
        tokens = ["".join(draw.choice(letters, draw.integers(0, 4))) for _ in range(8)]
        special = (draw.random(8) < 0.1).tolist()
        levels = draw.choice(["", "f-1", "r-2"], 8).tolist()
        marked = mark(tokens, special, levels)
        found = Articles(f"<article id=x><p class=tokens>{marked.html}</p></article>")
        if not any(special):
            assert found.text("x") == "".join(tokens)
        shown = "".join(text for _, text in found.found["x"])
        assert len(shown.encode("utf-16-le")) // 2 == sum(marked.units)
        expected = [level for level, n in zip(levels, marked.units, strict=True) for _ in range(n)]
        assert expected == [
            next((p for p in place if p[:2] in ("f-", "r-")), "")
            for place, text in found.found["x"]
            for _ in range(len(text.encode("utf-16-le")) // 2)
        ]


def test_a_prompt_is_marked_as_a_response_is():
    assert mark_text("a\n <b>\u202e") == "a<m-n>\n</m-n><m-s> </m-s>&lt;b&gt;<m-c>U+202E</m-c>"
