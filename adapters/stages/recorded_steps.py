"""The recorded steps that led to a checkpoint: found, verified against its state, before sampling."""

import math
from pathlib import Path
from typing import NamedTuple

from funcprobe import tree
from funcprobe.attribution.momentum import moment_part
from funcprobe.step import adam
from funcprobe.types import AdamState, InputError

from ..config.schema import Config
from ..console import Narrator
from ..machine.home import expanded
from ..optimizer import find_state, read_adam_state
from ..rollouts import Rollouts, load_rollouts
from ..rollouts.files import files_of
from ..rollouts.gradients import (
    FOLDER,
    gradient_path,
    load_gradient,
    recorded_gradients,
)
from ..store import fingerprint_path
from .plan import Plan, vocabulary

# Of |exp_avg|. A float32 state leaves 1e-7 and an 8-bit one under 1e-3, as its errors are random; of
# gradients of another run the first leaves some 0.1.
TOLERANCE = 0.01


class RecordedSteps(NamedTuple):
    """What is known of the steps in exp_avg."""

    files: dict[int, Path]  # the last steps without a gap, newest first, of this state
    taken: int  # steps that Adam has taken
    rollouts: dict[int, Rollouts]  # of the steps that are split by prompt, newest first
    earlier: AdamState | None  # of attribution.earlier_checkpoint
    inputs: dict[str, str]  # file name -> hash, of what was read


def recorded_steps(plan: Plan, narrator: Narrator) -> RecordedSteps | None:
    """The gradients of the last steps, rollouts, and an earlier state; None if there is nothing.

    A folder that is not asked for, beside rollouts.update or in the checkpoint, is left out with a
    warning where it does not fit. InputError, one line, for what is asked for: no such file, a damaged
    one, steps or an earlier checkpoint of another run, rollouts of another step or temperature.
    """
    chosen = plan.config.attribution
    asked = [
        key for key in ("gradients", "momentum_prompts", "earlier_checkpoint") if getattr(chosen, key)
    ]
    if plan.step.rule != "adamw":
        if asked:
            raise InputError(
                f'attribution.{asked[0]} is set, but a step by rule "{plan.step.rule}" has no '
                'momentum: remove it, or set optimizer.rule = "adamw"'
            )
        return None
    if chosen.level == "off" and not asked:
        return None
    taken = max(plan.adam_state.step.values())
    files = _files(plan, taken, narrator, required=bool(chosen.gradients or chosen.momentum_prompts))
    if chosen.momentum_prompts > len(files):
        raise InputError(
            f"attribution.momentum_prompts = {chosen.momentum_prompts}, but the gradients of "
            f"{len(files)} steps are recorded: lower it, or record more (gradients=K)"
        )
    of_prompts = list(files)[: chosen.momentum_prompts]
    rollouts = {step: _rollouts(plan, step, files[step]) for step in of_prompts}
    earlier, hashes = None, [fingerprint_path(path) for path in files.values()]
    if chosen.earlier_checkpoint:
        path = find_state(expanded(chosen.earlier_checkpoint))
        earlier = _earlier(plan, path)
        hashes.append(fingerprint_path(path))
    if not hashes:
        return None
    inputs = {name: found for each in hashes for name, found in each.items()}
    return RecordedSteps(files, taken, rollouts, earlier, inputs)


def _files(plan: Plan, taken: int, narrator: Narrator, *, required: bool) -> dict[int, Path]:
    chosen = plan.config.attribution.gradients
    folders = [expanded(chosen)] if chosen else _folders(plan.config)
    held = {folder: steps for folder in folders if (steps := recorded_gradients(folder))}
    folder = next((folder for folder, steps in held.items() if taken in steps), None)
    if folder is None:
        if required:
            raise _no_gradients(folders, held, taken)
        return {}
    try:
        return _verified(plan, folder, held[folder], taken)
    except InputError as error:
        if required:
            raise
        narrator.say(f"warning: momentum is not split by step: {error}")
        return {}


def _folders(config: Config) -> list[Path]:
    """Where gradients are without being asked for: beside the rollouts of U, and in the checkpoint."""
    update = config.rollouts.update
    beside = [] if update is None else [expanded(update).parent]
    return [*beside, expanded(config.policy.checkpoint) / FOLDER]


