"""How the responses of a run came out: lengths, cut off or ended, rewards."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

    from .saved import SavedRun

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Spread(NamedTuple):
    """Of one number a response."""

    known: int  # responses that have it
    mean: float
    sd: float | None  # of a sample, n - 1; None: of a single one
    quantiles: tuple[float, ...]  # at QUANTILES, interpolated


class BatchFacts(NamedTuple):
    """Of U or E, from its file of rollouts."""

    prompts: int
    responses: int
    responses_of_prompt: tuple[int, int]  # fewest and most
    tokens: int  # of responses, first end of sequence included
    length: Spread  # tokens
    ended: int  # with an end of sequence
    cut_off: int  # at the longest length allowed
    unknown_end: int  # of supplied rollouts that do not say
    reward: Spread | None  # None: no response has one
    one_reward: int  # prompts of several responses, all with the same reward
    advantage: Spread | None


class SamplingFacts(NamedTuple):
    """Of both batches."""

    U: BatchFacts
    E: BatchFacts
    temperature: float
    max_new_tokens: int | None  # None: neither batch was sampled by the run
    groups_without_gradient: int  # of U, as results.json has it


def sampling_facts(run: "SavedRun") -> SamplingFacts:
    """Counted from rollouts/*.parquet, which hold U and E as they entered the run.

    Raises InputError for a run folder without these files.
    """
    settings = run.settings()
    supplied, sampling = settings.get("rollouts", {}), settings.get("sampling", {})
    sampled = not (supplied.get("update") and supplied.get("eval"))
    return SamplingFacts(
        U=_facts(run.rollouts("update")),
        E=_facts(run.rollouts("eval")),
        temperature=run.results.conventions.temperature,
        max_new_tokens=sampling.get("max_new_tokens") if sampled else None,
        groups_without_gradient=run.results.counts.U_groups_without_gradient,
    )


def _facts(table: "pa.Table") -> BatchFacts:
    import pyarrow.compute as pc

    length, prompts = pc.list_value_length(table["response_ids"]), table["prompt_index"]
    sizes = pc.value_counts(prompts.combine_chunks()).field("counts").to_pylist()
    reasons = table["finish_reason"].to_pylist()
    by_prompt: dict[int, list[float | None]] = {}
    for prompt, reward in zip(prompts.to_pylist(), table["reward"].to_pylist(), strict=True):
        by_prompt.setdefault(prompt, []).append(reward)
    return BatchFacts(
        prompts=len(sizes),
        responses=table.num_rows,
        responses_of_prompt=(min(sizes), max(sizes)),
        tokens=pc.sum(length).as_py(),
        length=_required(_spread(length)),
        ended=reasons.count("stop"),
        cut_off=reasons.count("length"),
        unknown_end=reasons.count(None),
        reward=_spread(table["reward"]),
        one_reward=sum(len(x) > 1 and None not in x and len(set(x)) == 1 for x in by_prompt.values()),
        advantage=_spread(table["advantage"]),
    )


def _required(spread: Spread | None) -> Spread:
    assert spread is not None  # every response has a length, and a batch at least one response
    return spread


def _spread(column: "pa.ChunkedArray") -> Spread | None:
    import pyarrow.compute as pc

    known = pc.drop_null(column)
    if not len(known):
        return None
    return Spread(
        known=len(known),
        mean=pc.mean(known).as_py(),
        sd=pc.stddev(known, ddof=1).as_py() if len(known) > 1 else None,
        quantiles=tuple(pc.quantile(known, q=list(QUANTILES)).to_pylist()),
    )
