"""The columns of the tables of a run, and what is required of a file of them before it is drawn."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from funcprobe.types import InputError

from ..rollouts.columns import SCHEMA
from .reading import LARGEST


class Column(NamedTuple):
    """Type, unit and meaning of a column."""

    type: pa.DataType
    unit: str
    about: str


INT, FLOAT, TEXT, BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
RATE = "entropy per unit of learning rate"
OF_BATCH = {
    "batch": Column(TEXT, "", "U or E"),
    "sequence": Column(INT, "", "row in rollouts/update.parquet or rollouts/eval.parquet, from 0"),
    "prompt_index": Column(INT, "", "of the prompt, in the same file"),
}
OF_U = "of U; null for E"
OF_E = "of E; null for U"
SHARES = {
    "share": Column(FLOAT, RATE, "of the derivative along v; U: of the part of this batch"),
    "marginal": Column(FLOAT, RATE, f"derivative of the prediction in its weight in J; {OF_U}"),
    "direct": Column(FLOAT, RATE, f"by the entropy of the tokens' own distributions; {OF_E}"),
    "score": Column(FLOAT, RATE, f"by the tokens' probability; {OF_E}"),
    "control": Column(FLOAT, RATE, f"by the baseline's control variate of the score; {OF_E}"),
}
MODULES = {
    "tensor": Column(TEXT, "", "trainable tensor, by its name"),
    "module": Column(TEXT, "", "that holds it"),
    "layer": Column(TEXT, "", "up to the first number of the name; else the module"),
    "projection": Column(TEXT, "", "last part of the module's name"),
    "factor": Column(TEXT, "", "A or B of LoRA; else the kind of tensor"),
    "parameters": Column(INT, "", "entries of the tensor"),
    "momentum": Column(FLOAT, RATE, "of Adam's first moment"),
    "decay": Column(FLOAT, RATE, "of weight decay"),
    "update": Column(FLOAT, RATE, "of this batch's gradient"),
    "share": Column(FLOAT, RATE, "of the derivative along v: the sum of the three"),
    "momentum_se": Column(FLOAT, RATE, "standard error over E, U given"),
    "decay_se": Column(FLOAT, RATE, "standard error over E, U given"),
    "update_se": Column(FLOAT, RATE, "standard error over E, U given"),
    "share_se": Column(FLOAT, RATE, "standard error over E, U given"),
    "share_low": Column(FLOAT, RATE, "lower bound of the 95 % interval of share"),
    "share_high": Column(FLOAT, RATE, "upper bound of the 95 % interval of share"),
}
SEQUENCES = {
    **OF_BATCH,
    "prompt": Column(TEXT, "", "as given to the policy"),
    "response": Column(TEXT, "", "without special tokens"),
    "response_tokens": Column(INT, "tokens", "first end of sequence included"),
    "entropy": Column(FLOAT, "nats", "sum over its tokens, at theta; null: U was not passed"),
    "reward": Column(FLOAT, "reward", f"{OF_U}, and where it has none"),
    "advantage": Column(FLOAT, "advantage", OF_U),
    **SHARES,
    "influence": Column(FLOAT, RATE, f"influence value on the derivative; {OF_E}"),
}
TOKENS = {
    **OF_BATCH,
    "position": Column(INT, "", "in the response, from 0"),
    "token_id": Column(INT, "", "of the vocabulary"),
    "token": Column(TEXT, "", "decoded alone; exact, so that it may hold anything"),
    "text": Column(TEXT, "", "that the token completes: those of a response join to its whole text"),
    "special": Column(BOOL, "", "whether it is a special token of the tokenizer"),
    "logp": Column(FLOAT, "nats", "log-probability at theta; null: U was not passed"),
    "entropy": Column(FLOAT, "nats", "of the next-token distribution at theta; null: U was not passed"),
    "advantage": Column(FLOAT, "advantage", f"of the response; {OF_U}"),
    "coef_logp": Column(FLOAT, "objective per nat", f"c, coefficient of logp in J; {OF_U}"),
    "coef_entropy": Column(FLOAT, "objective per nat", f"d, coefficient of entropy in J; {OF_U}"),
    **SHARES,
}
FILES = {"modules.parquet": MODULES, "sequences.parquet": SEQUENCES, "tokens.parquet": TOKENS}

# What files of earlier versions lack.
LATER = {"text", "special", "entropy", "influence"}
OF_ROLLOUTS = ("prompt_index", "response_ids", "finish_reason", "reward", "advantage")
NEVER_NULL = {*OF_BATCH, "response_tokens", "token", "text", "special", "response_ids"} | MODULES.keys()
LONGEST = 2**40  # tokens of a response
ENDS = {"stop", "length", None}


def require_table(table: pa.Table, name: str, path: Path) -> None:
    """InputError unless modules, sequences or tokens of a file are as a run writes them."""
    columns = FILES[f"{name}.parquet"]
    types = {each: column.type for each, column in columns.items()}
    _require_columns(table, types, types.keys() - LATER, path)
    for each in types.keys() & set(table.column_names):
        found = pc.min_max(table[each]) if types[each] in (FLOAT, INT) and each != "logp" else None
        most = LARGEST if types[each] == FLOAT else LONGEST if each == "response_tokens" else 2**63
        least = 0 if each == "response_tokens" else -most
        for value in found.as_py().values() if found is not None else ():
            if value is not None and not least <= value <= most:
                raise InputError(f"{path}: {each} is {value:g}, which no run writes; repeat the run")


def require_rollouts(table: pa.Table, path: Path) -> None:
    """InputError unless rollouts of a run folder are as a run writes them."""
    _require_columns(table, {field.name: field.type for field in SCHEMA}, OF_ROLLOUTS, path)
    if not table.num_rows:
        raise InputError(f"{path} has no responses, at least one is expected: repeat the run")
    for reason in pc.unique(table["finish_reason"]).to_pylist():
        if reason not in ENDS:
            raise InputError(
                f"{path}: finish_reason is {reason!r:.60}, stop or length is expected: repeat the run"
            )
    for name in ("reward", "advantage"):
        if pc.any(pc.greater(pc.abs(table[name]), LARGEST)).as_py():
            raise InputError(f"{path}: {name} has a number above {LARGEST:g}: repeat the run")


def _require_columns(
    table: pa.Table, types: Mapping[str, pa.DataType], required: Collection[str], path: Path
) -> None:
    names = table.column_names
    if missing := sorted(set(required) - set(names)):
        raise InputError(f"{path} has no column {missing[0]}, which a run writes: repeat the run")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} has column {name!r:.60} twice: repeat the run")
        if name not in types:
            continue
        column = table[name]
        if column.type != types[name]:
            raise InputError(
                f"{path}: {name} is of type {column.type!s:.60}, {types[name]} is expected: repeat "
                "the run"
            )
        if name in NEVER_NULL and column.null_count:
            raise InputError(f"{path}: {name} has empty values: repeat the run")
