"""Figures as they are drawn: colours, ids, texts, files, for every reader."""

import re
import struct
import time
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import altair as alt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonschema import ValidationError

from funcprobe.adapters.report import render
from funcprobe.adapters.report.charts import CHARTS, figures
from funcprobe.adapters.report.figure import WIDTH, Figure
from funcprobe.adapters.report.render import inline_svg, write_figures
from funcprobe.adapters.report.theme import BY_NAME, COLOURS, DIVERGING, TEXT, css_variables
from funcprobe.adapters.results.saved import load_run
from support.figures import SIGHT, SVG, contrast, distance, texts
from support.payloads import PAYLOADS
from support.saved_runs import copied

PAINT = ("fill", "stroke", "stop-color")
NARROW = 358  # pixels of a figure on a telephone of 390


@pytest.fixture(scope="module")
def found(saved_run):
    return figures(saved_run)


@pytest.fixture(scope="module")
def svgs(found):
    return {name: inline_svg(figure) for name, figure in found.items()}


def everything(svg):
    return ET.fromstring(svg).iter()


@pytest.mark.slow
def test_every_figure_is_in_the_grammar(found):
    """The schema of Vega-Lite, as Altair has it; charts are made without that check."""
    assert len(found) == len(CHARTS) - 1  # momentum is not recorded
    for figure in found.values():
        few = {name: rows[:2] for name, rows in figure.chart["datasets"].items()}
        alt.Chart.from_dict({**figure.chart, "datasets": few})
    with pytest.raises(ValidationError):
        alt.Chart.from_dict({**found["parts"].chart, "unknown": 1})


def test_every_colour_is_of_the_page(found, svgs):
    """None is left that the renderer chose, or mixed, by itself."""
    variables = {f"var(--{colour.name})" for colour in COLOURS}
    defined = set(re.findall(r"(--[\w-]+): #[0-9a-f]{6};", css_variables()))
    assert {f"var({name})" for name in defined} == variables
    for name, svg in svgs.items():
        used = set()
        for element in everything(svg):
            assert "style" not in element.attrib
            used |= {element.get(key) for key in PAINT if key in element.attrib}
        assert {"var(--ink)", "var(--page)"} <= used, name
        assert used <= {*variables, "none", "transparent"}, name
        assert not re.search(r"#[0-9a-fA-F]{3}|rgb|hsl", re.sub(r">[^<]*<", "><", svg)), name


def test_text_has_a_colour_and_a_size_that_a_telephone_shows(svgs):
    """13 px at a width of 460, so 10 at 358."""
    for name, svg in svgs.items():
        width = float(ET.fromstring(svg).get("width"))
        assert width <= WIDTH, name
        assert TEXT * NARROW / WIDTH >= 10
        written = [e for e in everything(svg) if e.tag == f"{SVG}text" and "".join(e.itertext())]
        assert len(written) > 3
        for element in written:
            assert element.get("font-size") == f"{TEXT}px", name
            assert element.get("fill") in {f"var(--{c})" for c in ("ink", "page")}, name


def test_nothing_is_outside_of_the_chart(svgs):
    """Texts that end left of it or above it, as far as their anchors say."""
    for name, svg in svgs.items():
        root = ET.fromstring(svg)
        width, height = (float(root.get(key)) for key in ("width", "height"))
        assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
        for x, y, element in placed(root, 0.0, 0.0):
            if element.tag == f"{SVG}text" and "".join(element.itertext()):
                assert -1 <= x <= width + 1, (name, "".join(element.itertext()))
                assert 0 <= y <= height + 1, (name, "".join(element.itertext()))


def placed(element, x, y):
    """Every element with its origin, by the translations above it."""
    if move := re.search(r"translate\(([-\d.e]+),([-\d.e]+)\)", element.get("transform", "")):
        x, y = x + float(move[1]), y + float(move[2])
    yield x, y, element
    for child in element:
        yield from placed(child, x, y)


def test_no_id_stands_twice_in_a_page_and_references_lead_somewhere(svgs):
    elements = [e for svg in svgs.values() for e in everything(svg)]
    ids = [e.get("id") for e in elements if "id" in e.attrib]
    assert len(set(ids)) == len(ids) >= 2 * len(svgs)
    values = " ".join(value for e in elements for value in e.attrib.values())
    assert set(re.findall(r"url\(#([^)]+)\)", values)) <= set(ids)
    assert "clip-path" in {key for e in elements for key in e.attrib}  # else nothing was tested


