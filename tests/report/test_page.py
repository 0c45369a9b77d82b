"""report.html in Chromium: silent, under its content policy, whole; its numbers are the run's."""

import itertools
import json
import re

import pytest

from funcprobe.adapters.report import write_report
from funcprobe.adapters.report.numbers import MINUS
from funcprobe.adapters.report.page import report_html
from funcprobe.adapters.results.saved import load_run
from support.browser import axe
from support.saved_runs import copied

SECTIONS = ["headline", "curve", "causes", "responses", "rules", "trust"]


@pytest.fixture(scope="module")
def page_file(run_folder, tmp_path_factory):
    return write_report(copied(run_folder, tmp_path_factory.mktemp("page") / "one"))


def test_the_page_is_silent_and_asks_for_nothing(page_file, open_page):
    seen = open_page(page_file)
    seen.page.mouse.wheel(0, 20000)
    assert seen.faults() == {}
    assert seen.page.title().startswith("one")
    assert seen.page.locator("main > section").evaluate_all("s => s.map(x => x.id)") == SECTIONS


def test_nothing_but_its_own_script_and_style_is_obeyed(page_file, open_page, tmp_path):
    """By injecting what a text might smuggle in: each would leave its mark without the policy."""
    injected = """<script>window.x = 1</script><img src="x" onerror="window.x = 2" alt="">
        <p id="styled" style="color: rgb(1, 2, 3)">a</p><style>#styled { color: rgb(4, 5, 6) }</style>
        <img src="https://example.invalid/a.png" alt=""><base href="https://example.invalid/">"""
    html = page_file.read_text("utf-8").replace("<main>", f"<main>{injected}", 1)
    assert "window.x = 1" in html
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(html, encoding="utf-8")
    seen = open_page(spoiled, clean=False)
    assert seen.page.evaluate("typeof window.x") == "undefined"
    colour = seen.page.locator("#styled").evaluate("e => getComputedStyle(e).color")
    assert colour not in {"rgb(1, 2, 3)", "rgb(4, 5, 6)"}
    blocked = " ".join(seen.violations())
    for directive in ("script-src-elem", "script-src-attr", "style-src-attr", "style-src-elem"):
        assert directive in blocked
    assert blocked.count("img-src") == 2
    assert "base-uri" in blocked
    assert seen.page.evaluate("document.baseURI").startswith("file:")

    free = tmp_path / "free.html"
    free.write_text(re.sub(r"<meta http-equiv=.*?>", "", html), encoding="utf-8")
    seen = open_page(free, clean=False)
    assert seen.page.evaluate("typeof window.x") == "number"  # else the test above would prove nothing


def test_a_script_cannot_make_html_of_text(page_file, open_page):
    seen = open_page(page_file, clean=False)
    made = "try { document.body.innerHTML = '<b>x</b>'; 'made' } catch { 'refused' }"
    assert seen.page.evaluate(made) == "refused"


def test_every_figure_is_drawn(page_file, open_page, saved_run):
    from funcprobe.adapters.report.charts import figures

    seen = open_page(page_file)
    drawn = figures(saved_run)
    assert drawn
    for name, figure in drawn.items():
        place = seen.page.locator(f"figure#{name}")
        svg = place.locator("svg")
        box = svg.bounding_box()
        assert box["width"] > 200, name
        assert box["height"] > 100, name
        marks = svg.locator("path, rect, line, circle").evaluate_all(
            "all => all.map(e => e.getBBox()).filter(b => b.width > 0 || b.height > 0).length"
        )
        assert marks > 5, name
        assert place.locator("figcaption").inner_text().startswith(figure.caption[:40])


