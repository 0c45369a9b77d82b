"""Figures of runs that lack something, or have it otherwise than usual."""

import shutil
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from funcprobe.adapters.report.charts import CHARTS, figures
from funcprobe.adapters.report.charts.trust import limits
from funcprobe.adapters.report.headline import _rule
from funcprobe.adapters.report.render import inline_svg
from funcprobe.adapters.results.momentum_sections import MomentumSection, MomentumStep
from funcprobe.adapters.results.quantity import StudentInterval, quantity
from funcprobe.adapters.results.saved import load_run
from funcprobe.adapters.results.sweep_sections import Resampled
from support.figures import bars, rows, texts
from support.saved_runs import copied


def figure(run, name):
    return next(chart for chart in CHARTS if chart.__name__ == name)(run)


def changed(run, **sections):
    return run._replace(results=run.results.model_copy(update=sections))


def changed_rows(run, *changes):
    """The sweep with a dict of changes for each row."""
    rows = run.results.sweep
    return tuple(row.model_copy(update=change) for row, change in zip(rows, changes, strict=False))


WEIGHTS = "importance weights: "
RESAMPLE = {
    "verdict": "resample",
    "measured_interval_given_U": None,
    "difference_interval": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("falls", [True, False])
def test_one_learning_rate_that_is_all_rounding(saved_run, falls):
    run = changed(saved_run, sweep=changed_rows(saved_run, RESAMPLE | {"rounding": True}))
    fit = run.results.fit.model_copy(update={"rounding_eta": quantity(1.0, "learning rate", "")})
    first = run.results.first_order
    if falls is (first.derivative.value > 0):
        low, high = first.interval_total.low, first.interval_total.high
        turned = StudentInterval(low=-high, high=-low, degrees_of_freedom=9)
        value = quantity(-first.derivative.value, first.derivative.unit, "")
        first = first.model_copy(update={"derivative": value, "interval_total": turned})
    run = changed(run, second_order=None, fit=fit, first_order=first)
    found = figure(run, "sweep")
    points = rows(found.chart, "how", "value")
    assert {p["how"] for p in points} == {"measured, weights: resample"}
    assert all(p["low"] is None for p in points)
    written = texts(inline_svg(found))
    assert "importance weights: resample" in written
    assert "rounding above 10 % of the change" in written
    assert "with the quadratic term" not in written
    assert "1 learning rate;" in found.caption


def test_limits_are_where_the_numbers_say(saved_run):
    sweep = changed_rows(saved_run, {}, {"verdict": "caution"}, RESAMPLE, RESAMPLE)
    etas = [row.eta for row in sweep]
    results = saved_run.results
    until = results.second_order.linear_until.model_copy(update={"eta": 5 * etas[1]})
    run = changed(
        saved_run,
        sweep=sweep,
        second_order=results.second_order.model_copy(update={"linear_until": until}),
        fit=results.fit.model_copy(update={"rounding_eta": quantity(etas[0], "learning rate", "")}),
    )
    domain = [etas[0] / 2, 2 * etas[3]]
    rounding, curved, caution, resample = limits(run.results, domain)
    assert (rounding.low, rounding.high) == (domain[0], etas[0])
    assert (curved.low, curved.high) == (5 * etas[1], domain[1])
    assert etas[0] < caution.low < etas[1] < caution.high == resample.low < etas[2]
    assert resample.high == domain[1]
    assert [caution.name, resample.name] == [
        f"importance weights: {v}" for v in ("caution", "resample")
    ]
    assert limits(saved_run.results, domain) == []


def test_what_rounding_throws_out_stands_at_the_edge(saved_run):
    row = saved_run.results.sweep[0]
    far = row.measured.model_copy(update={"value": 1000 * row.measured.value})
    sweep = changed_rows(saved_run, {"rounding": True, "measured": far}, {}, {}, {})
    chart = figure(changed(saved_run, sweep=sweep), "sweep").chart
    (rate,) = (p for p in rows(chart, "how", "shown") if p["value"] == far.value / row.eta)
    assert abs(rate["shown"]) < abs(rate["value"]) / 10
    scales = (
        layer["encoding"].get("y", {}).get("scale") for layer in chart["vconcat"][-1]["layer"][1:]
    )
    ((low, high),) = (scale["domain"] for scale in scales if scale)
    assert low < rate["shown"] < high < abs(rate["value"])


def test_new_responses_have_a_mark_of_their_own(saved_run):
    change = quantity(-1e-3, "nats per token", "")
    interval = StudentInterval(low=-2e-3, high=1e-4, degrees_of_freedom=9)
    resampled = Resampled(change=change, se=change, interval=interval, cut_off=0)
    found = figure(
        changed(saved_run, sweep=changed_rows(saved_run, {}, {}, {}, {"resampled": resampled})), "sweep"
    )
    points = [p for p in rows(found.chart, "how", "value") if p["how"] == "measured by new responses"]
    assert -1e-3 in {p["value"] for p in points}
    assert len(points) == 2
    assert "measured by new responses" in texts(inline_svg(found))


def test_without_a_next_learning_rate_shares_are_per_unit(saved_run):
    lr = saved_run.results.next_lr.model_copy(update={"value": 0.0})
    run = changed(saved_run, next_lr=lr)
    section = run.results.attribution
    assert bars(figure(run, "parts"))["momentum"]["share"] == section.momentum.share
    assert "per unit of learning rate" in figure(run, "parts").caption


def test_without_shares_the_figures_of_shares_are_not_there(saved_run, run_folder, tmp_path):
    folder = copied(run_folder, tmp_path / "off")
    for name in ("modules", "sequences", "tokens"):
        (folder / f"{name}.parquet").unlink()
    run = changed(load_run(folder), attribution=None, influence=None, observables=())
    run = run._replace(whatif=None)
    assert list(figures(run)) == ["sweep", "lengths", "rewards"]


def test_at_level_summary_proxies_are_not_there(run_folder, tmp_path):
    folder = copied(run_folder, tmp_path / "summary")
    (folder / "tokens.parquet").unlink()
    found = figures(load_run(folder))
    assert "proxies" not in found
    curves = {row["of"] for row in rows(found["concentration"].chart, "of")}
    assert curves == {"responses of U", "prompts of U"}


@pytest.mark.parametrize("all_steps", [True, False])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_momentum_sums_to_the_whole(saved_run, count, all_steps):
    assert figure(saved_run, "momentum") is None
    shares = [(-1) ** i * 0.9**i for i in range(count)]
    section = MomentumSection(
        unit="nats per token per unit of learning rate",
        momentum=sum(shares) + 0.25,
        by_step=tuple(
            MomentumStep(step=100 - i, steps_ago=i + 1, share=share, fraction=None)
            for i, share in enumerate(shares)
        ),
        before=0.25,
        all_steps=all_steps,
        unexplained=0.0,
        by_prompt=(),
        earlier=None,
    )
    found = bars(figure(changed(saved_run, momentum=section), "momentum"))
    lr = saved_run.results.next_lr.value
    whole = found.pop("momentum")["share"]
    assert whole == lr * section.momentum
    assert sum(row["share"] for row in found.values()) == pytest.approx(whole, rel=1e-9)
    assert found["1 step ago"]["share"] == lr * shares[0]
    assert ("rounding" if all_steps else "before that") in found
    assert len(found) == min(count, 25) + 1


def with_modules(run_folder, target, names):
    """A run with these modules: (layer, projection) and a share for each, times two for its factors."""
    folder = copied(run_folder, target)
    table = pq.read_table(folder / "modules.parquet")
    records = []
    for i, (layer, projection) in enumerate(names):
        for factor in ("A", "B"):
            record = dict(table.slice(0, 1).to_pylist()[0], layer=layer, projection=projection)
            records.append(record | {"factor": factor, "share": (-1) ** i * (i + 1.0)})
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), folder / "modules.parquet")
    return load_run(folder)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {
    "many layers": [(f"model.layers.{n}", p) for n in range(80) for p in PROJECTIONS],
    "one layer": [("model.layers.0", "q_proj")],
    "no numbers": [("lm_head", "lm_head"), ("embed_tokens", "embed_tokens")],
    "some without": [
        ("model.layers.0", "q_proj"),
        ("model.layers.1", "q_proj"),
        ("lm_head", "lm_head"),
    ],
    "two towers": [(f"{t}.{n}", "q_proj") for t in ("visual.blocks", "model.layers") for n in range(3)],
}