def test_a_reader_hears_one_image_with_a_title_and_the_numbers(found, svgs):
    for name, svg in svgs.items():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        named = {e.get("id"): e.text for e in root if e.tag in (f"{SVG}title", f"{SVG}desc")}
        assert root.get("aria-labelledby").split() == list(named)
        assert list(named.values()) == [found[name].title, found[name].description]
        assert re.search(r"\d", found[name].description)
        inside = {key for e in root.iter() if e is not root for key in e.attrib}
        assert not {key for key in inside if key == "role" or key.startswith("aria-")}


def test_every_caption_says_what_n_is(found):
    for name, figure in found.items():
        assert re.search(
            r"\b\d+ (of|responses|prompts|tokens|tensors|rules|learning)", figure.caption
        ) or (name in ("observables",))
        if name not in ("modules", "concentration", "proxies", "lengths", "rewards", "prompts"):
            assert "95 % interval" in figure.caption
        assert name == "sweep" or not re.search(r"\de[-+]?\d\d", figure.caption), name


def test_labels_are_without_powers_of_ten_but_learning_rates(svgs):
    for name, svg in svgs.items():
        for text in texts(svg):
            if re.fullmatch(r"[−-]?[\d.]+e[−-]?\d+", text):
                assert name == "sweep", text
                assert re.fullmatch(r"1e-\d", text)


# Files


def test_files_are_whole_and_alike_on_any_machine(found, tmp_path):
    write_figures(found.values(), tmp_path)
    expected = {f"{name}.{kind}" for name in found for kind in ("svg", "png", "txt")}
    assert {path.name for path in tmp_path.iterdir()} == expected
    light = {colour.light for colour in COLOURS} | {"none", "transparent"}
    for name, figure in found.items():
        svg = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert 'xmlns="http://www.w3.org/2000/svg"' in svg
        used = {e.get(key) for e in everything(svg) for key in PAINT if key in e.attrib}
        assert used <= light
        families = {e.get("font-family") for e in everything(svg)} - {None}
        assert all(family.startswith("'Liberation Sans'") for family in families)
        png = (tmp_path / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        width, height = (float(ET.fromstring(svg).get(key)) for key in ("width", "height"))
        assert struct.unpack(">II", png[16:24]) == pytest.approx((2 * width, 2 * height), abs=2)
        assert len(png) > 4000  # an empty one of this size has some hundred bytes
        behind = next(e for e in everything(svg) if e.tag == f"{SVG}rect")
        assert (float(behind.get("width")), float(behind.get("height"))) == (width, height)
        assert behind.get("fill") == "#ffffff"
        caption = (tmp_path / f"{name}.txt").read_text(encoding="utf-8")
        assert caption == f"{figure.title}\n\n{figure.caption}\n"


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(run_folder, svgs):
    render._svg.cache_clear()
    again = figures(load_run(run_folder))
    assert {name: inline_svg(figure) for name, figure in again.items()} == svgs


@pytest.mark.slow
def test_a_large_run_is_drawn_in_time_and_small(large_run, tmp_path):
    """Under 3 s on a quiet machine, of the processor's time, as others may run beside."""
    start = time.process_time()
    found = figures(large_run)
    sizes = {name: len(inline_svg(figure)) for name, figure in found.items()}
    write_figures(found.values(), tmp_path)
    assert time.process_time() - start < 6
    assert max(sizes.values()) < 200_000
    assert sum(sizes.values()) < 600_000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.png")) < 2_000_000


# Texts of others

TEXTS = (*PAYLOADS.values(), "\U0001d54f" * 5000, "".join(map(chr, range(160))), "\ud800x\udfff")


@pytest.fixture(scope="module")
def hostile(run_folder, tmp_path_factory):
    """Payloads as prompts, modules, rules, observables and units."""
    folder = copied(run_folder, tmp_path_factory.mktemp("hostile") / "one")

    def spoiled(name, column, number):
        values = [TEXTS[i % (len(TEXTS) - 1)] for i in range(number)]  # Parquet has no lone surrogate
        path = folder / f"{name}.parquet"
        table = pq.read_table(path)
        at = table.column_names.index(column)
        pq.write_table(table.set_column(at, table.field(at), pa.array(values)), path)

    run = load_run(folder)
    for name, column in (("sequences", "prompt"), ("modules", "projection"), ("modules", "layer")):
        spoiled(name, column, len(run.table(name)))
    results, whatif = run.results, run.whatif
    section = results.attribution

    def named(things, key, start):
        return tuple(
            one.model_copy(update={key: TEXTS[(start + i) % len(TEXTS)]})
            for i, one in enumerate(things)
        )

    observables = named(results.observables * 4, "name", 0)
    attribution = section.model_copy(
        update={"U_prompts": (), "E_prompts": named(section.E_prompts, "text", 20)}
    )
    points = whatif.frontier.points * 6
    frontier = whatif.frontier.model_copy(update={"points": named(points, "rule", 40)})
    return run._replace(
        results=results.model_copy(update={"observables": observables, "attribution": attribution}),
        whatif=whatif.model_copy(update={"frontier": frontier}),
    )


def test_texts_of_others_become_no_elements(hostile, svgs, tmp_path):
    found = figures(hostile)
    kinds = {e.tag for svg in svgs.values() for e in everything(svg)}
    names = {key for svg in svgs.values() for e in everything(svg) for key in e.attrib}
    write_figures(found.values(), tmp_path)
    seen = set()
    for name, figure in found.items():
        for svg in (inline_svg(figure), (tmp_path / f"{name}.svg").read_text(encoding="utf-8")):
            for element in everything(svg):
                assert element.tag in kinds | {f"{SVG}tspan"}
                assert element.attrib.keys() <= names
            seen |= {text for text in TEXTS if any(text[:12] in t for t in texts(svg))}
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f\x9b\u202a-\u202e\u2066-\u2069]", svg)
    assert PAYLOADS["issue"] in seen  # else nothing was tested
    assert len(seen) > 20