def test_the_headline_is_the_verdict(page_file, open_page, saved_run):
    from funcprobe.adapters.results.verdict import beside_the_change, verdict_line

    results = saved_run.results
    verdict = results.verdict
    headline = open_page(page_file).page.locator("#headline")
    beside = beside_the_change(verdict)
    assert beside
    assert verdict_line(results).endswith(beside)
    shown = headline.locator(".verdict").inner_text()
    assert shown[1:].replace(MINUS, "-") == f"{beside[1:]}."
    shown = _values(headline.locator(".statement"))
    assert shown == [abs(verdict.relative), verdict.low, verdict.high]
    rows = headline.locator("table").first.locator("tbody tr")
    assert rows.count() == 1 + len(verdict.observables)
    for i, effect in enumerate((verdict.entropy, *verdict.observables)):
        at, half_at, change, half, *measured = _values(rows.nth(i))
        assert (at, change) == (effect.at_theta, effect.change)
        assert half == pytest.approx((effect.high - effect.low) / 2, rel=1e-12)
        assert half_at > 0
        assert measured
    next_row = next(row for row in results.sweep if row.is_next_lr)
    assert next_row.measured.value in _values(rows.nth(0))
    assert f"{sum(c.passed for c in results.checks)} of {len(results.checks)}" in headline.inner_text()


def test_the_sweep_is_that_of_the_results(page_file, open_page, saved_run):
    sweep = open_page(page_file).page.locator("#curve table").first
    rows = saved_run.results.sweep
    assert sweep.locator("tbody tr").count() == len(rows)
    for i, row in enumerate(rows):
        found = _values(sweep.locator("tbody tr").nth(i))
        expected = [row.eta, row.predicted.value, row.interval_total.half_width]
        expected += [row.second_order.value, row.measured.value]
        assert found[:5] == expected
        assert row.ess.value in found
        assert row.ratio.value in found
    marked = sweep.locator("tr.marked")
    assert marked.count() == 1
    assert _values(marked)[0] == saved_run.results.next_lr.value


def test_every_number_shown_is_the_value_beside_it(page_file, open_page):
    """<data value>: the digits shown, with their power of ten, are that value, rounded."""
    seen = open_page(page_file)
    pairs = seen.page.locator("data").evaluate_all(
        """all => all.map(e => {
            const outside = e.closest('.amount')?.querySelector(':scope > sup');
            return [e.value, e.textContent, e.querySelector('sup')?.textContent,
                    outside?.textContent] })"""
    )
    assert len(pairs) > 150
    for value, text, own, shared in pairs:
        digits = text.replace("−", "-").replace("\u202f", "").replace("\u00a0", " ")
        if digits == "under 0.01 %":
            assert abs(float(value)) < 1e-4
            continue
        digits = digits.split(" ×")[0]
        scale = 10.0 ** int((own or shared or "0").replace("−", "-"))
        if digits.endswith(" %"):
            digits, scale = digits.removesuffix(" %"), 0.01
        decimals = len(digits.partition(".")[2])
        assert float(digits) * scale == pytest.approx(
            float(value), abs=0.5001 * 10.0**-decimals * scale, rel=0.005
        ), text


def test_the_tables_hold_numbers_of_the_run(page_file, open_page, run_folder):
    """A value of a table is one of results.json or whatif.json, or that at the next learning rate."""
    known = {0.0}
    for path in (run_folder / "results.json", run_folder.with_name(f"{run_folder.name}.whatif.json")):
        known |= set(_numbers(json.loads(path.read_text("utf-8"))))
    eta = json.loads((run_folder / "results.json").read_text("utf-8"))["next_lr"]["value"]
    known |= {eta * value for value in known}
    page = open_page(page_file).page
    for place in ("#headline", "#curve", "#causes", "#rules"):
        values = [
            float(v)
            for v in page.locator(f"{place} td data, {place} th data").evaluate_all(
                "all => all.filter(e => !e.closest('.half') && !e.closest('.viewer')).map(e => e.value)"
            )
        ]
        assert len(values) > 5, place
        strange = [v for v in values if v not in known]
        assert not strange, (place, strange)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(page_file, open_page, dark):
    seen = open_page(page_file, dark=dark)
    seen.page.locator("details").evaluate_all("all => all.forEach(e => e.open = true)")
    assert axe(seen.page) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_width(page_file, open_page, width):
    seen = open_page(page_file, width=width)
    seen.page.locator("details").evaluate_all("all => all.forEach(e => e.open = true)")
    excess = seen.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert excess <= 0
    scrolls = seen.page.locator(".scroll").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert scrolls > 0 or width > 390
    for name in seen.page.locator(".scroll").evaluate_all(
        "all => all.map(e => e.tabIndex === 0 && e.getAttribute('role') === 'region' "
        "&& e.getAttribute('aria-label'))"
    ):
        assert name