def _no_gradients(folders: list[Path], held: dict[Path, dict[int, Path]], taken: int) -> InputError:
    for folder, steps in held.items():
        return InputError(
            f"{folder} has gradients of steps {min(steps)} to {max(steps)}, but the optimizer state "
            f"has taken {taken} steps, and its last gradient is that of step {taken}: give the folder "
            f"in its own checkpoint ({FOLDER}/), or a checkpoint of a recorded step"
        )
    return InputError(
        f"no gradients of steps in {' or '.join(map(str, folders))} (step-000006.safetensors): record "
        "them by record_rollouts(..., gradients=K), and set attribution.gradients to their folder"
    )


def _verified(plan: Plan, folder: Path, steps: dict[int, Path], taken: int) -> dict[int, Path]:
    """The last steps without a gap, each undone from exp_avg, whose norm before it was recorded.

    InputError for a gradient that does not fit the state.
    """
    state, moment = plan.adam_state, plan.adam_state.exp_avg
    beta1 = {n: g.beta1 for n, g in adam.groups_by_name(state).items()}
    if not all(beta1.values()):
        raise InputError(f"{folder}: a group has beta1 = 0, so that there is no momentum to split")
    moment, whole, files = {n: tree.f64(m) for n, m in moment.items()}, tree.norm(moment), {}
    for step in range(taken, 0, -1):
        if step not in steps:
            break
        found = load_gradient(steps[step], plan.policy.params)
        part = moment_part(found.gradient, 0, state)
        moment = {n: (m - part[n]) / beta1[n] for n, m in moment.items()}
        grown = whole / min(beta1.values()) ** (taken - step + 1)  # with what rounding exp_avg has
        if abs(tree.norm(moment) - found.moment_norm) > TOLERANCE * grown:
            raise InputError(
                f"{steps[step]}: without this gradient exp_avg has norm {tree.norm(moment):.3g}, but "
                f"{found.moment_norm:.3g} was recorded before step {step}: it is of another run than "
                "the optimizer state; give the gradients of this run"
            )
        files[step] = steps[step]
    return files


def _rollouts(plan: Plan, step: int, gradient: Path) -> Rollouts:
    """The rollouts of a step, beside its gradient or beside rollouts.update."""
    name, update = (
        gradient_path(gradient.parent, step).with_suffix(".parquet"),
        plan.config.rollouts.update,
    )
    beside = [] if update is None else [expanded(update).with_name(name.name)]
    places = [name, *beside]
    path = next((place for place in places if all(file.is_file() for file in files_of(place))), None)
    if path is None:
        raise InputError(
            f"attribution.momentum_prompts needs the rollouts of step {step}, and {places[-1]} does "
            "not exist: set attribution.gradients to the folder of record_rollouts, which has both"
        )
    policy = plan.policy
    found = load_rollouts(
        path, vocabulary(policy), rewards=False, advantages=True, eos_ids=policy.eos_ids
    )
    if found.step != step:
        raise InputError(f"{path} is of step {found.step} by its column step: give that of step {step}")
    if not math.isclose(found.temperature, plan.temperature, rel_tol=1e-6):
        raise InputError(
            f"{path} has temperature {found.temperature:.9g}, the run {plan.temperature:.9g}: its "
            "log-probabilities would be another policy's; set sampling.temperature to it"
        )
    return found


def _earlier(plan: Plan, path: Path) -> AdamState:
    """The state of an earlier checkpoint. InputError for one that this run did not pass."""
    state, _ = read_adam_state(path, plan.policy.model, plan.policy.params, accept_positional=True)
    now = plan.adam_state
    adam.require_state(plan.policy.params, state, "adamw")
    fewest = min(now.step[n] - state.step[n] for n in now.step)
    if fewest < 1:
        raise InputError(
            f"attribution.earlier_checkpoint: {path} has taken {max(state.step.values())} steps, the "
            f"checkpoint {max(now.step.values())}: an earlier one is expected"
        )
    if (share := _impossible(now, state)) > TOLERANCE:
        raise InputError(
            f"attribution.earlier_checkpoint: {path}: {share:.0%} of its second moments, decayed to "
            "this checkpoint, exceed the ones there: it is of another run"
        )
    return state


def _impossible(now: AdamState, before: AdamState) -> float:
    """Share of entries with beta2^n nu_a > nu_b, n steps later: impossible within one run."""
    group_of = adam.groups_by_name(now)
    over, count = 0, 0
    for name, nu in now.exp_avg_sq.items():
        kept = group_of[name].beta2 ** (now.step[name] - before.step[name])
        least = kept * tree.f64(before.exp_avg_sq[name])
        over += int((least > 1.05 * tree.f64(nu)).sum())  # 8-bit moments have errors of some percent
        count += nu.numel()
    return over / count
