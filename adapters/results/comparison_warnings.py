"""Where the changes of runs, or their path over a training, hold under a condition."""

from collections.abc import Sequence

from .comparison_sections import EntropyPath
from .saved import SavedRun


def learning_rate_warnings(runs: Sequence[SavedRun], kind: str, path: EntropyPath | None) -> list[str]:
    """Of learning rates that are not there, and of a step that stands for those of the training."""
    said = []
    if without := [run.folder.name for run in runs if not run.results.next_lr.value > 0]:
        said.append(
            f"the next step's learning rate is 0 or not known in {', '.join(without)}: the changes of "
            "all runs are per unit of learning rate, along v"
        )
    if kind == "checkpoints" and path is None:
        said.append(
            "no path over the training: the learning rates of its steps are not known; give its "
            "trainer_state.json by --log, or run again with optimizer.lr"
        )
    if path is None:
        return said
    if rules := {run.results.conventions.step.rule for run in runs} - {"adamw"}:
        said.append(
            f'optimizer.rule is "{rules.pop()}": the path is predicted along v of that rule, which '
            "need not be the steps of the training"
        )
    if any(one.last - one.first > 1 for one in path.between):
        said.append(
            "several steps lie between checkpoints: each is predicted as the first one's next step, "
            "with its momentum; what momentum carries from batch to batch is in no interval"
        )
    return said
