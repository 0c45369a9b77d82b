"""The rollouts of each optimizer step of TRL's GRPOTrainer, token by token, for rollouts.update."""

# ruff: noqa: ARG002  (the arguments are the trainer's)
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from funcprobe.types import InputError

from ..rollouts import Rollouts, save_rollouts
from ..rollouts.files import of_rank
from ..store import write_whole
from .dropout import warn_of_dropout
from .gradients import GradientRing, require_count
from .live import tokenizer_of
from .recordable import images, other_trl, require_recordable
from .unharmed import unharmed, warn

# Private methods of TRL (1.16), and the tensors that the first returns for the sequences.
_GENERATE, _REWARD = "_generate_and_score_completions", "_calculate_rewards"
_LOSS = "_compute_loss"
_TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
_ROW = "funcprobe_row"  # place in the generation; TRL shuffles and splits it with the sequences


def record_rollouts(trainer: Any, folder: str | Path, *, gradients: int | None = None) -> None:
    """Write the rollouts of each following training step to folder/step-000006.parquet.

    The number is that of the step that uses them, as in the trainer's logs; the file is a run's
    `rollouts.update`: of every sequence in the step's micro-batches, as the loss was given them, exact
    token ids, reward (the weighted sum), advantage, temperature, finish reason, which tokens are in the
    loss, those of its generation, micro-batch, process, and log-probabilities of the old policy, the
    reference and the sampler where the loss has them; prompt_index is the index of the group. Of
    several processes each writes its own, step-000006.rank-00000-of-00002.parquet; the first name
    stands for all. Training is unchanged; evaluations are not recorded. A step that cannot be recorded
    (a full disk, an error of any kind) is one warning with its reason, and training goes on.

    With `gradients` = K, folder/step-000006.safetensors has what the optimizer made the step from: the
    accumulated, clipped gradient of the loss and the parameters before the step, by name. The last K
    steps' are kept there, and linked into checkpoint-N/gradients as it is saved; two adapters each.

    Raises InputError, one line, for a trainer without TRL's methods, for images, and for RLOOTrainer
    where a step may use responses of an earlier policy. Before the first step: for generations other
    than TRL's; with `gradients`, for sharded models, float16 with a scaler, and an optimizer other than
    AdamW. Warns where the model has dropout, since the masks of the step are not recorded, and of a
    router's loss.
    """
    require_recordable(trainer, (_GENERATE, _REWARD, _LOSS))
    require_count(gradients)
    warn_of_dropout(
        trainer.model,
        "the step has random masks, which rollouts do not contain, so that no run on them can repeat "
        "it: train without dropout, or set step.masks in the run, for the mean and spread over masks",
    )
    recorder = _Recorder(trainer, Path(folder))
    for name, method in (
        (_REWARD, recorder.rewarding),
        (_GENERATE, recorder.generating),
        (_LOSS, recorder.computing),
    ):
        setattr(trainer, name, method)
    trainer.add_callback(recorder)
    if gradients is not None:
        trainer.add_callback(GradientRing(trainer, Path(folder), gradients))


class _Generation(NamedTuple):
    """Of a generation's sequences on this process, what the tensors of a micro-batch do not contain."""

    number: int  # of this training
    length: list[int]
    reward: list[float]
    group: list[int]  # over all processes
    groups: int


class _Sequence(NamedTuple):
    """A sequence of one micro-batch. Sorted as generated, whatever the order of the micro-batches."""

    generation: int
    row: int
    microbatch: int
    group: int
    prompt_ids: list[int]
    response_ids: list[int]
    reward: float
    advantage: float
    loss_mask: list[bool]
    logp: dict[str, list[float]]


class _Call(NamedTuple):
    """What the sequences of one call of the loss have in common."""

    groups: int
    entropy_coef: float
    generated_tokens: float | None


