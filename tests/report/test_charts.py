"""Every figure shows the numbers of the run, computed again in the simplest way."""

import math
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from funcprobe.adapters.report.charts import figures
from funcprobe.adapters.report.charts.batches import bars_of
from funcprobe.adapters.report.charts.concentration import drawn
from funcprobe.adapters.report.charts.frontier import placed
from funcprobe.adapters.report.charts.pieces import amounts, eta_text, number, padded, scaled
from funcprobe.adapters.results.whatif_sections import FrontierPoint
from support.figures import bars, rows


@pytest.fixture(scope="module")
def drawn_figures(saved_run):
    return figures(saved_run)


@pytest.fixture(scope="module")
def factor(saved_run) -> float:
    assert saved_run.results.next_lr.value > 0
    return saved_run.results.next_lr.value


def near(value):
    return pytest.approx(value, rel=1e-9, abs=0)


def of_batch(run, table, batch):
    return [row for row in run.table(table).to_pylist() if row["batch"] == batch]


@pytest.mark.slow
def test_the_figures_stand_in_the_order_of_the_report(drawn_figures):
    assert list(drawn_figures) == [
        *("sweep", "parts", "modules", "prompts", "concentration", "proxies", "frontier"),
        *("observables", "lengths", "rewards", "evaluation"),
    ]


def test_the_sweep_has_both_changes_and_both_intervals(saved_run, drawn_figures):
    chart, results = drawn_figures["sweep"].chart, saved_run.results
    points, curve = rows(chart, "how", "value"), rows(chart, "line", "value")
    assert len(points) == 2 * len(results.sweep)
    for row in results.sweep:
        interval = row.measured_interval_given_U
        for over in (1.0, row.eta):
            expected = [row.measured.value / over, interval.low / over, interval.high / over]
            found = [p for p in points if p["eta"] == row.eta and p["value"] == near(expected[0])]
            assert len(found) == 1
            assert [found[0][key] for key in ("low", "high")] == near(expected[1:])
        # The curves are drawn at other etas: to first order all are in proportion.
        for point in (p for p in curve if p["line"] == "predicted"):
            change = [point[key] for key in ("value", "low", "high")]
            per_eta = [x / point["eta"] for x in change]
            expected = [row.predicted.value, row.interval_total.low, row.interval_total.high]
            expected = [x / row.eta for x in expected]
            assert per_eta == near(expected) or change == near(expected)
    assert {p["line"] for p in curve} == {"predicted", "with the quadratic term"}


def test_the_parabola_is_through_the_rows_own_values(saved_run, drawn_figures):
    """By the three values of one parabola in eta: the rows' own, at two etas, and at any third."""
    first, second = (saved_run.results.sweep[i] for i in (1, -1))

    def of_row(row):
        return row.second_order.value / row.eta

    slope = (of_row(second) - of_row(first)) / (second.eta - first.eta)
    curve = rows(drawn_figures["sweep"].chart, "line", "value")
    found = [p for p in curve if p["line"] == "with the quadratic term"]
    assert found
    for point in found:
        expected = of_row(first) + slope * (point["eta"] - first.eta)
        at = (expected, expected * point["eta"])
        assert any(point["value"] == pytest.approx(x, rel=1e-6) for x in at)


def test_parts_are_those_of_the_attribution(saved_run, drawn_figures, factor):
    section, found = saved_run.results.attribution, bars(drawn_figures["parts"])
    names = {"momentum": "momentum", "weight decay": "decay", "this batch": "update"}
    for name, part in (names | {"the whole": "whole"}).items():
        share = getattr(section, part)
        assert found[name]["share"] == factor * share.share
        bounds = [factor * share.interval.low, factor * share.interval.high]
        assert [found[name]["low"], found[name]["high"]] == bounds
    parts = sum(found[name]["share"] for name in names)
    assert parts == pytest.approx(found["the whole"]["share"], rel=1e-9)


