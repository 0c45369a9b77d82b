"""report.html on paper: no figure is cut, and what is folded on the screen is there."""

import io
import re
import unicodedata

import pytest
from pypdf import PdfReader

from funcprobe.adapters.report import write_report
from funcprobe.adapters.report.charts import figures
from funcprobe.adapters.report.typeset import typeset
from funcprobe.adapters.results.saved import load_run
from support.saved_runs import copied

PAGE = 297 - 2 * 15  # mm, the height of A4 within its margins
MM = 96 / 25.4  # pixels


@pytest.fixture(scope="module")
def printed(run_folder, tmp_path_factory, chromium):
    """The file, and its PDF's pages as text."""
    file = write_report(copied(run_folder, tmp_path_factory.mktemp("print") / "one"))
    page = chromium.new_page(color_scheme="dark")
    page.goto(file.as_uri())
    pdf = page.pdf(format="A4", print_background=True, prefer_css_page_size=True)
    page.close()
    return file, [_plain(leaf.extract_text()) for leaf in PdfReader(io.BytesIO(pdf)).pages]


def test_no_figure_is_cut(printed, run_folder):
    """Its title, which is above the chart, and its caption's end, below, are on one page."""
    drawn = figures(load_run(run_folder))
    assert len(drawn) > 5
    for figure in drawn.values():
        end = _plain(typeset(figure.caption).striptags())[-60:]
        pages = [text for text in printed[1] if _plain(figure.title) in text and end in text]
        assert pages, figure.name


def test_charts_fit_the_paper(printed, open_page):
    """In the width of the paper every chart is whole: no wider, and lower than a page."""
    page = open_page(printed[0], width=680, media="print").page
    for box in page.locator("figure.chart").evaluate_all(
        "all => all.map(e => [e.querySelector('svg').getBoundingClientRect().right,"
        " e.getBoundingClientRect().height, getComputedStyle(e).breakInside])"
    ):
        right, height, rule = box
        assert right <= 680
        assert height < PAGE * MM
        assert rule == "avoid"
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    scrolling = "all => all.filter(e => getComputedStyle(e).overflowX !== 'visible').length"
    assert page.locator(".scroll, pre").evaluate_all(scrolling) == 0


def test_what_is_folded_is_printed(printed):
    whole = " ".join(printed[1])
    assert _plain("max_new_tokens =") in whole  # of config.toml
    assert _plain("Packages that the numbers depend on") in whole
    assert _plain("What each rule does, and the paper that it is from") in whole
    assert _plain("Skip to the headline") not in whole


def test_paper_is_white(printed, open_page):
    page = open_page(printed[0], dark=True, media="print").page
    colours = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert colours[0] == "rgb(255, 255, 255)"
    assert max(map(int, re.findall(r"\d+", colours[1]))) < 64


def _plain(text):
    """Without white space and ligatures."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))
