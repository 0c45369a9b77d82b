"""The cost of a run in results.json: seconds, passes, tokens, memory of every stage."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..machine.cost import Cost
from .quantity import Section

GIB = 2**30


class Entries(Section):
    """What a stage took, or the stages together."""

    seconds: float
    """s, wall clock"""
    passes: dict[str, float]
    """Passes over each batch: sequences seen by the model / sequences of the batch, so that a check
    on some of them counts as a part of one. "fresh": responses sampled at theta + eta v."""
    tokens: int
    """Tokens of these passes through the model's linear layers, padding included"""
    padding_share: float | None
    """Padding / tokens"""
    generation_tokens: int
    """Tokens through the linear layers while sampling: prompts, then one per response and step"""
    generation_padding_share: float | None
    """Of generation_tokens: padding of prompts, and of responses that ended before others"""
    results_computed: int
    """Results of stages that were computed"""
    results_reused: int
    """Results of stages that were taken from runs/.stages"""
    process_peak_bytes: int
    """Bytes, peak memory of the process; process_peak_of states over which time"""
    process_peak_of: str
    """"the stage", or "the process since its start" where the system cannot reset the peak"""
    device_peak_bytes: int | None
    """Bytes, peak memory of tensors on the GPU during the stage; null on a CPU"""


class StageCost(Entries):
    """What one stage took."""

    stage: str
    """Name of the stage, as it is shown while it runs."""


class TotalCost(Entries):
    """What the stages took together: sums, and the highest peaks."""

    highest_peak: str
    """The stage with the highest peak"""


class CostSection(Section):
    """What the run took. Of two runs of one seed on one machine it alone differs."""

    units: dict[str, str]
    """Unit and meaning of every entry."""
    stages: tuple[StageCost, ...]
    """In the order in which they began."""
    total: TotalCost
    """Sums over the stages, and the highest peaks."""


def cost_section(costs: Iterable[Cost], sizes: Mapping[str, int]) -> CostSection:
    """Every stage in its order, and the whole; `sizes`: sequences of each batch."""
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
    return CostSection(
        units={
            name: " ".join((field.description or "").split())
            for name, field in TotalCost.model_fields.items()
        },
        stages=tuple(StageCost(stage=cost.stage, **_entries(cost, sizes)) for cost in costs),
        total=TotalCost(highest_peak=highest.stage, **_entries(whole, sizes)),
    )


def cost_line(cost: CostSection) -> str:
    """The whole run's cost in one line."""
    total = cost.total
    passes = [f"{count:.3g} over {batch}" for batch, count in total.passes.items()]
    if passes:
        passes[0] = passes[0].replace(" ", " passes ", 1)
    peaks = [total.process_peak_bytes, total.device_peak_bytes]
    gib = [f"{peak / GIB:.2g} GiB" for peak in peaks if peak is not None]
    parts = [
        f"{total.seconds:.0f} s",
        *(passes or ["no pass"]),
        f"{_short(total.tokens)} tokens",
        *([f"padding {total.padding_share:.1%}"] if total.padding_share is not None else []),
        f"peak memory {' and, on the GPU, '.join(gib)} ({total.highest_peak})",
    ]
    if total.results_reused:
        count = total.results_reused + total.results_computed
        parts.append(f"{total.results_reused} of {count} results from earlier runs")
    return "cost: " + ", ".join(parts)


def _entries(cost: Cost, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
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