def test_modules_are_sums_over_factors(saved_run, drawn_figures, factor):
    expected = defaultdict(float)
    for row in saved_run.table("modules").to_pylist():
        expected[row["layer"].rsplit(".", 1)[-1], row["projection"]] += factor * row["share"]
    cells = [c for c in rows(drawn_figures["modules"].chart, "layer", "projection") if "sign" not in c]
    assert {(c["layer"], c["projection"]): c["share"] for c in cells} == near(dict(expected))
    total = factor * saved_run.results.first_order.derivative.value
    assert sum(c["share"] for c in cells) == pytest.approx(total, rel=1e-6)


def test_prompts_are_sums_over_responses_in_order(saved_run, drawn_figures, factor):
    expected = defaultdict(float)
    for row in of_batch(saved_run, "sequences", "U"):
        expected[row["prompt_index"]] += factor * row["share"]
    found = rows(drawn_figures["prompts"].chart, "name", "share")
    shares = {int(row["name"].split()[0]): row["share"] for row in found}
    assert shares == near(dict(expected))
    assert [row["share"] for row in found] == sorted(row["share"] for row in found)
    known = {p.prompt_index: p.share.interval for p in saved_run.results.influence.prompts}
    assert len(known) == 2
    for row in found:
        interval = known.get(int(row["name"].split()[0]))
        bounds = (None, None) if interval is None else (interval.low * factor, interval.high * factor)
        assert (row["low"], row["high"]) == bounds


def test_of_many_prompts_the_middle_ones_are_summed(large_run):
    scale = amounts(large_run).factor
    expected = defaultdict(float)
    for row in of_batch(large_run, "sequences", "U"):
        expected[row["prompt_index"]] += scale * row["share"]
    found = bars(figures_of(large_run, "prompts"))
    assert len(expected) == 64
    other = next(name for name in found if name.startswith("the other "))
    assert int(other.split()[-1]) == 64 - (len(found) - 1)
    named = {int(name.split()[0]) for name in found if name != other}
    rest = math.fsum(share for index, share in expected.items() if index not in named)
    assert found[other]["share"] == pytest.approx(rest, rel=1e-9, abs=1e-18)
    for sign in (1, -1):
        of_sign = sorted(
            (i for i in expected if sign * expected[i] > 0), key=lambda i: -abs(expected[i])
        )
        assert set(of_sign[:15]) == {i for i in named if sign * expected[i] > 0}


def figures_of(run, name):
    from funcprobe.adapters.report.charts import CHARTS

    return next(chart for chart in CHARTS if chart.__name__ == name)(run)


def test_concentration_is_a_loop_over_sorted_shares(saved_run, drawn_figures):
    figure = drawn_figures["concentration"]
    found = rows(figure.chart, "of", "items", "held")
    tables = {
        "tokens of U": ("tokens", "U"),
        "responses of U": ("sequences", "U"),
        "tokens of E": ("tokens", "E"),
    }
    assert {row["of"] for row in found} == {*tables, "prompts of U"}
    for name, (table, batch) in tables.items():
        sizes = sorted((abs(row["share"]) for row in of_batch(saved_run, table, batch)), reverse=True)
        curve = [row for row in found if row["of"] == name]
        assert len(curve) > 3
        for row in curve:
            k = round(row["items"] * len(sizes))
            assert row["held"] == pytest.approx(math.fsum(sizes[:k]) / math.fsum(sizes), rel=1e-9)
        few = max(1, round(0.05 * len(sizes)))
        held = math.fsum(sizes[:few]) / math.fsum(sizes)
        assert f"{few} of {len(sizes)} {name} hold {100 * held:.0f} %" in figure.caption


@pytest.mark.parametrize("count", [1, 5, 199, 200, 4000, 10**6])
def test_a_curve_has_its_ends_and_few_points(count):
    found = drawn(count)
    assert len(found) <= 200
    assert found[0] == 0
    assert found[-1] == count
    assert sorted(set(found)) == found
    assert {0, 1} <= set(found)