@pytest.mark.parametrize("model", MODELS)
def test_the_map_of_modules_has_a_cell_for_each(run_folder, tmp_path, model):
    run = with_modules(run_folder, tmp_path / "made", MODELS[model])
    found = figure(run, "modules")
    lr, expected = run.results.next_lr.value, defaultdict(float)
    for row in run.table("modules").to_pylist():
        expected[row["layer"], row["projection"]] += lr * row["share"]
    cells = [c for c in rows(found.chart, "layer", "projection") if "sign" not in c]
    assert len(cells) == len(MODELS[model])
    assert len({(c["layer"], c["projection"]) for c in cells}) == len(cells)
    assert sorted(c["share"] for c in cells) == pytest.approx(sorted(expected.values()), rel=1e-9)
    root = inline_svg(found)
    assert root.count("var(--rises-5)") >= 1
    numbers = {c["layer"] for c in cells}
    written = [int(text) for text in texts(root) if text in numbers - {"none"}]
    assert written == sorted(written)


@pytest.mark.slow
def test_shares_that_are_all_0_are_drawn(run_folder, tmp_path):
    """No prompt of U with a gradient, without momentum."""
    folder = copied(run_folder, tmp_path / "still")
    for name in ("modules", "sequences", "tokens"):
        table = pq.read_table(folder / f"{name}.parquet")
        zeros = pa.array([0.0] * len(table))
        at = table.column_names.index("share")
        pq.write_table(table.set_column(at, table.field(at), zeros), folder / f"{name}.parquet")
    found = figures(load_run(folder))
    assert "concentration" not in found
    for name in ("modules", "prompts", "proxies"):
        assert "NaN" not in inline_svg(found[name])
    assert any(text.endswith("rho = undefined") for text in texts(inline_svg(found["proxies"])))


