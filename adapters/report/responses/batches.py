"""The responses of U or of E with the numbers of their tokens, from a run's tables."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ...results.prompt_texts import shortened, without_common
from ...results.saved import SavedRun

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]

# Columns of tokens.parquet that are shown of a token, beside its text.
OF_U = ("share", "marginal", "logp", "entropy", "coef_logp", "coef_entropy")
OF_E = ("share", "direct", "score", "control", "logp", "entropy")
SHARES = ("share", "marginal", "direct", "score", "control")  # per unit of learning rate


class Response(NamedTuple):
    """A row of sequences.parquet, with its tokens."""

    sequence: int
    prompt_index: int
    prompt: str
    label: str
    """The prompt, shortened."""
    reward: float | None
    advantage: float | None
    share: float | None
    """In the unit of its batch."""
    marginal: float | None
    tokens: tuple[str, ...]
    """Their texts; one text, the whole response, where the run has no shares of tokens."""
    special: tuple[bool, ...]
    length: int
    """Tokens."""
    start: int
    """Its first row in the columns of its batch."""


class ResponsesOf(NamedTuple):
    """The responses of a batch, the largest by |share| first."""

    name: str
    responses: tuple[Response, ...]
    columns: dict[str, Floats]
    """Of the tokens in the order of their file; shares in nats at `eta`. Empty: the run has none."""
    eta: float | None
    """The next learning rate; null: not known, and shares are per unit of learning rate."""


def responses_of(run: SavedRun, name: str) -> ResponsesOf:
    """Batch `name`, "U" or "E"; without responses where the run has no shares at all."""
    eta = run.results.next_lr.value or None
    table = run.table("sequences")
    if table is None:
        return ResponsesOf(name, (), {}, eta)
    sequences = _of(table, name)
    columns, texts, special = _tokens(run, name, eta or 1.0)
    rows = {key: sequences[key].to_pylist() for key in sequences.column_names}
    lengths: list[int] = rows["response_tokens"]
    starts = np.cumsum([0, *lengths]).tolist()
    if columns and starts[-1] != len(texts):
        columns = {}  # of another run than sequences.parquet
    prompts = [prompt or "" for prompt in rows["prompt"]]
    labels = without_common(dict(zip(rows["prompt_index"], prompts, strict=True)))
    found = []
    for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        of_tokens = slice(start, start + length)
        found.append(
            Response(
                sequence=rows["sequence"][i],
                prompt_index=rows["prompt_index"][i],
                prompt=prompts[i],
                label=shortened(labels[rows["prompt_index"][i]]),
                reward=rows["reward"][i],
                advantage=rows["advantage"][i],
                share=_at(rows["share"][i], eta),
                marginal=_at(rows["marginal"][i], eta),
                tokens=tuple(texts[of_tokens]) if columns else (rows["response"][i] or "",),
                special=tuple(special[of_tokens]) if columns else (False,),
                length=length,
                start=start,
            )
        )
    found.sort(key=lambda response: -abs(response.share or 0.0))
    return ResponsesOf(name, tuple(found), columns, eta)


def _tokens(run: SavedRun, name: str, eta: float) -> tuple[dict[str, Floats], list[str], list[bool]]:
    table = run.table("tokens")
    if table is None:
        return {}, [], []
    tokens = _of(table, name)
    columns = {}
    for column in OF_U if name == "U" else OF_E:
        values = np.asarray(tokens[column].to_numpy(zero_copy_only=False), dtype=np.float64)
        columns[column] = values * eta if column in SHARES else values
    # Runs of earlier versions have no column for the text that a token completes.
    texts = tokens["text" if "text" in tokens.column_names else "token"].to_pylist()
    if "special" in tokens.column_names:
        return columns, texts, tokens["special"].to_pylist()
    return columns, texts, [False] * len(texts)


def _of(table: "pa.Table", name: str) -> "pa.Table":
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["batch"], name))


def _at(share: float | None, eta: float | None) -> float | None:
    return None if share is None else share * (eta or 1.0)