def test_proxies_count_every_token_once_by_its_ranks(saved_run, drawn_figures):
    from scipy.stats import spearmanr

    from funcprobe.adapters.results.proxy_table import proxy_table

    table = proxy_table(saved_run).tokens
    share = table["share"].to_pylist()
    chart = drawn_figures["proxies"].chart
    panels = chart["concat"]
    names = [panel["title"]["text"][0] for panel in panels]
    assert {"covariance", "surprisal", "marginal"} <= set(names)
    for name, panel in zip(names, panels, strict=True):
        score = table[name].to_pylist()
        counts = Counter()
        for a, b in zip(share, score, strict=True):
            ranks = (
                (sum(x < v for x in xs) + sum(x <= v for x in xs)) / 2 / len(xs)
                for v, xs in ((a, share), (b, score))
            )
            counts[tuple(min(int(10 * rank), 9) for rank in ranks)] += 1
        found = {
            (int(10 * row["share"]), int(10 * row["score"])): row["tokens"]
            for row in rows(chart, "tokens", part=panel)
        }
        assert found == counts
        assert sum(found.values()) == len(share)
        assert panel["title"]["text"][1] == f"rho = {number(spearmanr(share, score).statistic, 2)}"


def test_the_frontier_is_that_of_whatif(saved_run, drawn_figures):
    points = {p.rule: p for p in saved_run.whatif.frontier.points}
    found = rows(drawn_figures["frontier"].chart, "rule", "kind")
    assert {row["rule"] for row in found} == points.keys()
    for row in found:
        point = points[row["rule"]]
        assert (row["entropy"], row["reward"]) == (point.entropy, point.reward)
        assert row["high"] - row["low"] == pytest.approx(2 * point.reward_half_width)
        assert row["right"] - row["left"] == pytest.approx(2 * point.entropy_half_width)
        if point.rule == "own":
            assert row["kind"] == "the run's own rule"
        else:
            assert row["kind"] == ("dominated" if point.dominated else "on the frontier")
    assert "own" in {row["name"] for row in rows(drawn_figures["frontier"].chart, "name", "align")}


def made_up(count: int) -> list[FrontierPoint]:
    """Rules on a convex front and behind it, crowded about the run's own."""
    points = []
    for i in range(count):
        angle = 1.5 * ((i * 0.618034) % 1)
        radius = 1.0 if i % 2 else 0.9 - 0.01 * i
        own, at = i == 0, (radius * math.sin(angle), radius * math.cos(angle))
        points.append(
            FrontierPoint(
                rule="own" if own else f"a_rule_of_some_length:{i}",
                entropy=1e-3 * at[0],
                entropy_half_width=1e-4,
                reward=at[1],
                reward_half_width=0.1,
                dominated=radius < 1 and not own,
            )
        )
    return points


@pytest.mark.parametrize("count", [1, 2, 14, 26])
def test_names_of_rules_are_not_on_each_other(count):
    points = made_up(count)
    domains = padded([p.entropy for p in points]), padded([p.reward for p in points])
    found = placed(points, *domains)
    assert found[0]["name"] == "own"
    front = {p.rule for p in points if not p.dominated}
    assert {row["name"] for row in found} <= front
    assert len(found) >= min(len(front), 4)
    for a, b in combinations(found, 2):
        spans = []
        for row in (a, b):
            long = 6.5 * len(row["name"])
            left = row["x"] - {"left": 0, "right": 1, "center": 0.5}[row["align"]] * long
            spans.append((left, left + long))
        apart = spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]
        assert apart or abs(a["y"] - b["y"]) >= 13