def test_supplied_rollouts_may_have_neither_texts_nor_rewards(run_folder, tmp_path):
    folder = copied(run_folder, tmp_path / "supplied")
    shutil.rmtree(folder / "figures", ignore_errors=True)
    for name in ("rollouts/update", "rollouts/eval", "sequences"):
        table = pq.read_table(folder / f"{name}.parquet")
        for column in ("reward", "prompt", "response", "finish_reason"):
            if column in table.column_names:
                at = table.column_names.index(column)
                nulls = pa.nulls(len(table), table.field(at).type)
                table = table.set_column(at, table.field(at), nulls)
        pq.write_table(table, folder / f"{name}.parquet")
    found = figures(load_run(folder))
    assert "rewards" not in found
    assert {row["kind"] for row in rows(found["lengths"].chart, "responses")} == {"not known"}
    assert len(bars(found["prompts"])) > 2


def test_captions_say_what_the_interval_covers(saved_run):
    first = saved_run.results.first_order
    assert "interval over E and U)" in figure(saved_run, "sweep").caption
    no_gradient = first.model_copy(update={"se_over_U": quantity(0.0, "", "")})
    assert "interval over E)" in figure(changed(saved_run, first_order=no_gradient), "sweep").caption


def test_observables_on_fewer_responses_say_so(saved_run):
    first, *others = saved_run.results.observables
    fewer = first.model_copy(update={"responses": 3})
    caption = figure(changed(saved_run, observables=(fewer, *others)), "observables").caption
    assert f"(reward: 3, length: {others[0].responses})" in caption


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-2e-3, -1e-3, "No rule compared here keeps"),
        (-2e-3, 1e-4, "not known to fall"),
        (1e-3, 2e-3, "Raises the entropy"),
    ],
)
def test_the_rule_to_try_claims_no_more_than_its_interval(saved_run, low, high, said):
    assert saved_run.whatif is not None
    own, rule, *_ = saved_run.whatif.rules
    interval = StudentInterval(low=low, high=high, degrees_of_freedom=9)
    entropy = rule.entropy.model_copy(update={"measured_interval_given_U": interval})
    row = rule.model_copy(update={"entropy": entropy})
    assert said in _rule(own, row)