def test_headings_are_in_order_and_links_lead_somewhere(page_file, open_page):
    page = open_page(page_file).page
    levels = page.locator("h1, h2, h3, h4, h5, h6").evaluate_all("all => all.map(e => +e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    targets = page.locator("a[href^='#']").evaluate_all(
        "all => all.map(e => !!document.getElementById(e.hash.slice(1)))"
    )
    assert len(targets) >= 7
    assert all(targets)
    assert page.locator("[id]").evaluate_all("all => all.length === new Set(all.map(e => e.id)).size")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator("a.skip").bounding_box()["y"] >= 0


def test_without_scripts_everything_is_there(page_file, open_page):
    with_scripts = open_page(page_file).page
    without = open_page(page_file, scripts=False).page
    for what in ("figure svg", "table", "details", "h2", "h3", "figcaption"):
        assert without.locator(what).count() >= 1
    assert (
        without.locator("figure.chart svg").count() == with_scripts.locator("figure.chart svg").count()
    )
    assert without.locator("table").count() >= with_scripts.locator("table").count()
    without.locator("summary", has_text="run.log").click()
    assert without.locator("pre[aria-label='run.log']").is_visible()


def test_what_a_run_lacks_is_said_with_how_to_get_it(run_folder, tmp_path, open_page):
    folder = copied(run_folder, tmp_path / "a folder")
    folder.with_name("a folder.whatif.json").unlink()
    for name in ("tokens", "sequences", "modules"):
        (folder / f"{name}.parquet").unlink()
    document = json.loads((folder / "results.json").read_text("utf-8"))
    document |= {"attribution": None, "influence": None, "momentum": None}
    (folder / "results.json").write_text(json.dumps(document), "utf-8")
    page = open_page(write_report(folder)).page
    config = f"'{folder}/config.toml'"
    assert f"funcprobe whatif {config}" in page.locator("#headline").inner_text()
    assert f"funcprobe whatif {config}" in page.locator("#rules").inner_text()
    assert (
        f"funcprobe run {config} --set attribution.level=tokens" in page.locator("#causes").inner_text()
    )
    assert "record_rollouts" in page.locator("#causes").inner_text()
    assert "kl_base" in page.locator("#headline").inner_text()
    for section in SECTIONS:
        assert len(page.locator(f"#{section}").inner_text()) > 60, section


def test_a_failed_check_comes_first(run_folder, tmp_path, open_page):
    folder = copied(run_folder, tmp_path / "one")
    document = json.loads((folder / "results.json").read_text("utf-8"))
    document["checks"][3] |= {"passed": False, "advisory": False}
    document["verdict"] = None  # as in a file of an earlier version: made of the other numbers
    (folder / "results.json").write_text(json.dumps(document), "utf-8")
    failed = document["checks"][3]
    page = open_page(write_report(folder)).page
    assert failed["name"] in page.locator("#headline .warning").inner_text()
    trust = page.locator("#trust")
    assert failed["failure_means"] in trust.locator(".warning").inner_text()
    first = trust.locator("table").first.locator("tbody tr").first
    assert failed["name"] in first.inner_text()
    assert "FAILED" in first.inner_text()


@pytest.mark.slow
def test_a_page_of_a_large_run_is_made_in_time(large_run):
    import time

    start = time.perf_counter()
    html = report_html(large_run)
    assert time.perf_counter() - start < 20  # 5 s on a machine that does nothing else
    assert len(html.encode()) < 8e6


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(run_folder):
    assert report_html(load_run(run_folder)) == report_html(load_run(run_folder))


def _values(place):
    return [float(v) for v in place.locator("data").evaluate_all("all => all.map(e => e.value)")]


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []
