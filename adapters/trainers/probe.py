"""The probe inside training: the effect on the entropy of the step that is about to be taken."""

# ruff: noqa: ARG002  (the arguments are the trainer's)
import logging
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import funcprobe
from funcprobe import tree
from funcprobe.along import Along, eval_passes, summarise_along
from funcprobe.statistics.estimators import Measured
from funcprobe.statistics.intervals import Error, Interval, delta_error, student
from funcprobe.step import adam
from funcprobe.types import AdamState, Batch, Entropy, InputError, Params

from .. import rollouts
from ..checkpoint.model import Policy
from ..config.file import read_config
from ..config.schema import Config
from ..sampling.generate import sample_responses
from ..sampling.prompts import draw_with_replacement
from ..sampling.responses import Responses
from ..sampling.shared_out import shared_out
from ..stages.eval_source import EvalSource, load_eval
from ..stages.large_prompts import taken
from ..stages.microbatch import Size, longest, require_positions
from .configured import require_readable, require_same_policy
from .dropout import OF_STEP, warn_of_dropout
from .headline import causes, headline
from .live import adam_state, ascent, at_rest, live_policy, lr_now, plain_optimizer, require_live
from .prompts import own_prompts
from .rounding import is_half, warn_of_rounding
from .size import sequence_of, size_of, warning
from .together import Together, several, together
from .unharmed import unharmed

logger = logging.getLogger(__name__)


class StepProbe(NamedTuple):
    """Prediction and measurement of a step before it is taken; entropies in the estimator's unit."""

    lr: float  # of this step, the first group's
    direction: adam.UpdateDirection
    along: Along
    measured: Measured  # at theta + lr * direction
    coarsest: torch.dtype  # of the model: in half precision rounding dominates `measured.delta`
    predicted: Interval  # 95 % of lr * along.derivative, over E
    size: Size  # of microbatches