def test_text_that_is_no_xml_is_replaced():
    figure = Figure("odd", "a\x00b", "c", "d\ufffe]]>", {"data": {"values": [{"x": "e\x01<f>"}]}})
    figure.chart.update(mark="text", encoding={"text": {"field": "x", "type": "nominal"}})
    root = ET.fromstring(inline_svg(figure))
    assert [e.text for e in root][:2] == ["a\ufffdb", "d\ufffd]]>"]
    assert texts(inline_svg(figure)) == ["e\ufffd<f>"]


# Colours

MODES = ("light", "dark")


@pytest.mark.parametrize("mode", MODES)
def test_texts_and_marks_stand_out(mode):
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    of = {colour.name: getattr(colour, mode) for colour in COLOURS}
    for behind in ("page", "band", "rule"):
        assert contrast(of["ink"], of[behind]) >= 4.5
    for mark in ("muted", "predicted", "measured", "other", "fourth", "falls", "rises"):
        assert contrast(of[mark], of["page"]) >= 3
        assert contrast(of[mark], of["band"]) >= 3
    for side in ("falls", "rises"):
        assert contrast(of["ink"], of[f"{side}-2"]) >= 4.5  # intervals on bars
        for step in range(1, 6):  # signs in the map of modules
            assert contrast(of["page" if step > 3 else "ink"], of[f"{side}-{step}"]) >= 3


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("mode", MODES)
def test_colours_differ_for_every_sight(mode, sight):
    """By five just noticeable differences; lines have dashes and points shapes beside them."""
    of = {colour.placeholder: getattr(colour, mode) for colour in COLOURS}
    lines = [of[BY_NAME[name]] for name in ("predicted", "measured", "other", "fourth")]
    assert min(distance(a, b, sight) for a, b in combinations(lines, 2)) > 11.5
    steps = [of[placeholder] for placeholder in DIVERGING]
    assert min(distance(a, b, sight) for a, b in pairwise(steps)) > 10
    for k in range(len(steps) // 2):
        assert distance(steps[k], steps[-1 - k], sight) > 15


def test_placeholders_are_told_apart():
    assert len({colour.placeholder for colour in COLOURS}) == len(COLOURS)
    assert len({colour.name for colour in COLOURS}) == len(COLOURS)
