"""The responses in a browser: focus, pointer, keys, order, filters, search; hostile texts."""

import re

import pytest
from markupsafe import Markup

from funcprobe.adapters.report.document import asset, document
from funcprobe.adapters.report.page import report_html
from funcprobe.adapters.report.responses import responses, view
from funcprobe.adapters.report.theme import css_variables
from funcprobe.adapters.results.saved import load_run
from support.browser import axe
from support.saved_runs import enlarged
from support.spoken import Said, speaking, tokens_of

PAYLOADS = (
    "</script><img src=x onerror=alert(1)>",
    "<svg/onload=alert(2)>",
    "--><script>alert(3)</script>",
    "\u202ealert(4)\u2066",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(5)",
    "]]><!--",
    "&lt;b&gt;&#x3C;",
    "' onfocus=alert(6) autofocus '",
    "\x00\x08\x1b[2J",
    "\u2028\u2029\\u003c",
)
SAID = [
    Said(["The", "😀", " cat", "", "", "", "😀", " sat", ".", "\n", "\n", "<eos>"], special=[11]),
    Said([*PAYLOADS, " end"], prompt="".join(PAYLOADS), prompt_index=1),
    Said(["İ", "stanbul", " CAT", " ok"] * 40, prompt="Where? " * 30, prompt_index=2),
    *(Said([" dog", " ", " number", f" {i}"] * 3, (), "Where? " * 30, 2) for i in range(25)),
]


@pytest.fixture(scope="module")
def spoken(run_folder, tmp_path_factory):
    return load_run(speaking(run_folder, tmp_path_factory.mktemp("spoken") / "spoken", SAID))


@pytest.fixture(scope="module")
def page_file(spoken, tmp_path_factory):
    made = responses(spoken)
    body = Markup("<main><h1>Responses</h1>{}</main>").format(made.html)
    path = tmp_path_factory.mktemp("page") / "page.html"
    html = document(
        "t", body, styles=css_variables() + asset("page.css") + made.styles, script=made.script
    )
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture
def page(open_page, page_file):
    return open_page(page_file).page


def _line(page, identity):
    if page.locator(f".rest #{identity}").count():
        page.locator(".rest").evaluate_all("all => all.forEach(one => { one.open = true })")
    return page.locator(f"#{identity} .tokens")


def _value(text):
    return float(text.split()[0].replace("\N{MINUS SIGN}", "-"))


def _expect(row, name, eta):
    value = row[name] * (eta if name in ("share", "marginal", "direct", "score", "control") else 1)
    return float(f"{value:.2e}")


NAMES = {
    "U": {"share", "marginal", "logp", "entropy", "coef_logp"},
    "E": {"share", "direct", "score", "control", "logp", "entropy"},
}


@pytest.mark.parametrize("batch", ["U", "E"])
def test_focus_and_arrows_show_each_token_with_its_numbers(page, spoken, batch):
    line = _line(page, f"{batch}-0")
    rows = tokens_of(spoken.folder, batch, 0)
    eta = spoken.results.next_lr.value
    line.focus()
    for i, row in enumerate(rows):
        shown, text = _at(page, i + 1, len(rows))
        for name in NAMES[batch]:
            assert _value(shown[view.LABELS[name]]) == _expect(row, name, eta), (i, name)
        if batch == "U":
            assert _value(shown["advantage"]) == float(f"{row['advantage']:.2e}")
        assert f"learning rate {view.plain(eta)}" in text
        active = page.locator(f"#{line.get_attribute('aria-activedescendant')}")
        assert active.evaluate("one => one.textContent") == row["text"]
        assert active.get_attribute("role") == "option"
        assert shown["share"] in active.get_attribute("aria-label")
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    assert _at(page, 1, len(rows))
    page.keyboard.press("End")
    assert _at(page, len(rows), len(rows))
    page.keyboard.press("ArrowLeft")
    assert _at(page, len(rows) - 1, len(rows))
    page.keyboard.press("Escape")
    assert page.locator(".token-numbers").is_hidden()


def _at(page, place, of):
    panel = page.locator(".token-numbers")
    panel.get_by_text(f"token {place} of {of}", exact=False).wait_for()
    labels, values = (panel.locator(tag).all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(labels, values, strict=True)), panel.inner_text()


def test_arrows_up_and_down_go_by_lines_of_text(page):
    line = _line(page, "U-2")
    line.evaluate("one => one.scrollIntoView({ block: 'center' })")
    line.focus()
    _at(page, 1, 160)
    page.keyboard.press("ArrowRight")
    _at(page, 2, 160)
    place = "document.querySelector('.t.active').getBoundingClientRect()"
    before = page.evaluate(place)
    page.keyboard.press("ArrowDown")
    page.wait_for_function(f"{place}.top > {before['top']} + 5")
    below = page.evaluate(place)
    assert abs(below["left"] - before["left"]) < 40
    assert below["top"] - before["top"] < 1.6 * before["height"]
    page.keyboard.press("ArrowUp")
    page.wait_for_function(f"{place}.top < {below['top']} - 5")
    _at(page, 2, 160)


