"""`funcprobe compare`: order, formulas by hand, what is refused or said, the page and its JSON."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from funcprobe.adapters import compare as command_module
from funcprobe.adapters.checkpoint.training_log import training_log
from funcprobe.adapters.results import load, load_comparison
from funcprobe.adapters.results.comparison_sections import Comparison
from funcprobe.types import InputError
from support.browser import axe
from support.payloads import PAYLOADS
from support.saved_runs import edited

pytestmark = pytest.mark.usefixtures("offline")

STEPS = (2, 5, 11)
KEYS = {"seed", "temperature", "B_E", "B_U", "G"}
LR = {s: 1e-3 * (1 - s / 40) for s in range(30)}  # of the step that is taken after s


def entry(step: int, **keys: Any) -> dict[str, Any]:
    return {"step": step, "learning_rate": LR[step - 1], "entropy": 2 - 0.01 * step} | keys


def written(folder: Path, run: Path, steps: Sequence[int] = STEPS) -> list[Path]:
    """Runs of checkpoints of one training, each with other numbers; the checkpoints with their log."""
    draw = np.random.default_rng(3)
    made = []
    for step in steps:
        target = folder / "runs" / f"r-{step}"
        shutil.copytree(run, target, ignore=shutil.ignore_patterns("figures", "*.html"))
        checkpoint = folder / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        log = [entry(s) for s in range(1, step + 1)]
        state = {"global_step": step, "log_history": log}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        config = target / "config.toml"
        lines = [
            f"checkpoint = {json.dumps(str(checkpoint))}" if line.startswith("checkpoint =") else line
            for line in config.read_text().splitlines()
        ]
        config.write_text("\n".join(lines))
        _shifted(target, draw)
        edited(target, next_lr__value=LR[step])
        made.append(target)
    return made


def _shifted(target: Path, draw: np.random.Generator) -> None:
    """Other entropies of the same draws, and the results that belong to them."""
    table = pq.read_table(target / "sequences.parquet")
    rows = table.to_pylist()
    of_E = [row for row in rows if row["batch"] == "E"]
    for row in of_E:
        row["entropy"] *= 1 + 0.2 * draw.random()
    column = pa.array([row["entropy"] for row in rows])
    place = table.column_names.index("entropy")
    pq.write_table(table.set_column(place, "entropy", column), target / "sequences.parquet")
    h, T = (np.array([row[name] for row in of_E], float) for name in ("entropy", "response_tokens"))
    H = h.sum() / T.sum()
    influence = (h - H * T) / T.sum()
    se = math.sqrt(len(h) / (len(h) - 1) * (influence**2).sum())
    dof = _dof(influence)
    half = stats.t.ppf(0.975, dof) * se
    edited(
        target,
        entropy__value=H,
        entropy_interval={"low": H - half, "high": H + half, "degrees_of_freedom": dof},
    )


def _dof(influence: np.ndarray) -> float:
    """2 M / (kurtosis - (M - 3) / (M - 1)), at most M - 1."""
    M, centred = len(influence), influence - influence.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    return min(M - 1, 2 * M / max(kurtosis - (M - 3) / (M - 1), 1e-12))


@pytest.fixture
def training(run_one, tmp_path) -> list[Path]:
    return written(tmp_path, run_one)


def compared(folders: Sequence[Path], out: Path, **options: Any) -> Comparison:
    return command_module.compare_runs(folders, out, **options).comparison


def test_checkpoints_are_ordered_by_step(training, tmp_path) -> None:
    found = compared([training[2], training[0], training[1]], tmp_path)
    assert (found.kind, found.order) == ("checkpoints", "training step")
    assert [run.step for run in found.runs] == list(STEPS)
    assert [run.label for run in found.runs] == ["step 2", "step 5", "step 11"]
    for run, folder in zip(found.runs, training, strict=True):
        results = load(folder)
        first, eta = results.first_order, results.next_lr.value
        assert run.entropy == results.entropy
        assert run.predicted.value == eta * first.derivative.value
        assert run.momentum + run.decay + run.update == pytest.approx(run.predicted.value)
        assert run.relative == run.predicted.value / run.entropy.value
    assert load_comparison(tmp_path / "compare.json") == found


def test_the_path_is_the_formula_by_hand(training, tmp_path) -> None:
    path = compared(training, tmp_path).path
    assert path is not None
    results = [load(folder) for folder in training]
    of_E = [
        [row for row in pq.read_table(f / "sequences.parquet").to_pylist() if row["batch"] == "E"]
        for f in training
    ]
    for i, one in enumerate(path.between):
        a, b = STEPS[i], STEPS[i + 1]
        S = sum(LR[s] for s in range(a, b))
        first, counts = results[i].first_order, results[i].counts
        assert (one.first, one.last) == (a, b)
        assert one.learning_rates == pytest.approx(S)
        assert one.predicted == pytest.approx(S * first.derivative.value)
        assert one.actual == results[i + 1].entropy.value - results[i].entropy.value
        assert one.paired
        phi = []
        for rows in of_E[i : i + 2]:
            h, T = (np.array([row[k] for row in rows], float) for k in ("entropy", "response_tokens"))
            phi.append((h - h.sum() / T.sum() * T) / T.sum())
        M, change = len(phi[0]), phi[1] - phi[0]
        se = math.sqrt(M / (M - 1) * (change**2).sum())
        half = stats.t.ppf(0.975, _dof(change)) * se
        assert one.actual_interval.half_width == pytest.approx(half, rel=1e-6)
        of_U = S * first.se_over_U.value * math.sqrt(1 + 1 / (b - a))
        whole = math.hypot(S * first.se_given_U.value, of_U)
        dof = whole**4 / (
            (S * first.se_given_U.value) ** 4 / first.interval_given_U.degrees_of_freedom
            + of_U**4 / first.interval_over_U.degrees_of_freedom
        )
        half = stats.t.ppf(0.975, dof) * whole
        assert one.predicted_interval.half_width == pytest.approx(half, rel=1e-6)
        psi = np.array([row["influence"] for row in of_E[i]])
        rest = change - S * psi
        apart = math.hypot(math.sqrt(M / (M - 1) * (rest**2).sum()), of_U)
        assert one.difference == pytest.approx(one.actual - one.predicted)
        assert one.difference_interval.half_width > 1.9 * apart
        low, high = one.difference_interval.low, one.difference_interval.high
        assert one.agrees == (low <= 0 <= high)
        assert counts.U_prompts == 4
    assert path.agree == sum(one.agrees for one in path.between)
    # The sum, with errors added up.
    reached, bound = results[0].entropy.value, results[0].entropy_interval.half_width
    assert path.reached[0].entropy == reached
    for one, at in zip(path.between, path.reached[1:], strict=True):
        reached += one.predicted
        bound += one.predicted_interval.half_width
        assert at.entropy == pytest.approx(reached)
        assert at.interval.half_width == pytest.approx(bound)
        assert at.independent_half_width < bound


def test_the_trainers_entropy_is_of_the_policy_before_the_step(training, tmp_path) -> None:
    path = compared(training, tmp_path).path
    assert path is not None
    assert [(one.step, one.entropy) for one in path.logged] == [
        (s - 1, 2 - 0.01 * s) for s in range(1, 12)
    ]
    assert "of every step, as the trainer logged it" in path.learning_rates
    # Logged every second step: of the two policies before.
    log = tmp_path / "log.json"
    log.write_text(json.dumps({"log_history": [entry(2), entry(4)]}))
    path = compared(training, tmp_path, log=log).path
    assert path is not None
    assert [one.step for one in path.logged] == [0.5, 2.5]
    assert "straight line" in path.learning_rates


def test_rates_of_the_next_step_are_recognised_and_wrong_ones_are_not_used(training, tmp_path) -> None:
    log = tmp_path / "log.json"
    after = [entry(s, learning_rate=LR[s]) for s in range(1, 12)]
    log.write_text(json.dumps({"log_history": after}))
    path = compared(training, tmp_path, log=log).path
    assert path is not None
    assert path.between[0].learning_rates == pytest.approx(LR[2] + LR[3] + LR[4])
    log.write_text(json.dumps({"log_history": [entry(s, learning_rate=7.0) for s in range(1, 12)]}))
    path = compared(training, tmp_path, log=log).path
    assert path is not None
    assert path.between[0].learning_rates == pytest.approx(LR[2] + LR[3] + LR[4])  # linear
    assert "straight line" in path.learning_rates


def test_a_log_of_others_is_read_with_care(tmp_path) -> None:
    file = tmp_path / "trainer_state.json"
    entries = [
        {"step": 1, "entropy": 1.0},
        {"step": 2, "entropy": float("nan")},
        {"step": 3, "entropy": "1e9"},
        {"step": 4, "entropy": True},
        {"step": 5, "entropy": 10**400},
        {"step": "6", "entropy": 1.0},
        {"step": -1, "entropy": 1.0},
        {"step": 10**30, "entropy": 1.0},
        ["step", 7],
        None,
        {"entropy": 1.0},
    ]
    file.write_text(json.dumps({"log_history": entries}))
    log = training_log(tmp_path)
    assert log is not None
    assert [(e.step, e.entropy) for e in log.entries if e.entropy is not None] == [(1, 1.0)]
    assert log.left_out == 4
    for text in ("{", "[]", "{}", '{"log_history": 3}', "\udcff".encode("utf-8", "surrogateescape")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match="log_history"):
            training_log(tmp_path)
    assert training_log(tmp_path / "nowhere") is None


def test_where_a_run_has_no_next_learning_rate_all_changes_are_in_one_unit(run_one, tmp_path) -> None:
    """A schedule that ends at 0: the path is there, and no change is beside one of another unit."""
    runs = written(tmp_path, run_one)
    edited(runs[-1], next_lr__value=0.0)
    found = compared(runs, tmp_path)
    assert found.path is not None
    for run, folder in zip(found.runs, runs, strict=True):
        assert run.predicted.value == load(folder).first_order.derivative.value
        assert run.predicted.unit == load(folder).first_order.derivative.unit
        assert run.momentum + run.decay + run.update == pytest.approx(run.predicted.value)
        assert run.relative is run.measured is None
    assert any("r-11: the changes of all runs are per unit" in line for line in found.warnings)
    for group in found.projections:
        shares = [
            next(p for p in load(f).attribution.projections if p.name == group.name) for f in runs
        ]
        assert list(group.change) == [one.total.share for one in shares]


def test_folders_of_one_name_have_different_labels(run_one, tmp_path) -> None:
    runs = [tmp_path / parent / "same" for parent in ("first", "second")]
    for run in runs:
        shutil.copytree(run_one, run, ignore=shutil.ignore_patterns("figures", "*.html"))
    config = runs[1] / "config.toml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if line.split(" = ")[0] not in KEYS))
    found = compared(runs, tmp_path)
    assert {run.label for run in found.runs} == {"first/same", "second/same"}
    assert found.order.endswith(f"and {len(found.differing) - 3} more")


def test_without_any_learning_rate_there_is_no_path(run_one, tmp_path) -> None:
    """Not one that stays where it is, without an error."""
    runs = written(tmp_path, run_one)
    for run in runs:
        edited(run, next_lr__value=0.0)
    for step in STEPS:
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    found = compared(runs, tmp_path)
    assert found.path is None
    assert any(line.startswith("no path over the training") for line in found.warnings)


def test_a_log_without_entropies_is_said(training, tmp_path) -> None:
    log = tmp_path / "log.json"
    log.write_text(json.dumps({"log_history": [{"step": 1, "entropy": math.nan}]}))
    path = compared(training, tmp_path, log=log).path
    assert path is not None
    assert path.logged == ()
    assert "logs no entropy" in path.logged_what
    assert "1 entries are no finite number" in path.logged_what
    shutil.rmtree(tmp_path / "out")
    found = compared(training, tmp_path)  # steps by the folders' numbers
    assert found.path is not None
    assert [run.step for run in found.runs] == list(STEPS)
    assert "no trainer_state.json" in found.path.logged_what
    with pytest.raises(InputError, match="no such file"):
        compared(training, tmp_path, log=tmp_path / "gone.json")


def test_other_draws_are_not_paired_and_this_is_said(training, tmp_path) -> None:
    path = training[1] / "sequences.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("prompt_index")
    other = pa.array([i + 1 for i in table["prompt_index"].to_pylist()])
    pq.write_table(table.set_column(place, "prompt_index", other), path)
    found = compared(training, tmp_path)
    assert found.path is not None
    assert [one.paired for one in found.path.between] == [False, False]
    assert any("not every pair" in line for line in found.warnings)
    ends = [run.entropy_interval for run in found.runs[:2]]
    sum_of_squares = math.hypot(*(one.half_width for one in ends))
    assert found.path.between[0].actual_interval.half_width == pytest.approx(sum_of_squares, rel=0.2)


def _changed(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.toml").read_text()
    assert old in text
    (folder / "config.toml").write_text(text.replace(old, new))


def test_other_runs_are_ordered_by_what_differs(training, tmp_path) -> None:
    for folder, B in zip(training, (12, 100, 9), strict=True):
        _changed(folder, "B_E = 12", f"B_E = {B}")
    found = compared(training, tmp_path)
    assert (found.kind, found.path) == ("settings", None)
    assert [run.name for run in found.runs] == ["r-11", "r-2", "r-5"]
    keys = {one.key: one.values for one in found.differing}
    assert keys["sampling.B_E"] == ("9", "12", "100")  # by number
    assert found.order.startswith("sampling.B_E")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conventions__entropy__per": "sequence"}, "entropy.per"),
        ({"conventions__entropy__integrand": "sampled"}, "entropy.integrand"),
        ({"entropy__unit": "bits per token"}, "bits per token"),
    ],
)
def test_entropies_of_other_definitions_are_refused(command, training, change, said) -> None:
    edited(training[1], **change)
    outcome = command("compare", *training)
    assert (outcome.status, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert said in line
    assert not Path("compare.html").exists()
    assert not Path("compare.json").exists()


def test_what_is_no_comparison_is_one_line(command, training, tmp_path) -> None:
    for given, said in (
        ([training[0]], "one run is nothing to compare"),
        ([training[0], training[0]], "given twice"),
        ([training[0], tmp_path / "gone"], "cannot be read"),
    ):
        outcome = command("compare", *given)
        assert (outcome.status, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        assert said in line


def test_other_prompts_and_temperatures_are_said_first(command, training) -> None:
    manifest = json.loads((training[1] / "manifest.json").read_text())
    manifest["inputs"]["prompts"] = "other"
    (training[1] / "manifest.json").write_text(json.dumps(manifest))
    edited(training[1], conventions__temperature=0.7)
    outcome = command("compare", *training)
    assert outcome.status == 0
    first, second, *_ = outcome.out.splitlines()
    assert first.startswith("warning: the runs have different prompts")
    assert "temperature differs" in second


def test_the_table_fits_80_columns_and_names_files(command, training) -> None:
    outcome = command("compare", *training, "--out", "reports", "--name", "mine")
    assert outcome.status == 0
    table = outcome.out[outcome.out.index("Entropy, nats") :].splitlines()
    assert max(map(len, table)) <= 80
    assert [line.split()[1] for line in table if line.strip().startswith("step")] == ["2", "5", "11"]
    assert Path("reports/mine.html").is_file()
    assert Path("reports/mine.json").is_file()


def test_dataframe_and_notebook(training, tmp_path) -> None:
    found = compared(training, tmp_path)
    frame = found.to_dataframe()
    assert frame["step"].tolist() == list(STEPS)
    assert frame["entropy"].tolist() == [load(f).entropy.value for f in training]
    assert frame.attrs["unit"] == found.unit
    shown = found._repr_html_()
    assert shown.count("<tr>") == 4
    hostile = found.model_copy(
        update={"runs": (found.runs[0].model_copy(update={"label": PAYLOADS["issue"]}),)}
    )
    assert "<img" not in hostile._repr_html_()


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_silent_whole_and_readable(open_page, training, tmp_path, dark) -> None:
    found = command_module.compare_runs(training, tmp_path)
    for width in (1280, 390):
        seen = open_page(found.html, width=width, dark=dark)
        assert axe(seen.page) == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    figures = seen.page.locator("figure.chart svg").count()
    assert figures == 5
    text = seen.page.locator("#entropy-path").inner_text()
    assert "Entropy over training" in text
    marks = seen.page.locator("#entropy-path svg path").count()
    assert marks > 10
    assert found.html.stat().st_size < 500_000


def test_hostile_texts_are_inert(open_page, run_one, tmp_path) -> None:
    """In names, paths, values of the configuration, units, names of observables and modules, and the
    log: as they are where a file system allows them."""
    texts = [text for text in PAYLOADS.values() if "\0" not in text]
    folders = []
    for i, text in enumerate(texts[:3]):
        name = f"{text[:40].replace('/', '_')}{i}"
        target = tmp_path / "runs" / name
        shutil.copytree(run_one, target, ignore=shutil.ignore_patterns("figures", "*.html"))
        every = {f"key{j}": value for j, value in enumerate(texts)}
        lines = [f"{key} = {json.dumps(value + str(i))}" for key, value in every.items()]
        # JSON and TOML differ in the escapes of DEL and of what is beyond the basic plane.
        safe = [line.replace("\x7f", "") for line in lines if "\\ud" not in line]
        (target / "config.toml").write_text("[prompts]\n" + "\n".join(safe), encoding="utf-8")
        results = json.loads((target / "results.json").read_text())
        results["observables"][0]["at_theta"]["unit"] = texts[4]
        for one in results["observables"]:
            one["name"] = texts[5]
        for j, group in enumerate(results["attribution"]["projections"]):
            group["name"] = texts[6 + j]
        (target / "results.json").write_text(json.dumps(results))
        folders.append(target)
    log = tmp_path / "log.json"
    log.write_text(json.dumps({"log_history": [{"step": t, "entropy": t} for t in texts]}))
    found = command_module.compare_runs(folders, tmp_path, log=log)
    assert len(found.comparison.differing) > 40
    seen = open_page(found.html)
    assert seen.page.evaluate("typeof window.ran") == "undefined"
    assert seen.page.locator("main script, main img, main iframe, main form").count() == 0
    assert seen.faults() == {}
    assert axe(seen.page) == []
