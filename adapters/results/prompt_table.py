"""Every prompt of a batch with its share, joined with the intervals that a run has computed."""

import math
from typing import TYPE_CHECKING, Any, Literal

from .prompt_texts import without_common

if TYPE_CHECKING:
    import pyarrow as pa

    from .attribution_sections import Share
    from .saved import SavedRun


def prompt_table(run: "SavedRun", batch: Literal["U", "E"] = "U") -> "pa.Table | None":
    """A row a prompt, largest |share| first; None where the run has no sequences.parquet.

    Columns: prompt_index, text (of the prompt, without the lines that all of them begin and end with),
    prompt (as given to the policy), responses, tokens, mean_reward, reward_low, reward_high,
    advantage_low, advantage_high, share, marginal, direct, score, control: sums over its responses, in
    the units of sequences.parquet; and share_se, share_low, share_high, the 95 % interval over E given
    U where the run has it: of U's prompts that `attribution.influence` names, of E's ten largest. What
    a batch does not have is null: marginal is of U, direct, score and control are of E.
    """
    import pyarrow as pa

    table = run.table("sequences")
    if table is None:
        return None
    fields = {field.name: field for field in table.schema}
    unit = fields["share"].metadata
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        if row["batch"] == batch:
            groups.setdefault(row["prompt_index"], []).append(row)
    texts = without_common({i: rows[0]["prompt"] or "" for i, rows in groups.items()})
    known = _shares(run, batch)
    records = [
        _record(i, texts[i], rows, known.get(i))
        for i, rows in sorted(groups.items(), key=lambda item: -abs(_total(item[1], "share") or 0.0))
    ]
    whole, number, text = pa.int64(), pa.float64(), pa.string()
    schema = pa.schema(
        [
            *(pa.field("prompt_index", whole), pa.field("text", text), pa.field("prompt", text)),
            *(pa.field("responses", whole), pa.field("tokens", whole)),
            *(pa.field(name, number) for name in ("mean_reward", "reward_low", "reward_high")),
            *(pa.field(name, number) for name in ("advantage_low", "advantage_high")),
            *(
                pa.field(name, number, metadata=unit)
                for name in (*SUMS, "share_se", "share_low", "share_high")
            ),
        ]
    )
    return pa.Table.from_pylist(records, schema=schema)


SUMS = ("share", "marginal", "direct", "score", "control")


def _shares(run: "SavedRun", batch: str) -> "dict[int, Share]":
    """Prompt index -> its share with the error, where the run has one."""
    results = run.results
    if batch == "U":
        return {p.prompt_index: p.share for p in results.influence.prompts} if results.influence else {}
    found = results.attribution
    return {p.prompt_index: p.total for p in found.E_prompts} if found else {}


def _record(index: int, text: str, rows: list[dict[str, Any]], share: "Share | None") -> dict[str, Any]:
    rewards, advantages = _known(rows, "reward"), _known(rows, "advantage")
    interval = share.interval if share else None
    return {
        "prompt_index": index,
        "text": text,
        "prompt": rows[0]["prompt"],
        "responses": len(rows),
        "tokens": sum(row["response_tokens"] for row in rows),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "reward_low": min(rewards, default=None),
        "reward_high": max(rewards, default=None),
        "advantage_low": min(advantages, default=None),
        "advantage_high": max(advantages, default=None),
        **{name: _total(rows, name) for name in SUMS},
        "share_se": share.se if share else None,
        "share_low": interval.low if interval else None,
        "share_high": interval.high if interval else None,
    }


def _known(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _total(rows: list[dict[str, Any]], name: str) -> float | None:
    known = _known(rows, name)
    return math.fsum(known) if known else None
