"""The sections of the responses as their template shows them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from ...results.saved import SavedRun
from . import colours
from .batches import Response, ResponsesOf
from .marks import mark, mark_text
from .packing import pack, three_digits

SHOWN = 20  # responses of a batch before the rest, which a click opens
MOST_TOKENS = 600_000  # of a batch in a page, some 15 MB; the rest is in the tables alone
LONGEST_PROMPT = 4000  # characters; of a longer one the beginning and the end
LINE = 85  # characters of a line in a wide window, from which a height is guessed


class Article(NamedTuple):
    """A response."""

    id: str
    height: str
    """Class: about how high it will be, while it has not been rendered."""
    sequence: int
    prompt_index: int
    label: str
    facts: tuple[str, ...]
    prompt: Markup | None
    """In full; null: it is short, or stands in another article."""
    prompt_at: str | None
    """The id where it stands."""
    text: Markup


class Legend(NamedTuple):
    """The scale of the colours."""

    names: tuple[str, ...]
    ticks: tuple[str, ...]
    caption: str
    description: str


class Section(NamedTuple):
    """The responses of U or of E."""

    name: str
    title: str
    words: tuple[str, ...]
    legend: Legend | None
    articles: tuple[Article, ...]
    shown: int
    data: dict[str, Any]
    """For the script."""


def section(run: SavedRun, batch: ResponsesOf) -> Section:
    """Articles by |share|, their legend and words, and the numbers of their tokens."""
    unit = unit_of(run, batch)
    kept = _kept(batch)
    scale = colours.scale(batch.columns["share"]) if batch.columns else colours.Scale(0.0, 0.0)
    levels = colours.levels(batch.columns["share"], scale) if batch.columns else []
    articles, units = [], list[int]()
    stands: dict[int, str] = {}
    for one in kept:
        of_token = levels[one.start : one.start + one.length] if batch.columns else [""]
        marked = mark(one.tokens, one.special, of_token)
        units += marked.units
        articles.append(_article(batch.name, one, marked.html, stands))
    return Section(
        batch.name,
        TITLES[batch.name],
        (*_words(run, batch, unit), *_left_out(batch, kept)),
        _legend(scale, unit) if batch.columns else None,
        tuple(articles),
        SHOWN,
        _data(batch, kept, units, unit),
    )


TITLES = {
    "U": "Responses of U: the tokens that make this batch’s part",
    "E": "Responses of E: the tokens where the entropy changes",
}


def unit_of(run: SavedRun, batch: ResponsesOf) -> str:
    """Of every share here."""
    if batch.eta is None:
        return f"{run.results.entropy.unit} per unit of learning rate"
    return f"{run.results.entropy.unit} at learning rate {plain(batch.eta)}"


def number(value: float) -> str:
    """Three significant digits, signed: +1.23e-05."""
    return f"{value:+.2e}".replace("-", "\N{MINUS SIGN}")


def plain(value: float) -> str:
    """At most three significant digits: 0.376."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """Three significant digits, signed: +0.376."""
    return f"{value:+#.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _kept(batch: ResponsesOf) -> list[Response]:
    """The largest by |share|, as far as a page holds them."""
    kept, tokens = list[Response](), 0
    for one in batch.responses:
        tokens += one.length
        if kept and tokens > MOST_TOKENS:
            break
        kept.append(one)
    return kept


def _article(name: str, one: Response, text: Markup, stands: dict[int, str]) -> Article:
    identity = f"{name}-{one.sequence}"
    whole = one.label == repr(one.prompt) and "\\" not in one.label
    at = stands.setdefault(one.prompt_index, f"{identity}-prompt")
    here = at == f"{identity}-prompt"
    return Article(
        identity,
        _height(one),
        one.sequence,
        one.prompt_index,
        one.label,
        tuple(_facts(one)),
        _in_full(one.prompt) if here and not whole else None,
        None if here or whole else at,
        text,
    )


def _in_full(prompt: str) -> Markup:
    """With its middle left out where it is very long."""
    if len(prompt) <= LONGEST_PROMPT:
        return mark_text(prompt)
    half = LONGEST_PROMPT // 2
    left_out = f"{len(prompt) - 2 * half:,} characters: sequences.parquet has them"
    return Markup("{}<m-c>{}</m-c>{}").format(
        mark_text(prompt[:half]), left_out, mark_text(prompt[-half:])
    )


def _facts(one: Response) -> Iterator[str]:
    if one.share is not None:
        yield f"share {number(one.share)}"
    if one.marginal is not None:
        yield f"marginal {number(one.marginal)}"
    if one.reward is not None:
        yield f"reward {plain(one.reward)}"
    if one.advantage is not None:
        yield f"advantage {signed(one.advantage)}"
    yield f"{one.length:,} token{'' if one.length == 1 else 's'}"


def _height(one: Response) -> str:
    text = "".join(one.tokens)
    lines = max(len(text) / LINE + text.count("\n"), 1)
    return f"h{min(int(np.ceil(np.log2(lines))), 9)}"


def _words(run: SavedRun, batch: ResponsesOf, unit: str) -> Iterator[str]:
    attribution = run.results.attribution
    if not batch.responses or attribution is None:
        yield (
            'The run has no shares of its responses: attribution.level = "tokens" in its '
            "configuration gives them."
        )
        return
    times = batch.eta or 1.0
    if batch.name == "U":
        part = attribution.update.share
        yield (
            "A token’s share is what its gradient adds to the entropy through this batch’s part of the "
            f"step. The part of the whole batch is {number(part * times)} {unit}. A marginal answers "
            "for Adam’s second moment and the clip, too."
        )
    else:
        part = attribution.whole.share
        yield (
            "A token’s share is what the step changes of the entropy there: directly, of the token’s "
            "own distribution; by the score, as the token becomes more or less probable and with it "
            "the entropy after it; and by the control variate of the score. Over all of E they make "
            f"{number(part * times)} {unit}."
        )
    if not batch.columns:
        yield (
            'The run has shares of responses, none of tokens: attribution.level = "tokens" in its '
            "configuration gives them."
        )


def _left_out(batch: ResponsesOf, kept: list[Response]) -> Iterator[str]:
    if len(kept) < len(batch.responses):
        yield (
            f"Here are {len(kept):,} of {len(batch.responses):,} responses, the largest by |share|: a "
            f"page holds {MOST_TOKENS:,} tokens of a batch. tokens.parquet and sequences.parquet of "
            "the run have all."
        )


def _legend(scale: colours.Scale, unit: str) -> Legend | None:
    if not scale.full:
        return None
    ticks = [number(fraction * scale.full) for fraction in (-1, -0.5, 0.5, 1)]
    low, half_low, half_high, high = ticks
    beyond = f"; {100 * scale.beyond:.1f} % of the tokens have a larger one" if scale.beyond else ""
    caption = (
        f"Share of a token, {unit}. Orange: the entropy falls by it; blue: it rises (printed: dotted "
        f"and full lines). The colour is in proportion up to {high.lstrip('+')}{beyond}. Without "
        f"colour: less than {number(0.5 * scale.full / colours.LEVELS).lstrip('+')}."
    )
    described = f"Scale of colours from {low}, orange, over 0, the page’s colour, to {high}, blue."
    return Legend(colours.NAMES, (low, half_low, "0", half_high, high), caption, described)


LABELS = {
    "share": "share",
    "marginal": "marginal",
    "direct": "direct term",
    "score": "score term",
    "control": "control variate",
    "logp": "log-probability l",
    "entropy": "entropy h",
    "coef_logp": "coefficient c of l in J",
    "coef_entropy": "coefficient d of h in J",
}
UNITS = {"logp": "nats", "entropy": "nats", "coef_logp": "per nat", "coef_entropy": "per nat"}


def _data(batch: ResponsesOf, kept: list[Response], units: list[int], unit: str) -> dict[str, Any]:
    prompts = {one.prompt_index: one.label for one in kept}
    data: dict[str, Any] = {
        "responses": [
            [one.sequence, one.prompt_index, one.share, one.advantage, one.length] for one in kept
        ],
        "prompts": sorted(prompts.items()),
        "shown": SHOWN,
    }
    if batch.columns and kept:
        rows = np.concatenate([np.arange(one.start, one.start + one.length) for one in kept])
        columns = {name: values[rows] for name, values in batch.columns.items()}
        if batch.name == "U" and not np.nan_to_num(columns["coef_entropy"]).any():
            del columns["coef_entropy"]
        shown = {name: [LABELS[name], UNITS.get(name, unit)] for name in columns}
        data |= {"labels": shown, **pack({n: three_digits(v) for n, v in columns.items()}, units)}
    return data
