"""init, inspect: what comes before a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from funcprobe.types import InputError

from ..config.file import commented_config
from ..machine.home import expanded
from .app import stdout


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("funcprobe.toml"),
    checkpoint: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint folder to write a configuration for.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="With --from: file or data set with the run's prompts.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "train",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column with the prompts, if not prompt, question, ...")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="The run's reward, as path/to/file.py:function; else a built-in one."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, as PATH.")] = None,
) -> None:
    """Write a configuration file with every key, its default and its description.

    With --from and --prompts, one that runs as it is: with the settings of that checkpoint's run, as
    far as they are recorded, and a comment on each.
    """
    path = out or path
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it")
    if path.exists():
        raise InputError(f"{path} exists: give another name, or delete it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}: create it, or give another name")
    if (checkpoint is None) != (prompts is None):
        raise InputError("--from CHECKPOINT and --prompts SOURCE are given together, or neither is")
    if checkpoint is None or prompts is None:
        text, then = commented_config(), "edit it"
    else:
        from ..proposal import propose

        text = propose(
            expanded(checkpoint), prompts, split=split, prompt_column=prompt_column, reward=reward
        )
        then = "read its comments"
    path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {path}: {then}, then run: funcprobe run {path}")


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or file or folder of an optimizer state.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model, instead of the one saved with the adapter.")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help='Name of the adapter; unless "default", its subfolder.')
    ] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe an optimizer state: format, names and their certainty, coverage, statistics.

    Positions are named by the configurations of adapter and base; no weights are read.
    """
    from .. import inspection

    document = inspection.inspect(expanded(path), base=base, adapter=adapter)
    if as_json:
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        inspection.show(document, stdout())
