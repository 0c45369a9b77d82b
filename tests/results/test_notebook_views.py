"""What a notebook shows of a run, rules and a prediction: its numbers, and text that is inert."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

import funcprobe
from funcprobe.adapters.results import SavedRun, load, prompt_table, proxy_table
from funcprobe.adapters.results.frames import FRAMES
from funcprobe.adapters.results.verdict import verdict_line
from funcprobe.html_table import html_table
from funcprobe.statistics.intervals import Error, delta_error, student, total
from funcprobe.step.masked import OverMasks
from funcprobe.types import InputError
from support.payloads import PAYLOADS
from support.policies import random_batch, random_like, tiny_policy

ALLOWED = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


class Read(HTMLParser):
    """Tags, attributes and text of a piece of HTML, which is well formed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= set(attrs)
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(decl)


def read(html: str) -> Read:
    found = Read(html)
    assert found.tags <= ALLOWED
    assert {name for name, _ in found.attributes} <= {"style", "scope"}
    styles = " ".join(value or "" for name, value in found.attributes if name == "style")
    assert "color" not in styles  # so that it looks as its surroundings do
    assert "background" not in styles
    return found


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_cell_of_a_table_is_text(name):
    text = PAYLOADS[name]
    found = read(html_table(text, (text, text), [(text, text), (text, text)], text))
    # Written as one text each: what the parser made of it is the payload itself.
    clean = text.replace("\r\n", "\n").replace("\r", "\n")
    assert [x.replace("\r\n", "\n").replace("\r", "\n") for x in found.texts if x.strip()] == [
        clean
    ] * 8


@pytest.mark.parametrize("name", PAYLOADS)
def test_texts_of_a_run_are_inert(saved_run, name):
    """In names of rules and observables, findings, units, and the folder."""
    text = PAYLOADS[name]
    whatif, results = saved_run.whatif, saved_run.results
    rules = [row.model_copy(update={"rule": text, "about": text}) for row in whatif.rules]
    hostile = whatif.model_copy(
        update={
            "rules": tuple(rules),
            "findings": (text,),
            "entropy": whatif.entropy.model_copy(update={"unit": text}),
        }
    )
    entropy = results.entropy.model_copy(update={"unit": text})
    verdict = results.verdict.model_copy(update={"doubts": (text,)})
    other = results.model_copy(update={"entropy": entropy, "verdict": verdict})
    run = saved_run._replace(folder=Path(text[:60]), results=other, whatif=hostile)
    for shown in (hostile, other, run):
        read(shown._repr_html_())


def test_a_run_shows_its_verdict_sweep_and_parts(saved_run):
    results = saved_run.results
    for shown in (results, saved_run):
        found = read(shown._repr_html_())
        assert verdict_line(results) in found.texts
        for row in results.sweep:
            assert f"{row.measured.value:+#.3g}" in " ".join(found.texts)
            interval = row.interval_total
            assert f"{interval.low:+#.3g} to {interval.high:+#.3g}" in found.texts
        for part in ("from_update", "from_momentum", "from_weight_decay", "derivative"):
            assert f"{getattr(results.first_order, part).value:+#.3g}" in found.texts
    assert any(str(saved_run.folder) in text for text in found.texts)
    assert len(saved_run._repr_html_()) < 20_000
    assert load(saved_run.folder)._repr_html_() == results._repr_html_()


def test_without_attribution_or_verdict_there_is_a_view(saved_run):
    """As of an earlier version."""
    older = saved_run.results.model_copy(update={"attribution": None, "verdict": None})
    assert "weight decay" in read(older._repr_html_()).texts


def test_rules_show_their_changes(saved_run):
    whatif = saved_run.whatif
    found = read(whatif._repr_html_())
    names = [row.rule for row in whatif.rules]
    assert [text for text in found.texts if text in names] == names
    for row in whatif.rules:
        assert f"{row.entropy.predicted.value:+#.3g}" in found.texts
        assert f"{row.reward.measured.value:+#.3g}" in found.texts
    assert set(whatif.findings) <= set(found.texts)
    bare = [row.model_copy(update={"reward": None}) for row in whatif.rules]
    without = read(whatif.model_copy(update={"rules": tuple(bare)})._repr_html_())
    assert "reward, measured" in found.texts
    assert "reward, measured" not in without.texts