def test_the_pointer_shows_the_token_under_it_and_leaves_the_text_as_it_was(page, spoken):
    line = _line(page, "U-0")
    line.scroll_into_view_if_needed()
    before = line.inner_html()
    text = line.evaluate("one => one.textContent")
    line.hover(position={"x": 5, "y": 10})
    shown, _ = _at(page, 1, 12)
    (first, *_) = tokens_of(spoken.folder, "U", 0)
    assert _value(shown["share"]) == _expect(first, "share", spoken.results.next_lr.value)
    assert line.evaluate("one => one.textContent") == text
    tokens = line.locator(".t").evaluate_all("all => all.map(one => one.textContent)")
    assert tokens == SAID[0].tokens
    line.locator(".t", has_text="sat").hover()
    _at(page, 8, 12)
    page.locator("h1").hover()
    page.locator(".token-numbers").wait_for(state="hidden")
    assert line.inner_html() == before


def test_a_token_keeps_the_colour_of_its_run(page, spoken):
    line = _line(page, "E-2")
    runs = "one => [...one.childNodes].map(each => [each.nodeName, each.textContent])"
    merged = [[name, text] for name, text in line.evaluate(runs)]
    line.focus()
    _at(page, 1, 160)
    levels = line.locator(".t").evaluate_all("all => all.map(t => t.parentNode.nodeName)")
    assert len(levels) == 160
    expected = [name for name, text in merged for _ in re.findall("İ|stanbul| CAT| ok", text)]
    assert [x.replace("P", "#text") for x in levels] == expected
    assert len(set(levels)) > 2


def test_a_character_of_four_tokens_is_shown_once(page):
    line = _line(page, "U-0")
    assert line.evaluate("one => one.textContent").count("😀") == 2
    line.focus()
    _at(page, 1, 12)
    for place in (4, 5, 6):
        piece = line.locator(".t").nth(place - 1)
        assert piece.evaluate("one => one.textContent") == ""
        assert piece.bounding_box()["width"] > 3
    line.locator(".t").nth(3).hover()
    _, text = _at(page, 4, 12)
    assert "a piece of a character" in text


def _control(page, batch, name):
    return page.locator(f"#responses-{batch} [data-control={name}]")


def _seen(page, batch):
    """Ids in the order of the page, and what the status says."""
    page.wait_for_timeout(250)
    ids = page.locator(f"#responses-{batch} article:not([hidden])").evaluate_all(
        "all => all.map(one => one.id)"
    )
    return ids, page.locator(f"#responses-{batch} .status").inner_text()


def _ids(spoken, key, batch="U", reverse=False):
    rows = [row for row in spoken.table("sequences").to_pylist() if row["batch"] == batch]
    return [f"{batch}-{row['sequence']}" for row in sorted(rows, key=key, reverse=reverse)]


def test_the_order_is_the_one_asked_for(page, spoken):
    assert _seen(page, "U")[0] == _ids(spoken, lambda row: -abs(row["share"]))
    for order, key in {
        "falls": lambda row: row["share"],
        "rises": lambda row: -row["share"],
        "file": lambda row: row["sequence"],
        "size": lambda row: -abs(row["share"]),
    }.items():
        _control(page, "U", "order").select_option(order)
        ids, said = _seen(page, "U")
        assert ids == _ids(spoken, key)
        assert said == "28 of 28 responses"
    assert page.locator("#responses-U .first article").count() == 20
    assert page.locator("#responses-U .rest summary").first.inner_text().startswith("The other 8 ")
    _control(page, "U", "order").select_option("longest")
    assert _seen(page, "U")[0][0] == "U-2"


def test_filters_leave_what_they_say(page, spoken):
    rows = [row for row in spoken.table("sequences").to_pylist() if row["batch"] == "U"]
    _control(page, "U", "prompt").select_option("1")
    ids, said = _seen(page, "U")
    assert ids == ["U-1"]
    assert said == "1 of 28 responses"
    assert page.locator("#responses-U .rest").is_hidden()
    _control(page, "U", "prompt").select_option("")
    for value, holds in {"1": lambda a: a > 0, "-1": lambda a: a < 0, "0": lambda a: a == 0}.items():
        _control(page, "U", "sign").select_option(value)
        ids, said = _seen(page, "U")
        expected = {f"U-{row['sequence']}" for row in rows if holds(row["advantage"])}
        assert set(ids) == expected
        assert said == f"{len(expected)} of 28 responses"
    assert len({row["advantage"] > 0 for row in rows}) == 2
    assert _seen(page, "E")[0] == _ids(spoken, lambda row: -abs(row["share"]), "E")