class ProbeCallback(TrainerCallback):
    """Predicts and measures, at each `every`-th step, the change of the entropy by that step.

        trainer = GRPOTrainer(...)
        trainer.add_callback(ProbeCallback(trainer, every=50, config="probe.toml"))

    The step is exactly the one that is taken: v is AdamW's, from the accumulated and clipped gradients,
    the live state and the live learning rate; up to the rounding of theta, which is coarse if trainable
    tensors are in half precision (a warning). E is sampled from the policy (by `sampling`, `prompts`,
    `run.seed` and the step), or supplied (`rollouts.eval`, which then needs sampler_logp); its prompts
    are those of the trainer's own data set, unless `prompts.source` is set. Of the
    configuration, `run.seed`, `run.max_tokens`, `policy.max_trainable`, `prompts`, `sampling`,
    `rollouts.eval` and `entropy` are read; settings of the step in `optimizer`, clipping and learning
    rate included, are rejected, since the trainer has its own. The policy is the model in the dtypes of
    its parameters, without autocast and without dropout, with which TRL 1.16 samples. If some are in
    half precision, rounding exceeds most measured changes: `measured` and `ratio` are omitted, with a
    warning. A 4-bit model needs `quantised.freeze_quantised(model)` before it is passed to the trainer.
    Of several processes each computes a share of E, and the first logs.

    The results are in the trainer's log as funcprobe/*, at their step, and one line of the logger of
    this module says who makes the change (level INFO). Weights, gradients, modes, hooks
    and random states are restored, so that training continues bit for bit. Raises InputError, one line,
    here or before the first step, if the trainer cannot be probed. After that nothing ends the training
    but what would without a probe: whatever fails (a gradient that is not finite, memory that runs out,
    a process that does not answer, an error of any kind) is one warning with its reason,
    funcprobe/skipped is logged, training continues bit for bit, and the next probe tries again.
    """

    def __init__(self, trainer: Trainer, every: int, config: str | Path | Config) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every = {every!r}: a whole number of steps, at least 1, is expected")
        if not isinstance(config, str | os.PathLike | Config):
            raise InputError(
                f"config is a {type(config).__name__}: the path of a configuration file, or a Config, "
                "is expected"
            )
        self.trainer = trainer
        self.every = every
        self.config = config if isinstance(config, Config) else read_config(Path(config))
        require_readable(self.config)
        policy = live_policy(trainer, self.config.policy.max_trainable)
        prompted, rows = own_prompts(trainer, self.config)
        self.source = load_eval(prompted, policy, rows)
        if trainer.is_world_process_zero():
            for line in self.source.lines:
                logger.info(line)
        require_same_policy(self.source, trainer)
        if self.source.supplied is not None and self.source.supplied.sampler_logp is None:
            raise InputError(
                f"{self.config.rollouts.eval} has no sampler_logp: the policy changes in training, so "
                "that E needs the log-probabilities of its sampler; sample E, or supply the column"
            )
        self._numbers: dict[str, float] | None = None
        self._together = Together()
        self._size: Size | None = None  # found at the first step that is probed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with unharmed("the trainer was not examined before the first step", refuses=True):
            self._require(plain_optimizer(kwargs["optimizer"]), first=state.is_world_process_zero)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, first = state.global_step + 1, state.is_world_process_zero
        # Processes that torch.distributed does not join leave it to the first.
        if step % self.every or not (first or several()):
            return
        self._numbers = {"funcprobe/skipped": 1.0} if first else None
        with unharmed(f"step {step} is not probed" if first else None):
            start = time.perf_counter()
            found = self._probed(plain_optimizer(kwargs["optimizer"]), step)
            if first:
                logged = numbers(found) | {"seconds": time.perf_counter() - start}
                logger.info("step %d: %s", step, headline(logged, found.predicted))
                self._numbers = {f"funcprobe/{key}": value for key, value in logged.items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._numbers is None:
            return
        logged, self._numbers = self._numbers, None
        # The base class's: GRPOTrainer's own log adds its running means and resets them. Both end in
        # on_log, which resets should_log, so that the trainer would not log this step.
        should_log = control.should_log
        with unharmed(f"step {state.global_step}: funcprobe/* is not in every log"):
            Trainer.log(self.trainer, logged)
        control.should_log = should_log

    def _require(self, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        """InputError for a trainer that cannot be probed; warnings of what its numbers lack."""
        require_live(self.trainer, optimizer)
        policy = live_policy(self.trainer, self.config.policy.max_trainable)
        adam.require_state(policy.params, adam_state(optimizer, policy.model, policy.params), "adamw")
        self._together = together(self._together)
        with self._together, at_rest(policy.model):  # raises for what cannot be probed
            forward = funcprobe.bind(policy.model, temperature=self.source.temperature).forward
        if first:
            warn_of_rounding(policy.params, forward.coarsest)
            warn_of_dropout(policy.model, OF_STEP)

    def _probed(self, optimizer: torch.optim.Optimizer, step: int) -> StepProbe:
        self._together = together(self._together)
        with self._together:
            # One process may have missed the end of a probe that others have finished.
            sizes = self._together.gathered(self._size)
            found = probe_step(
                live_policy(self.trainer, self.config.policy.max_trainable),
                optimizer,
                self.source,
                self.config,
                step,
                self._together,
                None if None in sizes else self._size,
            )
        self._size = found.size
        return found


def probe_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    source: EvalSource,
    config: Config,
    step: int,
    together: Together = Together(),  # noqa: B008 (alone, it has no state)
    size: Size | None = None,
) -> StepProbe:
    """Prediction and measurement of the step that `optimizer` would take with the gradients in .grad.

    Of several processes each computes a share. Nothing is changed. `size`: of microbatches, by default
    by run.max_tokens. InputError if a gradient or the policy's probabilities are not finite.
    """
    params = policy.params
    state = adam_state(optimizer, policy.model, params)
    Y = ascent(policy.model, params)
    if not Y:
        raise InputError("no trainable parameter has a gradient, so no step is taken")
    if bad := [n for n, g in Y.items() if not bool(g.isfinite().all())]:
        raise InputError(f"the gradient of {bad[0]} is not finite")
    direction = _direction(params, Y, state)
    Y = {n: Y.get(n, torch.zeros_like(v)) for n, v in direction.total.items()}
    lr = lr_now(optimizer, policy.model, state)
    entropy = Entropy(**config.entropy.model_dump())
    with at_rest(policy.model):
        batch, sampler_logp_NR, unit_N = _eval_batch(policy, source, config, step, together)
        forward = funcprobe.frozen_forward(policy.model, params, source.temperature)
        forward = warning(forward)._replace(ranks=together.ranks)
        sequence = sequence_of(config, source, batch)
        if size is None or size.max_tokens < sum(sequence):
            size = size_of(config, policy, sequence, forward, together)
        forward = forward._replace(recompute=size.recompute)
        of_E: dict[str, Any] = {"entropy": entropy, "sampler_logp_NR": sampler_logp_NR}
        sized = of_E | {"max_tokens": size.max_tokens}
        passes = eval_passes(params, batch, direction.total, forward, **sized)
        along = summarise_along(passes, Y, direction, batch, unit_N=unit_N, **of_E)
        at = (params, batch, direction.total, lr, along.stats, forward)
        measured = funcprobe.measure(*at, **sized)
    error = delta_error(along.first_order.influence_N, unit_N)
    predicted = student(lr * along.derivative, Error(lr * error.se, error.dof))
    return StepProbe(lr, direction, along, measured, forward.coarsest, predicted, size)


def numbers(found: StepProbe) -> dict[str, float]:
    """The values to log: changes of the entropy by this step, at its learning rate.

    `ratio` is omitted if the predicted change is 0, `measured` and `ratio` if the model is in half
    precision; the effective sample size, a sum of weights near 1, is not sensitive to rounding.
    """
    lr, along, measured = found.lr, found.along, found.measured
    predicted = lr * along.derivative
    logged = {
        "entropy": along.entropy,
        "predicted": predicted,
        "predicted_se_given_update": lr * along.first_order.se,
        "from_momentum": lr * along.from_momentum,
        "from_update": lr * along.from_update,
        "from_decay": lr * along.from_decay,
        "ess": measured.ess,
        "derivative": along.derivative,
        "derivative_reverse": along.bars_dot,
        "direction_norm": tree.norm(found.direction.total),
    } | causes(along, found.direction, lr)
    if is_half(found.coarsest):
        return logged
    ratio = {"ratio": measured.delta / predicted} if predicted else {}
    return logged | {"measured": measured.delta} | ratio


def _direction(params: Params, Y: Params, state: AdamState) -> adam.UpdateDirection:
    """v of the step; zero without a gradient, since torch does not update such a parameter.

    Y is already clipped.
    """
    moving = adam.update_direction({n: params[n] for n in Y}, Y, state, rule="adamw")
    still = tree.zeros({n: p for n, p in params.items() if n not in Y})
    return moving._replace(
        total=moving.total | still,
        momentum=moving.momentum | still,
        decay=moving.decay | still,
        scale=moving.scale | still,
    )


def _eval_batch(
    policy: Policy,
    source: EvalSource,
    config: Config,
    step: int,
    together: Together = Together(),  # noqa: B008
) -> tuple[Batch, torch.Tensor | None, torch.Tensor]:
    """E, its sampler log-probabilities if it is supplied, and its sampling units."""
    if source.supplied is not None:
        batch = rollouts.to_batch(source.supplied)
        return batch, rollouts.sampler_logp(source.supplied, batch), batch.prompt_N
    # A separate generator, seeded by text, so that neighbouring steps and seeds are unrelated.
    seed = random.Random(f"{config.run.seed}/{step}/E").getrandbits(48)
    index = draw_with_replacement(config.sampling.B_E, len(source.prompt_ids), seed)
    ids = taken(source.prompt_ids, index)
    require_positions(config, policy, sum(longest(config, ids, None)))  # of prompts read just now

    def sample(prompt_ids: Sequence[Sequence[int]], own: Sequence[int]) -> Responses:
        return sample_responses(policy, prompt_ids, config.sampling, seed, indices=own)

    found = shared_out(together, ids, sample)
    return funcprobe.collate(ids, found.ids, index), None, torch.arange(len(index))
