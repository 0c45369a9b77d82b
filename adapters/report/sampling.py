"""The batches in the section of trust: sizes, lengths, rewards, norms, what the numbers rest on."""

from markupsafe import Markup

from funcprobe.types import InputError

from ..results.sampling_facts import BatchFacts, sampling_facts
from ..results.saved import SavedRun
from ..results.schema import Results
from . import numbers
from .table import Cell, Column, Fact, Row, Table, table


def sampling(run: SavedRun) -> tuple[Table, str]:
    """Both batches; and a sentence where their rollouts are gone."""
    columns = [
        Column("Batch", text=True),
        *map(Column, ("Prompts", "Responses", "Tokens")),
        Column("Length", "median (5 to 95 %)"),
        Column("Longest", "tokens"),
        Column("Cut off", "at the limit"),
        Column("Reward", "mean"),
    ]
    counts = run.results.counts
    E = (counts.E_prompts, counts.E_sequences, counts.E_tokens)
    U = (counts.U_prompts, counts.U_sequences, counts.U_tokens)
    missing, facts_E, facts_U = "", None, None
    try:
        found = sampling_facts(run)
        facts_E, facts_U = found.E, found.U
    except InputError as error:
        missing = f"Lengths and rewards are not known: {error}."
    rows: list[list[Cell]] = [
        ["E, evaluation", *map(numbers.count, E), *_responses(facts_E)],
        ["U, update", *map(numbers.count, U), *_responses(facts_U)],
    ]
    shown = Table(
        "The two batches. Tokens include the first end of sequence; a response is cut off if it "
        "reached the length limit without one.",
        columns,
        [Row(cells) for cells in rows],
        "Table: batches",
    )
    return shown, missing


def _responses(found: BatchFacts | None) -> list[Cell]:
    if found is None:
        return [None] * 4
    _, low, _, median, _, high, most = found.length.quantiles
    return [
        Markup("{} ({} to {})").format(*(numbers.setting(x) for x in (median, low, high))),
        numbers.count(most),
        Markup("{} of {}").format(*map(numbers.count, (found.cut_off, found.responses))),
        numbers.number(found.reward.mean) if found.reward else None,
    ]


def batches(results: Results) -> list[Fact]:
    """What E, U, the objective and the estimator were, in the order of the page."""
    counts = results.counts
    found: list[Fact] = [
        (
            "Groups of U without gradient",
            Markup("{} of {}: every response has the same reward, and so no advantage").format(
                numbers.count(counts.U_groups_without_gradient), numbers.count(counts.U_prompts)
            ),
        ),
        ("Temperature", numbers.setting(results.conventions.temperature)),
        ("Trainable parameters", numbers.count(counts.trainable_parameters)),
        (
            "Gradient norms",
            Markup("X {}, Y {}, v {}; clip coefficient {}").format(
                *(numbers.number(n.value) for n in (results.norms.X, results.norms.Y, results.norms.v)),
                numbers.setting(results.clip_coefficient),
            ),
        ),
        ("Objective", _objective(results)),
        ("Entropy", _entropy(results)),
        ("Standard errors", results.conventions.se),
        ("Intervals", results.conventions.interval),
    ]
    found += [("Not the step of the run", line) for line in results.unlike_the_run]
    return found


def _objective(results: Results) -> str:
    one, step = results.conventions.objective, results.conventions.step
    clip = "no clipping" if step.max_grad_norm is None else f"max_grad_norm {step.max_grad_norm:g}"
    return f"advantage {one.advantage}, normalisation {one.normalisation}; step {step.rule}, {clip}"


def _entropy(results: Results) -> str:
    one = results.conventions.entropy
    clip = "no clip" if one.clip is None else f"clipped at {one.clip:g}"
    return (
        f"per {one.per}, integrand {one.integrand}, importance weights {one.weights} ({clip}), "
        f"baseline {one.baseline}"
    )


def loss(results: Results) -> Table | None:
    """What the trainer logs of the loss; None for a preset, whose loss says nothing more."""
    found = results.loss
    if found is None or found.name == "preset":
        return None
    rows: list[list[Cell]] = [["loss", numbers.number(found.at_theta.value, 6)]]
    rows += [[name, numbers.number(x, 6)] for name, x in found.metrics.items() if name != "loss"]
    return table(
        "Table: loss of U",
        f"Loss of U at θ, {found.name}, and what its trainer logs beside it.",
        ["Metric", Column("Value")],
        rows,
    )
