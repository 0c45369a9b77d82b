"""Requirements on rows of rollouts beyond their types; the first row that fails is named."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from funcprobe.types import InputError

from . import whole
from .columns import COUNTED
from .files import Columns


def check_tokens(file: Columns, columns: dict[str, Sequence[Any]], vocabulary: int) -> None:
    """InputError for zero tokens, an id outside the vocabulary, an index with two prompts."""
    if whole.tokens_are_right(columns, vocabulary):
        return
    prompts: dict[int, list[int]] = {}
    for place, index, x, y in zip(
        file.place,
        columns["prompt_index"],
        columns["prompt_ids"],
        columns["response_ids"],
        strict=True,
    ):
        if not x or not y:
            part = "response" if x else "prompt"
            raise InputError(
                f"{file.path}: {place} has a {part} of zero tokens: at least one is needed"
            )
        if not all(0 <= token < vocabulary for token in (*x, *y)):
            raise InputError(
                f"{file.path}: {place} has a token id outside the model's {vocabulary}: these rollouts "
                "were sampled with another tokenizer"
            )
        if prompts.setdefault(index, x) != x:
            raise InputError(
                f"{file.path}: {place} has another prompt than the rows before it with prompt_index "
                f"{index}"
            )


def check_ends(
    file: Columns, columns: dict[str, Sequence[Any]], eos_ids: Collection[int], *, masked: bool
) -> None:
    """InputError if a response's end contradicts finish_reason, or tokens follow its first EOS.

    With `masked` a token that is not in loss_mask may follow: output of a tool, after which the policy
    goes on. Without `eos_ids` only the values of finish_reason are checked.
    """
    if whole.ends_are_right(columns, eos_ids, masked=masked):
        return
    masks = columns["loss_mask"] if masked else [None] * len(file.place)
    for place, y, reason, mask in zip(
        file.place, columns["response_ids"], columns["finish_reason"], masks, strict=True
    ):
        if reason not in {None, "stop", "length"}:
            raise InputError(
                f"{file.path}: {place} has finish_reason {reason!r}, stop, length or null is expected"
            )
        own = mask or [True] * len(y)
        if any(token in eos_ids and after for token, after in zip(y, own[1:], strict=False)):
            raise InputError(
                f"{file.path}: {place} has tokens after its first end-of-sequence token (padding?): "
                "cut response_ids after it"
            )
        ended = y[-1] in eos_ids
        # Else the log-probability of the response has one token too few or too many.
        if eos_ids and reason == "stop" and not ended:
            raise InputError(
                f"{file.path}: {place} has finish_reason stop but no end-of-sequence token at its end "
                f"({', '.join(map(str, eos_ids))}): append the one that was sampled, or, if a stop "
                "string ended it, set finish_reason to null"
            )
        if eos_ids and reason == "length" and ended:
            raise InputError(
                f"{file.path}: {place} has finish_reason length but ends in an end-of-sequence token: "
                "remove it if it is padding; if it was sampled, set finish_reason to stop"
            )


def check_temperature(file: Columns, values: Sequence[float]) -> None:
    """InputError unless all are the same positive number."""
    found = sorted(set(values))
    if len(found) > 1 or not 0 < found[0] < math.inf:
        shown = ", ".join(f"{t:.9g}" for t in found)
        raise InputError(f"{file.path} has temperature {shown}: one positive number is expected")


def check_of_tokens(
    file: Columns, name: str, columns: dict[str, Sequence[Any]], *, unknown: bool = False
) -> None:
    """InputError unless every response token has one value, if the column exists.

    Of log-probabilities: a finite one, at most 0, or with `unknown`, NaN.
    """
    if columns[name][0] is None or whole.values_are_right(columns, name, unknown=unknown):
        return
    for place, row, y in zip(file.place, columns[name], columns["response_ids"], strict=True):
        if len(row) != len(y):
            raise InputError(
                f"{file.path}: {place} has {len(row)} {name} for {len(y)} response tokens: one for "
                "each is expected"
            )
        # In half precision the 0 of a certain token may be rounded to slightly above it.
        if name != "loss_mask" and not all(
            -math.inf < logp < 0.01 or (unknown and math.isnan(logp)) for logp in row
        ):
            raise InputError(
                f"{file.path}: {place} has {name} that is not a log-probability: finite numbers, at "
                f"most 0, are expected (nats){', or NaN where it is unknown' if unknown else ''}"
            )


def check_counts(file: Columns, columns: dict[str, Sequence[Any]]) -> None:
    """InputError for a micro-batch or a process of negative number."""
    for name in COUNTED:
        for place, value in zip(file.place, columns[name], strict=True):
            if value is not None and value < 0:
                raise InputError(f"{file.path}: {place} has {name} {value}: they count from 0")


def check_generations(file: Columns, columns: dict[str, Sequence[Any]]) -> None:
    """InputError unless all rows of a micro-batch have the same finite number of tokens, at least 0."""
    first: dict[int | None, float] = {}
    for place, value, microbatch in zip(
        file.place, columns["generated_tokens"], columns["microbatch"], strict=True
    ):
        if value is None:
            continue
        if value != first.setdefault(microbatch, value) or not 0 <= value < math.inf:
            raise InputError(
                f"{file.path}: {place} has generated_tokens {value:g}, the first row of its micro-"
                f"batch {first[microbatch]:g}: one finite number, at least 0, is expected for a "
                "micro-batch, which is of one generation"
            )


def check_entropy_coef(file: Columns, values: Sequence[float | None]) -> None:
    """InputError unless all rows have the same finite number, if any."""
    for place, value in zip(file.place, values, strict=True):
        if value is not None and (value != values[0] or not math.isfinite(value)):
            raise InputError(
                f"{file.path}: {place} has entropy_coef {value:g}, the first row {values[0]:g}: one "
                "finite number is expected in all rows"
            )


def check_step(file: Columns, values: Sequence[int | None]) -> None:
    """InputError unless all rows are of one optimizer step, or none has one."""
    for place, step in zip(file.place, values, strict=True):
        if step != values[0] or (step is not None and step < 1):
            raise InputError(
                f"{file.path}: {place} has step {step}, the first row {values[0]}: rollouts of one "
                "optimizer step, counted from 1, are expected; keep the rows of one, or drop the column"
            )
