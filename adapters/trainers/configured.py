"""What of a configuration a probe inside training can have, since the step is the trainer's."""

from transformers import Trainer

from funcprobe.types import InputError

from ..config.schema import Config
from ..stages.eval_source import EvalSource

# The step is determined by the trainer, not by the configuration.
_NOT_READ = ("state", "max_grad_norm", "lr", "betas", "eps", "weight_decay", "checkpoint_step")


def require_readable(config: Config) -> None:
    """InputError for settings that the trainer decides, or that need what a training does not have."""
    chosen = config.optimizer
    given = [key for key in _NOT_READ if getattr(chosen, key) is not None]
    if given or chosen.rule != "adamw":
        raise InputError(
            f"optimizer.{given[0] if given else 'rule'} is set: inside training the step is the "
            "trainer's own, by its optimizer and its gradients; remove it"
        )
    if config.step.masks:
        raise InputError(
            "step.masks is set: inside training the gradient is the trainer's own, with its own masks; "
            "remove it"
        )
    if config.rollouts.update is not None:
        raise InputError("rollouts.update is set: inside training U is the trainer's own; remove it")
    if config.sampling.engine == "server":
        raise InputError('sampling.engine = "server": no server has these weights: set "batched"')
    if config.sampling.eos_ids is not None:
        raise InputError("sampling.eos_ids is set: inside training they are the trainer's; remove it")


def require_same_policy(source: EvalSource, trainer: Trainer) -> None:
    """InputError if E is of another temperature than the trainer's responses."""
    sampled_at = getattr(trainer, "temperature", getattr(trainer.args, "temperature", None))
    if sampled_at not in {None, source.temperature}:
        raise InputError(
            f"the trainer samples at temperature {sampled_at:g} but E is at {source.temperature:g}, "
            "another policy: set sampling.temperature to the trainer's, or supply another E"
        )
