"""What a report reads of a run beside its documents: sampling, prompts, the scores of papers."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata

from funcprobe.adapters import run
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results import (
    SavedRun,
    load_run,
    prompt_table,
    proxy_table,
    sampling_facts,
)
from funcprobe.types import InputError
from support.checkpoints import sets


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory) -> SavedRun:
    place = tmp_path_factory.mktemp("runs")
    (place / "c.toml").touch()
    given = checkpoint.settings() | {"run.folder": str(place), "measure.etas": [1e-6]}
    given |= {"attribution.influence": 2, "sampling.B_E": 14, "measure.second_order": "none"}
    return load_run(run.run(read_config(place / "c.toml", sets(given)[1::2]), Narrator())[1])


def changed(saved: SavedRun, folder: Path, name: str, **columns: Any) -> SavedRun:
    """The run with other columns in one of its tables."""
    table = pq.read_table(saved.folder / f"{name}.parquet")
    for column, values in columns.items():
        i = table.column_names.index(column)
        table = table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))
    for path in saved.folder.rglob("*.parquet"):
        target = folder / path.relative_to(saved.folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    pq.write_table(table, folder / f"{name}.parquet")
    return saved._replace(folder=folder)


@pytest.mark.slow
def test_facts_are_counted_from_the_rollouts(saved):
    found = sampling_facts(saved)
    assert found.temperature == 1.0
    assert found.max_new_tokens == 6
    assert found.groups_without_gradient == saved.results.counts.U_groups_without_gradient
    for name, facts in (("update", found.U), ("eval", found.E)):
        rows = pq.read_table(saved.folder / f"rollouts/{name}.parquet").to_pylist()
        lengths = [len(row["response_ids"]) for row in rows]
        assert facts.responses == len(rows)
        assert facts.tokens == sum(lengths)
        assert facts.length.mean == pytest.approx(statistics.fmean(lengths))
        assert facts.length.sd == pytest.approx(statistics.stdev(lengths))
        assert facts.length.quantiles[0] == min(lengths)
        assert facts.length.quantiles[3] == statistics.median(lengths)
        assert facts.length.quantiles[-1] == max(lengths)
        assert facts.ended == sum(row["finish_reason"] == "stop" for row in rows)
        assert facts.cut_off == sum(row["finish_reason"] == "length" for row in rows) > 0
        assert facts.ended + facts.cut_off + facts.unknown_end == facts.responses
        assert facts.prompts == len({row["prompt_index"] for row in rows})
    counts = saved.results.counts
    assert (found.U.responses, found.U.tokens) == (counts.U_sequences, counts.U_tokens)
    assert (found.E.responses, found.E.tokens) == (counts.E_sequences, counts.E_tokens)
    assert found.U.responses_of_prompt == (3, 3)
    assert found.U.reward is not None
    assert saved.results.mean_reward is not None
    assert found.U.reward.mean == pytest.approx(saved.results.mean_reward.value, rel=1e-12)
    assert found.E.advantage is None


def test_facts_of_rollouts_that_say_less(saved, tmp_path):
    """Rewards of some responses, a group of one reward, ends that are unknown."""
    rewards = [None, 1.0, 2.0, 3.0, 3.0, 3.0, *[0.5] * 2, None, 4.0, 5.0, 6.0]
    ends = [None] * 12
    prompts = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    other = changed(
        *(saved, tmp_path, "rollouts/update"), reward=rewards, finish_reason=ends, prompt_index=prompts
    )
    found = sampling_facts(other).U
    assert (found.ended, found.cut_off, found.unknown_end) == (0, 0, 12)
    assert found.one_reward == 1  # not the group with a response without one, nor a single response
    assert found.responses_of_prompt == (1, 3)
    assert found.reward is not None
    assert found.reward.known == 10
    assert found.reward.mean == pytest.approx(statistics.fmean(x for x in rewards if x is not None))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    other = changed(saved, nothing, "rollouts/update", reward=[None] * 12)
    assert sampling_facts(other).U.reward is None


@pytest.mark.parametrize("batch", ["U", "E"])
def test_prompts_are_sums_over_their_responses(saved, batch):
    frame = pd.read_parquet(saved.folder / "sequences.parquet").query("batch == @batch")
    by_prompt = frame.groupby("prompt_index")
    table = prompt_table(saved, batch)
    assert table is not None
    found = table.to_pandas().set_index("prompt_index")
    assert set(found.index) == set(frame["prompt_index"])
    assert list(found["share"].abs()) == sorted(found["share"].abs(), reverse=True)
    for name in ("share", "marginal", "direct", "score", "control"):
        if frame[name].isna().all():
            assert found[name].isna().all()
        else:
            assert found[name].sort_index().tolist() == pytest.approx(by_prompt[name].sum().tolist())
    assert found["tokens"].sort_index().tolist() == by_prompt["response_tokens"].sum().tolist()
    first = saved.results.first_order
    whole = first.from_update if batch == "U" else first.derivative
    assert found["share"].sum() == pytest.approx(whole.value, rel=1e-9)
    assert table.schema.field("share").metadata[b"unit"] == b"nats per token per unit of learning rate"


def test_prompts_have_the_numbers_of_results_json(saved):
    """Of the largest, and the intervals of those whose influence was asked for."""
    attribution, influence = saved.results.attribution, saved.results.influence
    assert attribution is not None
    assert influence is not None
    rows = {row["prompt_index"]: row for row in prompt_table(saved).to_pylist()}
    for prompt in attribution.U_prompts:
        row = rows[prompt.prompt_index]
        assert row["share"] == pytest.approx(prompt.share, rel=1e-9)
        assert row["marginal"] == pytest.approx(prompt.marginal, rel=1e-9)
        assert row["mean_reward"] == pytest.approx(prompt.mean_reward)
        assert (row["advantage_low"], row["advantage_high"]) == (
            *(prompt.advantage_low, prompt.advantage_high),
        )
    named = {prompt.prompt_index: prompt.share for prompt in influence.prompts}
    assert len(named) == 2
    for index, row in rows.items():
        if index in named:
            assert row["share_low"] == named[index].interval.low
            assert row["share_high"] == named[index].interval.high
            assert row["share_low"] < row["share"] < row["share_high"]
        else:
            assert row["share_low"] is row["share_high"] is row["share_se"] is None
    of_E = {row["prompt_index"]: row for row in prompt_table(saved, "E").to_pylist()}
    for prompt in attribution.E_prompts:
        assert of_E[prompt.prompt_index]["share_se"] == prompt.total.se


def test_scores_are_those_of_their_definitions(saved):
    """From the columns of tokens.parquet by the formulas, and rank correlations from ranks."""
    frame = pd.read_parquet(saved.folder / "tokens.parquet").query("batch == 'U'")
    found = proxy_table(saved)
    tokens = found.tokens.to_pandas()
    assert len(tokens) == len(frame) == saved.results.counts.U_tokens
    log_p, entropy, A = (frame[name].to_numpy() for name in ("logp", "entropy", "advantage"))
    p = np.exp(log_p)
    S = p * (entropy + log_p)
    expected = {
        "covariance": -(log_p - log_p.mean()) * (A - A.mean()),
        "own_logit": -A * p * (1 - p) * (log_p + entropy),
        "own_logit_ratio": -A * (1 - p) * (log_p + entropy),
        "discriminator": -A * (S - S.mean()),
        "surprisal": -A * (log_p + entropy),
    }
    share = frame["share"].to_numpy()
    for name, score in expected.items():
        assert tokens[name].to_numpy() == pytest.approx(score, rel=1e-12)
        ranks = np.corrcoef(rankdata(score), rankdata(share))[0, 1]
        assert found.spearman[name] == pytest.approx(ranks, rel=1e-9)
        assert found.same_sign[name] == pytest.approx(np.mean((score * share > 0)[score * share != 0]))
    assert {"quadrant", "marginal"} < set(found.spearman)
    assert tokens["share"].tolist() == share.tolist()


def test_tokens_that_the_loss_leaves_out_have_no_scores(saved, tmp_path):
    """Their advantages are not of the step, and would move the means."""
    lengths = [len(ids) for ids in saved.rollouts("update")["response_ids"].to_pylist()]
    masks = [[k != 1 for k in range(length)] for length in lengths]
    found = proxy_table(changed(saved, tmp_path, "rollouts/update", loss_mask=masks))
    kept = sum(map(sum, masks))
    assert found.tokens.num_rows == kept < sum(lengths)
    assert 1 not in found.tokens["position"].to_pylist()
    log_p = np.concatenate(list(_by_sequence(saved, "logp", masks)))
    A = np.concatenate(list(_by_sequence(saved, "advantage", masks)))
    expected = -(log_p - log_p.mean()) * (A - A.mean())
    assert found.tokens["covariance"].to_numpy() == pytest.approx(expected, rel=1e-12)


def _by_sequence(saved: SavedRun, name: str, masks: list[list[bool]]) -> list[np.ndarray]:
    frame = pd.read_parquet(saved.folder / "tokens.parquet").query("batch == 'U'")
    return [frame[frame["sequence"] == i][name].to_numpy()[mask] for i, mask in enumerate(masks)]


def test_without_tables_there_are_none(saved, tmp_path):
    """As of a run at the level "summary", or "off"; U of another machine is asked for by its name."""
    assert prompt_table(saved._replace(folder=tmp_path)) is None
    assert proxy_table(saved._replace(folder=tmp_path)) is None
    with pytest.raises(InputError, match=r"update.parquet is missing: copy the whole run folder"):
        sampling_facts(saved._replace(folder=tmp_path))
    (tmp_path / "tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"tokens.parquet cannot be read .*: repeat the run"):
        proxy_table(saved._replace(folder=tmp_path))


def test_a_U_that_was_not_passed_has_no_scores(saved, tmp_path):
    count = pq.read_table(saved.folder / "tokens.parquet").num_rows
    other = changed(saved, tmp_path, "tokens", logp=[None] * count, entropy=[None] * count)
    assert proxy_table(other) is None
