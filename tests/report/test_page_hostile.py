"""Hostile texts in everything that a page shows: inert in the browser, and to be read as text."""

import itertools
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomlkit

from funcprobe.adapters.report import write_report
from funcprobe.adapters.report.document import data_block
from funcprobe.adapters.report.visible import visible
from support.payloads import ELSEWHERE, PAYLOADS, RAN
from support.saved_runs import copied

NAME = """<img src=x onerror='window.ran=1'> "quoted" \u202egpj.exe"""
FREE = {
    *("text", "E_text", "U_text", "name", "saw", "bound", "failure_means", "reason", "verdict_reason"),
    *("rule", "about", "findings", "limits", "region", "route", "format", "path", "certainty", "notes"),
    *("sidecar", "platform", "device", "method", "row", "nearest_order", "unlike_the_run", "doubts"),
    *("se", "interval", "versions"),
}
COLUMNS = ("prompt", "response", "token", "tensor", "module", "layer", "projection", "factor", "text")


class Spoiler:
    """Puts the payloads in the place of texts, equal ones for equal ones."""

    def __init__(self):
        self.next = itertools.cycle(PAYLOADS.values())
        self.of = {}
        self.used = set()

    def text(self, original):
        if original not in self.of:
            self.of[original] = next(self.next)
        self.used.add(self.of[original])
        return self.of[original]

    def document(self, value, key=""):
        if isinstance(value, dict):
            return {
                (self.text(k) if key == "versions" else k): self.document(v, key if key in FREE else k)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [self.document(item, key) for item in value]
        return self.text(value) if isinstance(value, str) and key in FREE else value

    def table(self, path):
        table = pq.read_table(path)
        for i, field in enumerate(table.schema):
            if field.name in COLUMNS and pa.types.is_string(field.type):
                spoiled = [None if x is None else self.text(x) for x in table[field.name].to_pylist()]
                table = table.set_column(i, field, pa.array(spoiled, pa.string()))
        pq.write_table(table, path)


@pytest.fixture(scope="module")
def hostile(run_folder, tmp_path_factory):
    """A run folder of hostile texts, with its report, and the spoiler."""
    folder = copied(run_folder, tmp_path_factory.mktemp('it\'s <b>"here"') / NAME)
    spoiler = Spoiler()
    rules = folder.with_name(f"{NAME}.whatif.json")
    for path in (folder / "results.json", folder / "manifest.json", rules):
        spoiled = spoiler.document(json.loads(path.read_text("utf-8")))
        path.write_text(json.dumps(spoiled), "utf-8")
    for path in (*folder.glob("*.parquet"), *(folder / "rollouts").glob("*.parquet")):
        spoiler.table(path)
    config = tomlkit.parse((folder / "config.toml").read_text("utf-8"))
    config["policy"]["checkpoint"] = PAYLOADS["issue"]
    config["prompts"]["source"] = PAYLOADS["right to left"]
    config["prompts"]["prompt_column"] = PAYLOADS["end of a JSON block"]
    (folder / "config.toml").write_text(tomlkit.dumps(config), "utf-8")
    log = "\n".join(text.replace("\r", "") for text in PAYLOADS.values())
    (folder / "run.log").write_text(log, "utf-8")
    write_report(folder)
    return folder, spoiler


def test_there_are_more_than_forty_payloads():
    assert len(set(PAYLOADS.values())) > 41
    assert "</script><img src=x onerror=alert(1)>" in PAYLOADS.values()


def test_hostile_texts_are_inert(hostile, open_page):
    folder, spoiler = hostile
    assert spoiler.used == set(PAYLOADS.values())
    seen = open_page(folder / "report.html", width=390)
    page = seen.page
    page.locator("details").evaluate_all("all => all.forEach(e => e.open = true)")
    for fraction in (0.2, 0.4, 0.6, 0.8, 1.0):
        page.evaluate(f"scrollTo(0, {fraction} * document.documentElement.scrollHeight)")
        page.wait_for_timeout(50)
    assert page.evaluate("typeof window.ran") == "undefined"
    assert seen.faults() == {}
    strange = "iframe, object, embed, video, base, link, form, img, textarea, math, template, animate"
    assert page.locator(strange).count() == 0
    assert page.locator("script:not([type])").count() <= 1
    attributes = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    )
    assert not {a for a in attributes if a.startswith("on") or a in {"style", "src", "action"}}
    links = page.locator("a").evaluate_all("all => all.map(e => e.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_hostile_texts_are_read_as_text(hostile, open_page):
    folder, _ = hostile
    page = open_page(folder / "report.html", scripts=False).page
    log = page.locator("pre[aria-label='run.log']").text_content()
    for name, text in PAYLOADS.items():
        assert visible(text.replace("\r", "")) in log, name
    config = page.locator("pre[aria-label='config.toml']").text_content()
    assert PAYLOADS["end of a JSON block"].replace('"', '\\"') in config
    assert page.locator("h1").text_content() == visible(NAME)
    assert page.title() == f"{visible(NAME)} – funcprobe"
    everything = _squeezed(page.locator("body").text_content())
    for name in ("issue", "svg onload", "template syntax", "end of a style", "right to left", "ANSI"):
        assert everything.count(_squeezed(visible(PAYLOADS[name]))) > 1, name


def test_the_file_holds_no_hostile_character(hostile):
    """Of those that change what a reader of the source, or a terminal, sees."""
    html = (hostile[0] / "report.html").read_text("utf-8")
    assert re.findall("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ufeff]", html) == []
    assert f"<script>{RAN}" not in html
    assert f"src={ELSEWHERE}" not in html.replace("&lt;img src=" + ELSEWHERE, "").replace(
        "&lt;script src=" + ELSEWHERE, ""
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, <b> and ünïcödé", "plain text, <b> and ünïcödé"),
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc", "a\nb␍c"),
        ("\x1b[31m\x00\x7f", "␛[31m␀␡"),
        ("a\u202eb\u2066c", "a⟨U+202E⟩b⟨U+2066⟩c"),
        ("\ufeff\u200b\u00ad\u2028", "⟨U+FEFF⟩⟨U+200B⟩⟨U+00AD⟩⟨U+2028⟩"),
        ("\udc80", "⟨U+DC80⟩"),
        *((kept, kept) for kept in (PAYLOADS["Arabic and Hebrew"], PAYLOADS["emoji"])),
    ],
)
def test_what_is_not_seen_is_made_visible(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_block_of_data_ends_where_it_ends(name, open_page, tmp_path):
    """Read back as the browser's script reads it."""
    if name not in {"issue", "end of a JSON block", "comment in a script", "line separators", "NUL"}:
        block = data_block("d", PAYLOADS[name])
        assert block.count("</") == 1
        return
    page = tmp_path / "block.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8>{data_block('d', PAYLOADS[name])}", "utf-8")
    seen = open_page(page)
    found = seen.page.evaluate("JSON.parse(document.getElementById('d').textContent)")
    assert found == PAYLOADS[name]


def _squeezed(text):
    return re.sub(r"\s+", "", text)