# The core


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, funcprobe.Prediction]:
    probe = funcprobe.bind(tiny_policy(), max_tokens=64)
    E = random_batch([(0, 3, 5), (1, 4, 2), (1, 4, 7), (2, 2, 1), (3, 5, 4)], seed=1)
    U = random_batch([(0, 2, 3), (0, 2, 6), (1, 5, 1), (1, 5, 4), (2, 3, 5)], seed=2)
    advantage_N = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.2], dtype=torch.float64)
    update = funcprobe.update_batch(U, advantage_N, "token_mean")
    params = probe.params
    nu = {n: 0.3 + t.square() for n, t in random_like(params, seed=5).items()}
    groups = (funcprobe.AdamGroup(tuple(params), 5e-4, 0.9, 0.99, 1e-6, 0.1),)
    state = funcprobe.AdamState(random_like(params, seed=4), nu, dict.fromkeys(params, 3), groups)
    return probe, E, probe.predict(params, E, update, state)


def test_a_prediction_shows_its_interval_and_parts(made):
    _, E, prediction = made
    given_u = delta_error(prediction.first_order.influence_N, E.prompt_N)
    assert prediction.given_u == given_u
    assert prediction.given_u.se == prediction.first_order.se
    assert prediction.total == total(given_u, prediction.over_u)
    assert prediction.total.se == pytest.approx(prediction.se_total, rel=1e-12)
    low, high = student(prediction.derivative, prediction.total)
    found = read(prediction._repr_html_())
    assert f"{prediction.derivative:+.4g} (95 %: {low:+.4g} to {high:+.4g})" in found.texts[1]
    for value in (prediction.from_update, prediction.from_momentum, prediction.from_decay):
        assert f"{value:+.4g}" in found.texts
    for se in (given_u.se, prediction.over_u.se):
        assert f"{se:.2g}" in found.texts
    assert "standard error over dropout masks" not in found.texts


def test_masks_enter_the_interval(made):
    _, _, prediction = made
    derivatives = [prediction.derivative - 1, prediction.derivative + 1, prediction.derivative]
    masks = OverMasks(tuple(derivatives), tuple(derivatives), 1.0, 2.0)
    other = prediction._replace(masks=masks)
    expected = total(prediction.given_u, prediction.over_u, Error(masks.se, 2))
    assert other.total == expected
    assert "standard error over dropout masks" in read(other._repr_html_()).texts


def test_a_measured_change_shows_its_weights(made):
    probe, E, prediction = made
    found = probe.measure(probe.params, E, prediction.direction.total, 1e-3, prediction.stats)
    shown = read(found._repr_html_())
    assert f"Measured change of the entropy: {found.delta:+.4g}" in shown.texts
    assert f"{found.ess:.1f} of 5 responses" in shown.texts
    se = (5 / 4 * float(found.influence_N.square().sum())) ** 0.5
    assert f"{se:.2g}" in shown.texts


# Dataframes


@pytest.mark.parametrize("name", FRAMES)
def test_a_table_is_the_same_in_pandas_and_polars(saved_run, name):
    frame, polars = saved_run.to_pandas(name), saved_run.to_polars(name)
    assert isinstance(frame, pd.DataFrame)
    assert isinstance(polars, pl.DataFrame)
    assert polars.columns == list(frame.columns)
    assert len(polars) == len(frame) > 0
    for column in frame:
        ours = [None if pd.isna(x) else x for x in frame[column].tolist()]
        theirs = [None if x is None or x != x else x for x in polars[column].to_list()]
        assert ours == theirs, column


def test_frames_are_the_tables_with_their_units(saved_run):
    tokens = saved_run.to_pandas("tokens")
    written = pq.read_table(saved_run.folder / "tokens.parquet")
    assert tokens["text"].tolist() == written["text"].to_pylist()
    assert tokens.attrs["units"]["share"] == "nats per token per unit of learning rate"
    assert "batch" not in tokens.attrs["units"]
    pd.testing.assert_frame_equal(saved_run.sweep, saved_run.results.to_dataframe())
    pd.testing.assert_frame_equal(saved_run.to_pandas("sweep"), saved_run.sweep)
    assert saved_run.to_pandas("prompts")["share"].tolist() == (
        prompt_table(saved_run)["share"].to_pylist()
    )
    assert len(saved_run.to_pandas("proxies")) == proxy_table(saved_run).tokens.num_rows


def test_a_table_that_is_not_there_is_said(saved_run, tmp_path, monkeypatch):
    empty: SavedRun = saved_run._replace(folder=tmp_path)
    for name in ("tokens", "proxies", "prompts", "modules"):
        with pytest.raises(InputError, match=rf"has no table {name}: .* repeat the run with attr"):
            empty.to_pandas(name)
    with pytest.raises(InputError, match=r"'token' is no table of a run: expected one of sweep, mod"):
        saved_run.to_pandas("token")
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(InputError, match=r"polars is not installed: pip install 'funcprobe\[polars\]'"):
        saved_run.to_polars("tokens")
