"""Run folders to look at: of a run of the tiny checkpoint, and of the size of a large one, made up."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from support.checkpoints import Checkpoint, sets

RULES = ("negative_only", "entropy_bonus:0.5", "drop_tokens:3", "temperature:1.5")
WORDS = (
    " the",
    " sum",
    " of",
    " is",
    " 12",
    " and",
    "\n",
    "\n\n",
    " so",
    " answer",
    ":",
    ".",
    " we",
    "▁x",
)


def run_of(checkpoint: Checkpoint, place: Path, name: str = "one", **changes: Any) -> Path:
    """The folder of a run with everything that a report shows, and beside it the file of its rules."""
    from funcprobe.adapters import run, whatif
    from funcprobe.adapters.config.file import read_config
    from funcprobe.adapters.console import Narrator

    given = checkpoint.settings() | {
        "run.folder": str(place),
        "run.name": name,
        "measure.etas": [1e-7, 1e-6, 1e-5, 1e-4],
        "sampling.B_E": 32,
        "attribution.level": "tokens",
        "attribution.influence": 2,
    }
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    (place / "c.toml").touch()
    config = read_config(place / "c.toml", sets(given)[1::2])
    _, folder = run.run(config, Narrator())
    whatif.whatif(config, whatif.Question(RULES), Narrator())
    return folder


def copied(folder: Path, target: Path) -> Path:
    """A copy to change, with the file of its rules."""
    shutil.copytree(folder, target)
    rules = folder.with_name(f"{folder.name}.whatif.json")
    if rules.is_file():
        shutil.copy(rules, target.with_name(f"{target.name}.whatif.json"))
    return target


def edited(folder: Path, **changes: Any) -> None:
    """Replace sections of results.json; a__b=1 sets a.b."""
    path = folder / "results.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = document
        for each in outer:
            place = place[each]
        place[last] = value
    path.write_text(json.dumps(document), encoding="utf-8")


def enlarged(folder: Path, target: Path, *, prompts: int, responses: int, tokens: int) -> Path:
    """A copy with `prompts` x `responses` responses in U, as many in E, each of `tokens` tokens.

    Values are drawn from those of `folder`, shares with noise, so that every column is of its type.
    """
    draw = np.random.default_rng(0)
    copied(folder, target)
    count = prompts * responses
    prompt_of = {"U": np.repeat(np.arange(prompts), responses), "E": np.arange(count)}

    def drawn(table: pa.Table, batch: str, rows: int, fixed: dict[str, Any]) -> pa.Table:
        if "batch" in table.column_names:
            of_batch = pa.array([b == batch for b in table["batch"].to_pylist()])
            table = table.filter(of_batch)
        made = table.take(draw.integers(0, len(table), rows))
        for name, values in fixed.items():
            field = made.schema.field(name)
            made = made.set_column(
                made.column_names.index(name), field, pa.array(values, type=field.type)
            )
        for name in ("share", "marginal", "direct", "score", "control"):
            if name in made.column_names and made[name].null_count == 0:
                noise = draw.lognormal(0.0, 1.5, rows)
                values = pa.array(made[name].to_numpy() * noise)
                made = made.set_column(made.column_names.index(name), made.schema.field(name), values)
        return made

    sequences, each_token = (pq.read_table(folder / f"{n}.parquet") for n in ("sequences", "tokens"))
    of_sequences, of_tokens = [], []
    for batch, file in (("U", "update"), ("E", "eval")):
        words = draw.choice(WORDS, (count, tokens))
        texts = ["".join(row) for row in words]
        questions = [f"Question {i}: how many of {i + 3} apples are left?" for i in prompt_of[batch]]
        identity = {"sequence": np.arange(count), "prompt_index": prompt_of[batch]}
        of_sequences.append(
            drawn(
                sequences,
                batch,
                count,
                {
                    **identity,
                    "prompt": questions,
                    "response": texts,
                    "response_tokens": [tokens] * count,
                },
            )
        )
        of_tokens.append(
            drawn(
                each_token,
                batch,
                count * tokens,
                {
                    **{name: np.repeat(values, tokens) for name, values in identity.items()},
                    "position": np.tile(np.arange(tokens), count),
                    "token": words.ravel(),
                    "text": words.ravel(),
                    "special": [False] * (count * tokens),
                },
            )
        )
        rollouts = pq.read_table(folder / "rollouts" / f"{file}.parquet")
        made = drawn(
            rollouts,
            batch,
            count,
            {
                "prompt_index": prompt_of[batch],
                "prompt": questions,
                "response": texts,
                "response_ids": [[2] * tokens] * count,
                "finish_reason": ["length"] * count,
            },
        )
        pq.write_table(made, target / "rollouts" / f"{file}.parquet")
    pq.write_table(pa.concat_tables(of_sequences), target / "sequences.parquet")
    pq.write_table(pa.concat_tables(of_tokens), target / "tokens.parquet")
    edited(
        target,
        counts__U_prompts=prompts,
        counts__U_sequences=count,
        counts__U_tokens=count * tokens,
        counts__E_prompts=count,
        counts__E_sequences=count,
        counts__E_tokens=count * tokens,
    )
    return target
