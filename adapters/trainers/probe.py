"""The probe inside training: what the step that is about to be taken does to the entropy."""

# ruff: noqa: ARG002  (the arguments are the trainer's)
import os
import random
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import funcprobe
from funcprobe import tree
from funcprobe.along import Along, eval_passes, summarise_along
from funcprobe.policy.layout import out_of_memory
from funcprobe.statistics.estimators import Measured
from funcprobe.step import adam
from funcprobe.types import AdamState, Batch, Entropy, InputError, Params

from .. import rollouts
from ..checkpoint.model import Policy
from ..config.file import read_config
from ..config.schema import Config
from ..sampling.generate import sample_responses
from ..sampling.prompts import draw_with_replacement
from ..stages.plan import EvalSource, load_eval
from .live import adam_state, ascent, at_rest, live_policy, lr_now, plain_optimizer, require_live

# What makes the step is the trainer's, not the configuration's.
_NOT_READ = ("state", "max_grad_norm", "lr", "betas", "eps", "weight_decay", "checkpoint_step")


class StepProbe(NamedTuple):
    """What is known of one step before it is taken; entropies in the unit of the estimator."""

    lr: float  # of this step, the first group's
    direction: adam.UpdateDirection
    along: Along
    measured: Measured  # at theta + lr * direction
    coarsest: torch.dtype  # of the model: in half precision `measured.delta` is rounding


class ProbeCallback(TrainerCallback):
    """Predicts and measures, at each `every`-th step, what that step does to the policy's entropy.

        trainer = GRPOTrainer(...)
        trainer.add_callback(ProbeCallback(trainer, every=50, config="probe.toml"))

    The step is the very one that is taken: v is AdamW's, of the gradients as accumulated and clipped,
    of the live state and the live learning rate; to the rounding of theta, which is coarse where the
    trainable tensors are in half precision (a warning). E is sampled from the policy (`sampling`,
    `prompts`, `run.seed` and the step), or brought (`rollouts.eval`, which then needs sampler_logp).
    Of the configuration, `run.seed`, `run.max_tokens`, `policy.max_trainable`, `prompts`, `sampling`,
    `rollouts.eval` and `entropy` are read; what `optimizer` says of the step, clipping and learning
    rate too, is refused, since the trainer has its own. The policy is the model in its parameters' own
    types, without dropout and autocast, which is also what TRL samples from. Where some are in half
    precision, a measured difference drowns in rounding: `measured` and `ratio` are left out, with a
    warning. A 4-bit model needs `quantised.freeze_quantised(model)` before the trainer gets it.

    The numbers go through the trainer's log as funcprobe/*, at the step they are of. All is left as it
    was: weights, gradients, modes, hooks, random states, so that training goes on bit for bit.
    InputError, one line, here or before the first step, for what cannot be probed. For a step that
    cannot be (a gradient or probability is not finite, memory runs out) there is a warning with the
    reason and funcprobe/skipped, and training goes on.
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
        _require_readable(self.config)
        policy = live_policy(trainer, self.config.policy.max_trainable)
        self.source = load_eval(self.config, policy)
        _require_same_policy(self.source, trainer)
        if self.source.brought is not None and self.source.brought.sampler_logp is None:
            raise InputError(
                f"{self.config.rollouts.eval} has no sampler_logp: the policy moves in training, and E "
                "must say under which probabilities it was sampled; sample E, or bring the column"
            )
        self._numbers: dict[str, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = plain_optimizer(kwargs["optimizer"])
        require_live(self.trainer, optimizer)
        policy = live_policy(self.trainer, self.config.policy.max_trainable)
        adam.require_state(policy.params, adam_state(optimizer, policy.model, policy.params), "adamw")
        if state.is_world_process_zero:
            with at_rest(policy.model):  # an architecture that cannot be probed shows here
                forward = funcprobe.bind(policy.model, temperature=self.source.temperature).forward
            _warn_of_rounding(policy.params, forward.coarsest)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        if step % self.every or not state.is_world_process_zero:
            return
        start = time.perf_counter()
        try:
            found = probe_step(
                live_policy(self.trainer, self.config.policy.max_trainable),
                plain_optimizer(kwargs["optimizer"]),
                self.source,
                self.config,
                step,
            )
        except (InputError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, InputError) or out_of_memory(error)):
                raise
            said = " ".join(str(error).split())[:300]
            warnings.warn(f"funcprobe: step {step} is not probed: {said}", stacklevel=2)
            self._numbers = {"funcprobe/skipped": 1.0}
            return
        seconds = time.perf_counter() - start
        self._numbers = {f"funcprobe/{key}": value for key, value in numbers(found).items()}
        self._numbers["funcprobe/seconds"] = seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._numbers is None:
            return
        logged, self._numbers = self._numbers, None
        # The base class's: GRPOTrainer's own log empties its running means into whatever it is given.
        # Either ends in on_log, which takes back that the trainer is to log this step.
        should_log = control.should_log
        Trainer.log(self.trainer, logged)
        control.should_log = should_log


def probe_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    source: EvalSource,
    config: Config,
    step: int,
) -> StepProbe:
    """Prediction and measurement of the step that `optimizer` would take with the gradients in .grad.

    Nothing is changed. InputError where a gradient or the policy's probabilities are not finite.
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
    entropy, max_tokens = Entropy(**config.entropy.model_dump()), int(config.run.max_tokens)
    with at_rest(policy.model):
        batch, sampler_logp_NR, unit_N = _eval_batch(policy, source, config, step)
        forward = funcprobe.frozen_forward(policy.model, params, source.temperature)
        forward = forward._replace(halved=_warn_of_memory)
        of_E: dict[str, Any] = {"entropy": entropy, "sampler_logp_NR": sampler_logp_NR}
        passes = eval_passes(params, batch, direction.total, forward, max_tokens=max_tokens, **of_E)
        along = summarise_along(passes, Y, direction, batch, unit_N=unit_N, **of_E)
        measured = funcprobe.measure(
            params,
            batch,
            direction.total,
            lr,
            along.stats,
            forward,
            max_tokens=max_tokens,
            **of_E,
        )
    return StepProbe(lr, direction, along, measured, forward.coarsest)


