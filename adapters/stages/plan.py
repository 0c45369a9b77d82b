"""Everything that a run needs before sampling: loaded, checked for consistency, described."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.logging import disable_progress_bar

import funcprobe
from funcprobe.policy.forward import Forward
from funcprobe.policy.placement import devices_of
from funcprobe.ranks import ALONE
from funcprobe.step.objective import Objective
from funcprobe.types import AdamState, Entropy, InputError, Step

from ..checkpoint.model import Loader, Policy, load_policy
from ..checkpoint.toy import ensure_toy
from ..config.schema import Config
from ..console import Narrator
from ..machine.devices import resolve_device
from ..machine.home import expanded
from ..machine.precision import of_machine
from ..machine.ranks import ONE_PROCESS, World
from ..optimizer import OptimizerReport
from ..rollouts import Rollouts, provenance
from ..sampling.generate import ended_by
from ..sampling.prompts import Prompt
from ..sampling.rewards import Reward, load_reward
from ..sampling.supplied import (
    common_temperature,
    load_supplied_eval,
    load_supplied_update,
    open_update,
)
from ..store import Stages
from .chosen_loss import ChosenLoss, choose_loss
from .differences import differences
from .dropout import dropout_masks
from .everywhere import refuse_shared_devices
from .inputs import inputs_of
from .max_tokens import Passes
from .microbatch import Size, longest, reporting, require_positions, resolve, with_size
from .prompts import no_prompts, response_line, sampled_from
from .run_settings import with_run_settings
from .step import choose_objective, load_step, step_lines

NOTHING_STORED = Stages(None)


class Plan(NamedTuple):
    """Everything that is known before sampling."""

    config: Config  # "toy" replaced by its paths, "auto" by a number
    policy: Policy
    size: Size  # of microbatches
    sequence: tuple[int, int]  # tokens of the longest sequence's prompt and response
    forward: Forward  # at the temperature of E and U
    masks: list[Forward]  # the same with dropout masks, for Y; none unless step.masks is set
    temperature: float
    adam_state: AdamState
    optimizer: OptimizerReport | None
    step: Step
    objective: Objective
    loss: ChosenLoss | None  # instead of J of the objective
    unlike_the_run: tuple[str, ...]  # what of the run's settings the predicted step does not have
    entropy: Entropy
    prompts: Sequence[Prompt]  # none if E and U are supplied; of very many, those that are drawn
    prompt_ids: Sequence[list[int]]
    reward: Reward | None  # None if U is supplied
    supplied_eval: Rollouts | None
    supplied_update: Rollouts | None
    known_step: bool  # whether U is the batch of the next step itself, so that v has no error over U
    etas: tuple[float, ...]  # ascending, the next step's lr among them
    next_lr: float
    inputs: dict[str, Any]  # hashes of the files the numbers depend on
    world: World = ONE_PROCESS  # the processes that share the run

    @property
    def max_tokens(self) -> int:
        """run.max_tokens, or the number found for "auto"."""
        return self.size.max_tokens

    @property
    def cut(self) -> dict[str, int]:
        """How passes are cut, on which results depend in rounding alone: for the keys of stages."""
        size = self.world.size
        return {"max_tokens": self.max_tokens} | ({"processes": size} if size > 1 else {})

    def passes(self) -> Passes:
        """What a trial of this plan's gradients is made of: by this process alone."""
        return _passes(self.policy, self.forward._replace(ranks=ALONE), self.sequence)