def test_search_is_literal_whatever_the_case_and_marks_what_it_finds(page):
    box = _control(page, "U", "search")
    box.fill("cat")
    ids, said = _seen(page, "U")
    assert set(ids) == {"U-0", "U-2"}
    assert said == "2 of 28 responses"
    # U-2 has letters whose lower case is longer: it is found, but nothing in it marked.
    assert _marked(page) == ["cat"]
    _line(page, "U-0").focus()
    _at(page, 1, 12)
    assert _marked(page) == ["cat"]
    for sought, found in {
        "<img src=x": ["U-1"],
        ".*": [],
        "{{ 7*7 }}": ["U-1"],
        "😀": ["U-0"],
        "dog  number": [f"U-{i}" for i in range(3, 28)],
    }.items():
        box.fill(sought)
        ids, said = _seen(page, "U")
        assert set(ids) == set(found), sought
        assert said == f"{len(found)} of 28 responses"
    assert _marked(page) == ["dog  number"] * 75
    box.fill("")
    assert len(_seen(page, "U")[0]) == 28
    assert _marked(page) == []


def _marked(page):
    return page.evaluate("[...CSS.highlights.get('found')].map(range => range.toString())")


def test_without_scripts_every_text_and_colour_is_there(open_page, page_file, spoken):
    page = open_page(page_file, scripts=False).page
    assert page.locator("article").count() == 2 * len(SAID)
    for i in (0, 2):
        assert page.locator(f"#U-{i} .tokens").text_content() == "".join(SAID[i].tokens)
    assert page.locator("article f-10, article r-10").count() > 0
    assert page.locator(".controls").first.is_hidden()
    assert page.locator(".token-numbers").is_hidden()
    page.locator("#responses-E .rest > summary").click()
    rest = page.locator("#responses-E .rest article")
    assert rest.count() == 8
    assert rest.first.is_visible()


def test_payloads_are_seen_and_do_nothing(page):
    line = _line(page, "U-1")
    line.focus()
    _at(page, 1, 12)
    text = line.text_content()
    for part in (
        PAYLOADS[0],
        PAYLOADS[1],
        "alert(3)",
        "{{ 7*7 }}",
        "&lt;b&gt;",
        "U+202E",
        "␀",
        "U+2028",
    ):
        assert part in text
    for _ in PAYLOADS:
        page.keyboard.press("ArrowRight")
    _at(page, 12, 12)
    assert page.locator("main img, main svg, [onload], [onfocus], main script:not([type])").count() == 0
    page.locator("#U-1 .prompt summary").click()
    assert PAYLOADS[0] in page.locator("#U-1 .prompt").text_content()
    options = _control(page, "U", "prompt").locator("option").all_text_contents()
    assert any("<img" in one for one in options)


def test_a_prompt_that_stands_elsewhere_is_fetched_when_opened(page):
    link = page.locator("#responses-E .first .prompt:has(a)").first
    identity = link.evaluate("one => one.closest('article').id")
    details = page.locator(f"#{identity} .prompt")
    details.locator("summary").click()
    details.locator("a").wait_for(state="detached")
    assert details.locator(".text").text_content() == "Where? " * 30


def test_axe_finds_nothing_wrong(open_page, page_file):
    for dark in (False, True):
        page = open_page(page_file, dark=dark).page
        page.locator("#responses-U .rest").evaluate("one => { one.open = true }")
        _line(page, "U-0").focus()
        _at(page, 1, 12)
        assert axe(page) == []


def test_a_narrow_page_is_no_wider_than_its_window(open_page, page_file):
    page = open_page(page_file, width=390).page
    _line(page, "E-1").focus()
    _at(page, 1, 12)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator(".token-numbers").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 900


def test_the_report_has_them(open_page, saved_run, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_html(saved_run), encoding="utf-8")
    page = open_page(path).page
    line = page.locator("#responses-U article .tokens").first
    line.focus()
    identity = page.locator("#responses-U article").first.get_attribute("id")
    rows = tokens_of(saved_run.folder, "U", int(identity.split("-")[1]))
    shown, _ = _at(page, 1, len(rows))
    assert _value(shown["share"]) == _expect(rows[0], "share", saved_run.results.next_lr.value)


def test_a_link_beyond_long_responses_leads_to_its_section(open_page, run_folder, tmp_path):
    folder = enlarged(run_folder, tmp_path / "long", prompts=8, responses=4, tokens=300)
    path = tmp_path / "report.html"
    path.write_text(report_html(load_run(folder)), encoding="utf-8")
    page = open_page(path).page
    top = "document.getElementById('rules').getBoundingClientRect().top"
    assert page.evaluate(top) > 3000
    page.get_by_role("link", name="Proxies and rules").first.click()
    page.wait_for_function(f"Math.abs({top}) < 40")
    page.wait_for_timeout(300)  # of frames in which what lies above might still grow
    assert abs(page.evaluate(top)) < 40


@pytest.mark.slow
def test_a_browser_that_cannot_inflate_says_so_and_filters_still(open_page, page_file):
    page = open_page(page_file).page
    page.context.add_init_script("delete window.DecompressionStream")
    page.reload()
    assert "too old" in page.locator("#responses-U .status").inner_text()
    _line(page, "U-0").hover()
    assert page.locator(".t").count() == 0
    _control(page, "U", "search").fill("cat")
    assert set(_seen(page, "U")[0]) == {"U-0", "U-2"}