def numbers(found: StepProbe) -> dict[str, float]:
    """What is logged: changes of the entropy by this step, at its learning rate; see README.md.

    `ratio` is left out where 0 is predicted, `measured` and `ratio` where the model is in half
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
    }
    if _is_half(found.coarsest):
        return logged
    ratio = {"ratio": measured.delta / predicted} if predicted else {}
    return logged | {"measured": measured.delta} | ratio


def _is_half(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits < 32


def _warn_of_rounding(params: Params, coarsest: torch.dtype) -> None:
    if _is_half(coarsest):
        warnings.warn(
            f"funcprobe: the model has products or weights in {coarsest}, where measured differences "
            "drown in rounding: funcprobe/measured and funcprobe/ratio are left out",
            stacklevel=2,
        )
    if rounded := [n for n, t in params.items() if _is_half(t.dtype)]:
        warnings.warn(
            f"funcprobe: {len(rounded)} trainable tensors are in half precision, as {rounded[0]}: each "
            "step rounds them, so that the step taken differs from the one predicted",
            stacklevel=2,
        )


def _warn_of_memory(tokens: int) -> None:
    warnings.warn(f"funcprobe: out of memory: at most {tokens:,} tokens at once", stacklevel=2)


def _direction(params: Params, Y: Params, state: AdamState) -> adam.UpdateDirection:
    """v of the step; zero where there is no gradient, since torch leaves such a parameter alone.

    Y is clipped already.
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
    policy: Policy, source: EvalSource, config: Config, step: int
) -> tuple[Batch, torch.Tensor | None, torch.Tensor]:
    """E, its sampler's log-probabilities where it is brought, and its sampling units."""
    if source.brought is not None:
        batch = rollouts.to_batch(source.brought)
        return batch, rollouts.sampler_logp(source.brought, batch), batch.prompt_N
    # A generator of its own; seeded by text, so that neighbouring steps and seeds share nothing.
    seed = random.Random(f"{config.run.seed}/{step}/E").getrandbits(48)
    index = draw_with_replacement(config.sampling.B_E, len(source.prompt_ids), seed)
    ids = [source.prompt_ids[i] for i in index]
    found = sample_responses(policy, ids, config.sampling, seed)
    return funcprobe.collate(ids, found.ids, index), None, torch.arange(len(index))


def _require_readable(config: Config) -> None:
    chosen = config.optimizer
    given = [key for key in _NOT_READ if getattr(chosen, key) is not None]
    if given or chosen.rule != "adamw":
        raise InputError(
            f"optimizer.{given[0] if given else 'rule'} is set: inside training the step is the "
            "trainer's own, by its optimizer and its gradients; leave it out"
        )
    if config.run.max_tokens == "auto":
        raise InputError('run.max_tokens = "auto" has no place inside training: give a number')
    if config.rollouts.update is not None:
        raise InputError("rollouts.update is set: inside training U is the trainer's own; leave it out")
    if config.rollouts.eval is None and config.prompts.source == "toy":
        raise InputError(
            'prompts.source is "toy", whose sums are for the toy policy: set it to your prompts'
        )


def _require_same_policy(source: EvalSource, trainer: Trainer) -> None:
    sampled_at = getattr(trainer, "temperature", getattr(trainer.args, "temperature", None))
    if sampled_at not in {None, source.temperature}:
        raise InputError(
            f"the trainer samples at temperature {sampled_at:g} and E is at {source.temperature:g}, "
            "which is another policy: set sampling.temperature to the trainer's, or bring another E"
        )
