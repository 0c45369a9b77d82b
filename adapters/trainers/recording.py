"""The rollouts of each optimizer step of TRL's GRPOTrainer, token by token, as a run brings them."""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcprobe.types import InputError

from ..rollouts import Rollouts, save_rollouts
from ..stages.differences import LOSSES, SEQUENCES, terms
from ..store import write_whole
from .live import tokenizer_of

# Private methods of TRL (read in 1.16) and what the first returns of each sequence.
_GENERATE, _REWARD = "_generate_and_score_completions", "_calculate_rewards"
_TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
_FOREIGN_TOKENS = ("tool_mask", "pixel_values", "image_grid_thw")


def record_rollouts(trainer: Any, folder: str | Path) -> None:
    """From now on each training step's rollouts are written to folder/step-000006.parquet.

    The number is the step that they make, counted as the trainer's logs count, the file a run's
    `rollouts.update`: exact token ids, reward (the weighted sum), TRL's advantage, temperature, finish
    reason, the sampler's log-probabilities where vLLM gives them; prompt_index numbers the groups.
    Training is not changed.

    InputError, one line, for several processes, a trainer without TRL's two methods, and settings
    under which the sequences generated are not the step's, one for one: num_iterations over 1,
    steps_per_generation other than gradient_accumulation_steps, mask_truncated_completions. Also for
    settings under which the step is not that of J = sum of advantage x normalisation x l, so that a
    run would predict another: a loss other than dapo, grpo, dr_grpo and bnpo (this one with a single
    micro-batch), a KL term, an entropy bonus, a mask over tokens or sequences, vLLM's importance
    sampling correction, a router's auxiliary loss. When first generating: for tokens that the policy
    did not write (tools), images, or other output.
    """
    _require_recordable(trainer)
    folder, tokenizer = Path(folder), tokenizer_of(trainer)
    generate, reward = getattr(trainer, _GENERATE), getattr(trainer, _REWARD)
    rewards: list[Tensor] = []

    def rewarding(*args: Any, **kwargs: Any) -> Any:
        rewards.append(reward(*args, **kwargs))
        return rewards[-1]

    def generating(*args: Any, **kwargs: Any) -> Any:
        rewards.clear()
        output = generate(*args, **kwargs)
        if trainer.model.training:
            found = _rollouts(trainer, tokenizer, output, rewards)
            name = f"step-{trainer.state.global_step + 1:06d}.parquet"
            write_whole(folder / name, lambda target: save_rollouts(found, target))
        return output

    setattr(trainer, _REWARD, rewarding)
    setattr(trainer, _GENERATE, generating)


def _rollouts(trainer: Any, tokenizer: Any, output: Any, rewards: list[Tensor]) -> Rollouts:
    if missing := [key for key in _TENSORS if not torch.is_tensor(output.get(key))]:
        raise _other_trl(f"{_GENERATE}() returns no tensor {missing[0]}")
    if foreign := [key for key in _FOREIGN_TOKENS if key in output]:
        raise InputError(
            f"the rollouts hold {foreign[0]}: not all of it are tokens that the policy wrote, which is "
            "all that can be recorded; train without tools and images"
        )
    count, of_prompt = len(output["completion_ids"]), trainer.num_generations
    if len(rewards) != 1 or rewards[0].shape != (count, len(trainer.reward_funcs)):
        raise _other_trl(f"{_REWARD}() gives no reward for each of {count} sequences")
    per_function = rewards[0].detach().double().cpu()
    reward_N = (per_function * trainer.reward_weights.double().cpu()).nansum(1)
    reward_N[per_function.isnan().all(1)] = torch.nan  # no function had a reward for it
    prompt_ids = _unpadded(output["prompt_ids"], output["prompt_mask"])
    response_ids = _unpadded(output["completion_ids"], output["completion_mask"])
    eos = set(trainer.eos_token_ids)
    sampler = output.get("sampling_per_token_logps")
    return Rollouts(
        prompt_index=[i // of_prompt for i in range(count)],
        prompt=[tokenizer.decode(ids) for ids in prompt_ids],
        response=[tokenizer.decode(ids, skip_special_tokens=True) for ids in response_ids],
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        finish_reason=["stop" if ids[-1] in eos else "length" for ids in response_ids],
        temperature=float(trainer.temperature),
        reward=reward_N.tolist(),
        advantage=output["advantages"].tolist(),
        sampler_logp=None if sampler is None else _unpadded(sampler, output["completion_mask"]),
    )


def _unpadded(values_NL: Tensor, mask_NL: Tensor) -> list[list[Any]]:
    return [row[keep].tolist() for row, keep in zip(values_NL.cpu(), mask_NL.bool().cpu(), strict=True)]


def _require_recordable(trainer: Any) -> None:
    for name in (_GENERATE, _REWARD):
        if not callable(getattr(trainer, name, None)):
            raise _other_trl(f"{type(trainer).__name__} has no {name}()")
    if trainer.accelerator.num_processes > 1:
        raise InputError(
            f"{trainer.accelerator.num_processes} processes, each with rollouts of its own: record in "
            "a run of one process"
        )
    _require_sequences_of_one_step(trainer.args)
    _require_objective(trainer)


def _require_sequences_of_one_step(args: Any) -> None:
    wanted: dict[str, Any] = {
        **SEQUENCES,
        "steps_per_generation": args.gradient_accumulation_steps,
    }
    for name, value in wanted.items():
        if (found := getattr(args, name, value)) != value:
            raise InputError(
                f"{name} = {found}: the sequences generated are then not those of one optimizer step; "
                f"set it to {value}, or leave it out"
            )


def _require_objective(trainer: Any) -> None:
    """Of the settings that this TRL has."""
    args = trainer.args
    why = "the step is then not that of advantage x normalisation x log-probability, which a run probes"
    loss = getattr(args, "loss_type", None)
    if loss is not None and loss not in LOSSES:
        raise InputError(f"loss_type = {loss}: {why}; set it to one of {', '.join(LOSSES)}")
    if loss == "bnpo" and args.gradient_accumulation_steps > 1:
        raise InputError(
            f"loss_type = bnpo in {args.gradient_accumulation_steps} micro-batches, each with its own "
            f"mean: {why}; set it to dapo, which has one"
        )
    for name, found, off in terms(vars(args)):
        raise InputError(f"{name} = {found}: {why}; set it to {off}")
    if getattr(trainer, "aux_loss_enabled", False):
        raise InputError(f"router_aux_loss_coef is not 0: {why}; set it to 0")


def _other_trl(what: str) -> InputError:
    return InputError(
        f"{what} (trl {importlib.metadata.version('trl')}): rollouts are recorded from GRPOTrainer as "
        "of trl 1.16; install that, or write rollouts in the documented schema"
    )