def test_observables_are_at_the_next_learning_rate(saved_run, drawn_figures):
    found = rows(drawn_figures["observables"].chart, "kind", "change")
    expected = []
    for one in saved_run.results.observables:
        (row,) = (row for row in one.sweep if row.is_next_lr)
        for kind, change, interval in (
            ("predicted", row.predicted, row.interval_given_U),
            ("measured", row.measured, row.measured_interval_given_U),
        ):
            bounds = {"low": interval.low, "high": interval.high}
            expected.append({"kind": kind, "change": change.value, **bounds})
    assert len(expected) == 4
    assert all(row in found for row in expected)
    assert len(found) == len(expected)


@pytest.mark.parametrize(("batch", "file"), [("U", "update"), ("E", "eval")])
def test_histograms_count_every_response(saved_run, drawn_figures, batch, file):
    responses = saved_run.rollouts(file).to_pylist()
    lengths = Counter((len(r["response_ids"]), r["finish_reason"]) for r in responses)
    found = Counter()
    for row in rows(drawn_figures["lengths"].chart, "responses", "batch"):
        if row["batch"] == batch:
            middle = (row["low"] + row["high"]) / 2
            found[round(middle), {"ended": "stop", "cut off": "length"}[row["kind"]]] += row[
                "responses"
            ]
            assert row["to"] - row["from"] == row["responses"]
    assert found == lengths
    rewards = Counter(r["reward"] for r in responses)
    bins = [
        r for r in rows(drawn_figures["rewards"].chart, "responses", "batch") if r["batch"] == batch
    ]
    assert {round((r["low"] + r["high"]) / 2, 9): r["responses"] for r in bins} == rewards


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("count", [1, 2, 12, 13, 1000])
def test_bars_hold_every_value(count, whole):
    import numpy as np

    values = np.arange(count) * (7 if whole else 0.37)
    bars = bars_of(values, whole=whole)
    assert np.histogram(values, bars.edges)[0].sum() == count
    assert len(bars.low) == len(bars.high) == len(bars.edges) - 1 <= 41
    assert (bars.high > bars.low).all()
    assert (bars.low[1:] >= bars.high[:-1] - 1e-9).all()


def test_where_in_E_is_by_term_and_by_prompt(saved_run, drawn_figures, factor):
    section, found = saved_run.results.attribution, bars(drawn_figures["evaluation"])
    names = ("distributions' own", "probability of the tokens", "control variate", "the whole")
    shares = (section.direct, section.score, section.control, section.whole)
    expected = dict(zip(names, shares, strict=True))
    expected |= {f"{p.prompt_index} {p.text}": p.total for p in section.E_prompts}
    assert max(map(len, expected)) < 28  # longer ones are cut
    assert found.keys() == expected.keys()
    for name, share in expected.items():
        assert found[name]["share"] == factor * share.share
        assert found[name]["high"] == factor * share.interval.high


# Numbers in words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0005, "5·10⁻⁴"),
        (-0.00123456, "−0.00123"),
        (1234.5, "1230"),
        (6.6666e-5, "6.67·10⁻⁵"),
        (-2e-12, "−2·10⁻¹²"),
        (0.999999, "1"),
        (100.0, "100"),
        (1.5e9, "1.5·10⁹"),
    ],
)
def test_numbers_are_without_the_letter_e(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("eta", "text"), [(5e-4, "0.0005"), (1e-8, "1e-8"), (6.66667e-5, "6.67e-5"), (3e-3, "0.003")]
)
def test_learning_rates_are_as_configurations_have_them(eta, text):
    assert eta_text(eta) == text


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ([0.0123, -0.4], "x, nats"),
        ([0.0123], "x, thousandths of nats"),
        ([-2e-6, 1e-9], "x, millionths of nats"),
        ([5e4], "x, thousands of nats"),
        ([0.0], "x, nats"),
        ([1e-20], "x, 1e-21 of nats"),
    ],
)
def test_axes_are_in_words(values, title):
    assert scaled(values).title("x", "nats") == title