def load(
    config: Config,
    narrator: Narrator,
    policy_of: Loader | None = None,
    stages: Stages = NOTHING_STORED,
) -> Plan:
    """Load policy (by `policy_of`, if given), optimizer state, prompts, rewards and supplied rollouts.

    Everything that can be rejected without sampling is rejected here: InputError, one line. The size of
    microbatches that an earlier run found for "auto" is taken from `stages`, whose processes share the
    run.
    """
    refuse_shared_devices(config)
    disable_progress_bar()  # transformers', which would appear between the log lines
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_advice_on_masks)
    update_file = open_update(config)
    lossy = update_file.layout if update_file else None
    sampled = config.rollouts.eval is None or config.rollouts.update is None
    # verl's log contains prompts without special tokens: they are looked up in prompts.source.
    named = config.prompts.source != "toy" or config.policy.checkpoint == "toy"
    needed = sampled or (lossy == "verl" and named)
    # The first process makes the toy, if it is not there; the others find it.
    config = stages.world.on_first(lambda: _with_toy(config, narrator, prompts=needed))
    checkpoint = expanded(config.policy.checkpoint)
    config = with_run_settings(config, narrator.say)
    objective, loss = choose_objective(config), choose_loss(config)
    reward = configured_reward(config) if config.rollouts.update is None else None
    device = resolve_device(config.run.device)
    with narrator.phase("load"):
        policy = (policy_of or load_policy)(config.policy, device)
        policy, ending = ended_by(policy, config.sampling.eos_ids)
        adam_state, report, step = load_step(config, policy)
        sidecar = report.sidecar if report else None
        run = provenance.training_run(checkpoint, sidecar)
        made, every = sampled_from(config, policy) if needed else (no_prompts(), None)
        prompts, prompt_ids = made.prompts, made.ids
        supplied_eval = load_supplied_eval(config, policy, vocabulary(policy))
        supplied_update, guessed = load_supplied_update(
            update_file,
            config,
            policy,
            vocabulary(policy),
            mode=objective.advantage,
            rule=step.rule,
            prompt_ids=(every.every() if every else [prompt_ids]) if needed else None,
            run=run,
            loss=loss is not None,
        )
        loss = choose_loss(config, supplied_update)
        guessed += provenance.require_own(config.rollouts, supplied_eval, supplied_update, run)
        if sampled or lossy:
            guessed += provenance.length_lines(run, config.sampling.max_new_tokens)
        inputs = inputs_of(config, policy, report, prompts, prompt_ids)
        config = _with_base(config, policy)
        if not sampled:
            prompts, prompt_ids = [], []
        temperature = common_temperature(config, supplied_eval, supplied_update)
        sequence = longest(config, prompt_ids, supplied_eval, supplied_update)
        require_positions(config, policy, sum(sequence))
        forward = funcprobe.bind(policy.model, temperature=temperature).forward
        forward = of_machine(forward, config.policy.precision)
        forward = reporting(forward, narrator)
        masks, random = dropout_masks(config, policy, forward, sidecar)
    next_lr = next((group.lr for group in adam_state.groups), 0.0)  # optimizer.lr, if set
    lines = (
        *policy.lines,
        ending,
        *made.lines,
        *step_lines(config, adam_state, report, step, supplied_update),
        *random,
        *guessed,
    )
    lines += tuple(
        response_line(policy, name, supplied)
        for name, supplied in (("E", supplied_eval), ("U", supplied_update))
        if supplied
    )
    for line in (*lines, *forward.notes, *_notices(config, objective, next_lr)):
        narrator.say(line)
    size = resolve(config, _passes(policy, forward, sequence), narrator, stages, inputs["policy"])
    # Not earlier: trials are each process's own.
    ranks, again = stages.world.ranks(), size.recompute
    forward, *masks = (f._replace(ranks=ranks, recompute=again) for f in (forward, *masks))
    return Plan(
        config=with_size(config, size),
        policy=policy,
        size=size,
        sequence=sequence,
        forward=forward,
        masks=masks,
        temperature=temperature,
        adam_state=adam_state,
        optimizer=report,
        step=step,
        objective=objective,
        loss=loss,
        unlike_the_run=tuple(differences(config, sidecar, supplied_update)),
        entropy=Entropy(**config.entropy.model_dump()),
        prompts=prompts,
        prompt_ids=prompt_ids,
        reward=reward,
        supplied_eval=supplied_eval,
        supplied_update=supplied_update,
        known_step=provenance.is_next_batch(supplied_update, run),
        etas=_etas(config, next_lr),
        next_lr=next_lr,
        inputs=inputs,
        world=stages.world,
    )


def _passes(policy: Policy, forward: Forward, sequence: tuple[int, int]) -> Passes:
    return Passes(policy.params, forward, *sequence, vocabulary(policy), devices_of(policy.model))


def _is_no_advice_on_masks(record: logging.LogRecord) -> bool:
    """transformers 5.23 asks for an attention mask where rows are padded; on the right none is due."""
    return not str(record.msg).startswith("We strongly recommend passing in an `attention_mask`")


def _notices(config: Config, objective: Objective, next_lr: float) -> list[str]:
    """Log lines on the configuration itself."""
    lines = []
    if config.rollouts.update is not None:
        own = objective.advantage == "rollouts"
        source = "the supplied ones" if own else "computed from its rewards, by [objective]"
        lines.append(f"U is supplied: its advantages are {source}")
    fast = config.policy.precision == "fast"
    if fast or config.policy.dtype in {"bfloat16", "float16"}:
        what = 'precision "fast"' if fast else config.policy.dtype
        lines.append(
            f"warning: in {what} rounding can exceed the measured changes: see the numerical floor"
        )
    if config.measure.next_lr and not next_lr:
        lines.append(
            "the next step's learning rate is 0 or unknown and not in the table: set optimizer.lr"
        )
    return lines


def _etas(config: Config, next_lr: float) -> tuple[float, ...]:
    """The learning rates to measure at, ascending, each once."""
    coming = {next_lr} if config.measure.next_lr and next_lr > 0 else set()
    return tuple(sorted({*config.measure.etas, *coming}))


def vocabulary(policy: Policy) -> int:
    """Rows of the model's input embedding."""
    return int(policy.model.get_input_embeddings().weight.shape[0])


def _with_toy(config: Config, narrator: Narrator, *, prompts: bool) -> Config:
    policy = config.policy.checkpoint == "toy"
    prompts = prompts and config.prompts.source == "toy"
    if not policy and not prompts:
        return config
    if not policy:
        raise InputError(
            f'policy.checkpoint is {config.policy.checkpoint}, but prompts.source is "toy", the toy '
            "policy's sums: set prompts.source to your prompts"
        )
    with narrator.phase("make the toy policy (once)"):
        toy = ensure_toy(report=narrator.say)
    chosen = config.policy.model_copy(update={"checkpoint": str(toy.checkpoint)})
    changes: dict[str, Any] = {"policy": chosen}
    if prompts:
        changes["prompts"] = config.prompts.model_copy(update={"source": str(toy.prompts)})
    return config.model_copy(update=changes)


def _with_base(config: Config, policy: Policy) -> Config:
    """With the base's folder if the adapter names it relative to the current directory."""
    base = Path(policy.base)
    if config.policy.base is not None or base.is_absolute() or not base.is_dir():
        return config
    chosen = config.policy.model_copy(update={"base": str(base.absolute())})
    return config.model_copy(update={"policy": chosen})


def configured_reward(config: Config) -> Reward:
    """That of the table reward. InputError if there is none such."""
    chosen = config.reward
    return load_reward(
        chosen.function, answer_column=chosen.answer_column, conversational=chosen.conversational
    )