class _Recorder(TrainerCallback):
    """Collects the micro-batches of a step as the loss is called, and writes them before the step."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.tokenizer = tokenizer_of(trainer)
        self.generate, self.reward = getattr(trainer, _GENERATE), getattr(trainer, _REWARD)
        self.loss = getattr(trainer, _LOSS)
        self.scored: list[tuple[Tensor, list[int]]] = []  # of the generation in progress
        self.generation: _Generation | None = None
        self.generations = 0
        self.sequences: list[_Sequence] = []
        self.calls: list[_Call] = []
        self.begun = False  # whether a step has been taken, which nothing here may take back
        self.lost: str | None = None  # why the step in progress is not recorded
        self.lost_generation = ""  # why its generation is not

    def rewarding(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        length: list[int] = []
        with unharmed():  # what is lost here is missed by _generation
            length += [len(y) for y in ids]
        found = self.reward(inputs, prompts, completions, ids)
        self.scored.append((found, length))
        return found

    def generating(self, *args: Any, **kwargs: Any) -> Any:
        self.scored.clear()
        output = self.generate(*args, **kwargs)
        if not self.trainer.model.training:
            return output
        self.generation = None
        with unharmed(refuses=not self.begun) as attempt:
            self.generation = self._generation(output)
            self.generations += 1
            return {**output, _ROW: torch.arange(len(self.generation.length))}
        self.lost_generation = attempt.reason or ""
        return output

    def computing(self, model: Any, inputs: Any) -> Any:
        if self.trainer.model.training and self.lost is None:
            with unharmed(refuses=not self.begun) as attempt:
                self._keep(inputs)
            self.lost = attempt.reason
        return self.loss(model, inputs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sequences, self.calls, self.lost = [], [], None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, self.begun = state.global_step + 1, True
        with unharmed() as attempt:
            if self.calls and self.lost is None:
                self._write(step)
        if (reason := self.lost or attempt.reason) is not None:
            warn(f"step {step} is not recorded: {reason}")
        self.sequences, self.calls, self.lost = [], [], None

    def _write(self, step: int) -> None:
        path = self.folder / f"step-{step:06d}.parquet"
        if (count := self.trainer.accelerator.num_processes) > 1:
            path = of_rank(path, self.trainer.accelerator.process_index, count)
        found = self._rollouts()._replace(step=step)
        write_whole(path, lambda target: save_rollouts(found, target))

    def _generation(self, output: Any) -> _Generation:
        if missing := [key for key in _TENSORS if not torch.is_tensor(output.get(key))]:
            raise other_trl(f"{_GENERATE}() returns no tensor {missing[0]}")
        if "pixel_values" in output:
            raise images()
        if output["advantages"].ndim != 1:
            raise other_trl(f"{_GENERATE}() returns no advantage of a sequence")
        trainer, count = self.trainer, len(output["completion_ids"])
        total, rank = count * trainer.accelerator.num_processes, trainer.accelerator.process_index
        expected = (total, len(trainer.reward_funcs))
        if len(self.scored) != 1 or self.scored[0][0].shape != expected:
            raise other_trl(f"{_REWARD}() does not return a reward for each of {total} sequences")
        (scored, length), of_prompt = self.scored[0], trainer.num_generations
        per_function = scored.detach().double().cpu()[rank * count : (rank + 1) * count]
        reward_N = (per_function * trainer.reward_weights.double().cpu()).nansum(1)
        reward_N[per_function.isnan().all(1)] = torch.nan  # no function applied
        return _Generation(
            number=self.generations,
            length=length,
            reward=reward_N.tolist(),
            group=[(rank * count + i) // of_prompt for i in range(count)],
            groups=-(-total // of_prompt),
        )

    def _keep(self, inputs: Any) -> None:
        """The sequences of a micro-batch, as the loss is given them."""
        made = self.generation
        if self.lost_generation and _ROW not in inputs:
            raise InputError(f"its generation was not: {self.lost_generation}")
        if made is None or _ROW not in inputs:
            raise other_trl(f"{_LOSS}() is not given what {_GENERATE}() returns")
        rows = inputs[_ROW].tolist()
        length = [made.length[row] for row in rows]
        mask_NR = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        prompts = inputs["prompt_ids"].tolist()
        prompt_mask = inputs["prompt_mask"].bool().tolist()
        responses = _cut(inputs["completion_ids"], length)
        masks, advantages = _cut(mask_NR.bool(), length), inputs["advantages"].tolist()
        logps = {
            name: _cut(inputs[key], length)
            for name, key in (
                ("old_logp", "old_per_token_logps"),
                ("ref_logp", "ref_per_token_logps"),
                ("sampler_logp", "sampling_per_token_logps"),
            )
            if inputs.get(key) is not None
        }
        for i, row in enumerate(rows):
            prompt = zip(prompts[i], prompt_mask[i], strict=True)
            self.sequences.append(
                _Sequence(
                    generation=made.number,
                    row=row,
                    microbatch=len(self.calls),
                    group=made.group[row],
                    prompt_ids=[token for token, real in prompt if real],
                    response_ids=responses[i],
                    reward=made.reward[row],
                    advantage=advantages[i],
                    loss_mask=masks[i],
                    logp={name: of_rows[i] for name, of_rows in logps.items()},
                )
            )
        tokens = inputs.get("num_items_in_batch")
        self.calls.append(
            _Call(
                groups=made.groups,
                entropy_coef=_entropy_coef(self.trainer),
                generated_tokens=None if tokens is None else float(tokens),
            )
        )

    def _rollouts(self) -> Rollouts:
        trainer, found = self.trainer, sorted(self.sequences, key=lambda x: x[:3])
        numbers = sorted({x.generation for x in found})
        first = {number: i * self.calls[0].groups for i, number in enumerate(numbers)}
        eos, calls = set(trainer.eos_token_ids), [self.calls[x.microbatch] for x in found]

        def logp(name: str) -> list[list[float]] | None:
            return [x.logp[name] for x in found] if name in found[0].logp else None

        return Rollouts(
            prompt_index=[first[x.generation] + x.group for x in found],
            prompt=[self.tokenizer.decode(x.prompt_ids) for x in found],
            response=[self.tokenizer.decode(x.response_ids, skip_special_tokens=True) for x in found],
            prompt_ids=[x.prompt_ids for x in found],
            response_ids=[x.response_ids for x in found],
            finish_reason=[
                "stop" if x.response_ids and x.response_ids[-1] in eos else "length" for x in found
            ],
            temperature=float(trainer.temperature),
            reward=[x.reward for x in found],
            advantage=[x.advantage for x in found],
            sampler_logp=logp("sampler_logp"),
            old_logp=logp("old_logp"),
            ref_logp=logp("ref_logp"),
            loss_mask=[x.loss_mask for x in found],
            microbatch=[x.microbatch for x in found],
            process=[trainer.accelerator.process_index] * len(found),
            generated_tokens=[x.generated_tokens for x in calls if x.generated_tokens is not None]
            or None,
            entropy_coef=calls[0].entropy_coef,
        )


def _cut(values_NR: Tensor, length: list[int]) -> list[list[Any]]:
    return [row[:n] for row, n in zip(values_NR.tolist(), length, strict=True)]


def _entropy_coef(trainer: Any) -> float:
    """The coefficient of the entropy bonus in this step, as TRL 1.16 gates it (`_compute_loss`)."""
    adaptive = getattr(trainer, "use_adaptive_entropy", False)
    if adaptive and not trainer._last_world_entropy <= trainer.args.entropy_target:
        return 0.0
    return float(getattr(trainer, "entropy_coef", 0.0))
