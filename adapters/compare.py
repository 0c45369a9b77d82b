"""`funcprobe compare`: run folders side by side, as a table, JSON and a page."""

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from funcprobe.types import InputError

from . import store
from .checkpoint.trainer_state import trained_steps
from .checkpoint.training_log import TrainingLog, training_log
from .machine.home import expanded
from .optimizer import find_sidecar
from .report.comparison import write_comparison
from .results.comparison import Given, compare
from .results.comparison_sections import Comparison
from .results.saved import SavedRun, load_run
from .stages.run_settings import prompts_of_a_step


class Written(NamedTuple):
    """A comparison, and its files."""

    comparison: Comparison
    json: Path
    html: Path


def compare_runs(
    folders: Sequence[Path], out: Path, name: str = "compare", log: Path | None = None
) -> Written:
    """Write OUT/NAME.json and OUT/NAME.html. InputError as `results.comparison.compare` raises it."""
    runs = [load_run(folder) for folder in folders]
    given = [_given(run) for run in runs]
    found = compare(given, _log(given, log))
    files = Written(found, out / f"{name}.json", out / f"{name}.html")
    for file in files[1:]:
        store.require_place(file)
    write_comparison(found, files.html)
    store.write_whole(files.json, partial(store.write_json, found.model_dump(mode="json")))
    return files


def _given(run: SavedRun) -> Given:
    """The step of the checkpoint: by trainer_state.json, else by its folder's number."""
    checkpoint = _checkpoint(run)
    if checkpoint is None:
        return Given(run, None, None)
    number = re.search(r"(?:checkpoint-|global_step_)(\d{1,12})(?:/|$)", str(checkpoint))
    step = int(number[1]) if number else None
    if not checkpoint.is_dir():
        return Given(run, step, None)
    taken = trained_steps(checkpoint)
    sidecar = find_sidecar(checkpoint)
    batch = None
    if sidecar is not None:
        batch = prompts_of_a_step(sidecar, sidecar.sampling.get("num_generations"))
    return Given(run, step if taken is None else taken, batch)


def _checkpoint(run: SavedRun) -> Path | None:
    found = run.settings().get("policy", {}).get("checkpoint")
    # Of the machine of the run, whose users need not be here: then there is no such folder.
    return Path(os.path.expanduser(found)) if isinstance(found, str) and "\0" not in found else None


def _log(given: Sequence[Given], asked: Path | None) -> TrainingLog | None:
    """Of the file that was asked for, else of the checkpoint with the most steps."""
    if asked is not None:
        found = training_log(expanded(asked))
        if found is None:
            raise InputError(f"{asked}: no such file; give a trainer_state.json, or its folder")
        return found
    for one in sorted(given, key=lambda one: -(one.step or 0)):
        checkpoint = _checkpoint(one.run)
        if checkpoint is not None and checkpoint.is_dir():
            return training_log(checkpoint)
    return None
