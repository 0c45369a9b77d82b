"""The cost of every stage of a run: seconds, passes over the batches, tokens, memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from funcprobe.policy.forward import Forward
from funcprobe.policy.rows import Rows
from funcprobe.types import Params

UNITS = {
    "seconds": "s, wall clock",
    "passes": "passes of the model over a batch, counted by sequences, so that a check on some of them "
    'is a fraction of one; "fresh": responses to the prompts of E, sampled at theta + eta v',
    "tokens": "tokens of these passes through the model's linear layers, padding included",
    "padding_share": "padding / tokens",
    "generation_tokens": "the same for sampling: prompts, then one token of every response at a time",
    "generation_padding_share": "padding before shorter prompts and after responses that ended earlier",
    "results_reused": "results read from runs/.stages; results_computed: those computed in this run",
    "process_peak_bytes": "bytes, peak memory of the process; process_peak_of: over which period",
    "device_peak_bytes": "bytes, peak memory of tensors on the GPU during the stage; null on a CPU",
}
GIB = 2**30


@dataclass
class Cost:
    """Cost of one stage, accumulated while it runs."""

    stage: str
    seconds: float = 0.0
    sequences: Counter[str] = field(default_factory=Counter)  # by batch, counted once per pass
    tokens: int = 0
    padding: int = 0  # of these tokens
    drawn: int = 0  # tokens of generation
    drawn_padding: int = 0
    computed: int = 0  # results computed in this run
    reused: int = 0  # results read from an earlier run
    process_peak: int = 0  # bytes
    peak_of_stage: bool = True  # else since the start of the process
    device_peak: int | None = None  # bytes


class Stage(NamedTuple):
    """A stage that is running."""

    cost: Cost
    advance: Callable[[int], None]  # advances the progress bar by this many sequences

    def drew(self, tokens: int, padding: int) -> None:
        """Count the tokens that went through the model to sample responses."""
        self.cost.drawn += tokens
        self.cost.drawn_padding += padding

    def found(self, reused: bool) -> None:
        """Count one result, computed in this run or reused from an earlier one."""
        self.cost.reused += reused
        self.cost.computed += not reused


def counted(forward: Forward, stage: Stage, batch: str) -> Forward:
    """The same forward, which counts each microbatch as a fraction of a pass over `batch`."""

    def hidden(params: Params, rows: Rows) -> torch.Tensor:
        out = forward.hidden(params, rows)
        sequences = len(rows.sequence_T.unique())
        stage.cost.sequences[batch] += sequences
        stage.cost.tokens += rows.tokens
        stage.cost.padding += rows.padding
        stage.advance(sequences)
        return out

    return forward._replace(hidden=hidden)


def document(costs: Iterable[Cost], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Section `cost` of results.json: units, stages in order, total; `sizes` are the batches' sizes.

    The only section that differs between two runs with the same seed.
    """
    costs = list(costs)
    highest = max(costs, key=lambda cost: (cost.device_peak or 0, cost.process_peak))
    whole = Cost(
        "total",
        seconds=sum(cost.seconds for cost in costs),
        sequences=sum((cost.sequences for cost in costs), Counter()),
        tokens=sum(cost.tokens for cost in costs),
        padding=sum(cost.padding for cost in costs),
        drawn=sum(cost.drawn for cost in costs),
        drawn_padding=sum(cost.drawn_padding for cost in costs),
        computed=sum(cost.computed for cost in costs),
        reused=sum(cost.reused for cost in costs),
        process_peak=max(cost.process_peak for cost in costs),
        peak_of_stage=all(cost.peak_of_stage for cost in costs),
        device_peak=highest.device_peak,
    )
    total = {key: value for key, value in _row(whole, sizes).items() if key != "stage"}
    return {
        "units": UNITS,
        "stages": [_row(cost, sizes) for cost in costs],
        "total": total | {"highest_peak": highest.stage},
    }


def summary(cost: dict[str, Any]) -> str:
    """The total of `document` in one line."""
    total = cost["total"]
    passes = [f"{count:.3g} over {batch}" for batch, count in total["passes"].items()]
    if passes:
        passes[0] = passes[0].replace(" ", " passes ", 1)
    peaks = [total["process_peak_bytes"], total["device_peak_bytes"]]
    shown = [f"{peak / GIB:.2g} GiB" for peak in peaks if peak is not None]
    parts = [
        f"{total['seconds']:.0f} s",
        *(passes or ["no pass"]),
        f"{_short(total['tokens'])} tokens",
        *([f"padding {total['padding_share']:.1%}"] if total["tokens"] else []),
        f"peak {' and, on the GPU, '.join(shown)} ({total['highest_peak']})",
    ]
    if total["results_reused"]:
        count = total["results_reused"] + total["results_computed"]
        parts.append(f"{total['results_reused']} of {count} results from earlier runs")
    return "cost: " + ", ".join(parts)


def _row(cost: Cost, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "stage": cost.stage,
        "seconds": round(cost.seconds, 3),
        "passes": {
            batch: round(count / sizes[batch], 3) for batch, count in sorted(cost.sequences.items())
        },
        "tokens": cost.tokens,
        "padding_share": cost.padding / cost.tokens if cost.tokens else None,
        "generation_tokens": cost.drawn,
        "generation_padding_share": cost.drawn_padding / cost.drawn if cost.drawn else None,
        "results_computed": cost.computed,
        "results_reused": cost.reused,
        "process_peak_bytes": cost.process_peak,
        "process_peak_of": "the stage" if cost.peak_of_stage else "the process since its start",
        "device_peak_bytes": cost.device_peak,
    }


def _short(count: int) -> str:
    """1234567 -> 1.2 M."""
    for size, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
