"""A step of TRL's own loss on given arrays, without a model: a generation, then the calls."""

import math
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from funcprobe import LossInputs
from funcprobe.losses.trl import TrlLoss

EOS = 1


class Ranks:
    """Collectives of threads that stand for processes: each rank reads what all of them gave."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=60)
        self.given: list[Any] = [None] * number

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Accelerator:
    device = torch.device("cpu")
    is_main_process = False

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.process_index, self.num_processes = ranks, rank, len(ranks.given)
        self.sync_gradients = False

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat([torch.atleast_1d(y) for y in self.ranks.exchange(self.process_index, x)])

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return torch.stack(self.ranks.exchange(self.process_index, x)).sum(0)

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        assert dim == 0
        longest = max(map(len, self.ranks.exchange(self.process_index, x)))
        return torch.nn.functional.pad(x, (0, longest - len(x)), value=pad_index)


def trainer(s: TrlLoss, accelerator: Accelerator, microbatches: int) -> SimpleNamespace:
    """What `_generate_and_score_completions` and `_compute_loss` read of a GRPOTrainer, and no more."""
    steps = s.steps_per_generation or s.gradient_accumulation_steps
    self = SimpleNamespace(
        **s._asdict(),
        args=SimpleNamespace(
            **{**s._asdict(), "steps_per_generation": steps},
            entropy_target=math.inf,  # the coefficient given is the one in effect
            entropy_coef_delta=0.005,
            entropy_coef_min=0.0,
            entropy_coef_max=1.0,
            per_device_train_batch_size=1,
            gradient_checkpointing_kwargs=None,
        ),
        accelerator=accelerator,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=SimpleNamespace(),
        current_gradient_accumulation_steps=microbatches,
        epsilon_low=s.epsilon,
        aux_loss_enabled=False,
        environment_factories=None,
        environments=None,
        tools=[],
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        num_generations=1,
        num_iterations=2,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="none",
        reward_weights=torch.ones(1),
        reward_func_names=["one"],
        log_multimodal=False,
        _pending_extra_logs={},
        _pending_metrics={},
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=s.entropy_coef != 0.0 or s.use_adaptive_entropy,
        _last_world_entropy=0.0,
        _entropy_window_stats=None,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    self.epsilon_high = s.epsilon if s.epsilon_high is None else s.epsilon_high
    self.get_high_entropy_mask = MethodType(GRPOTrainer.get_high_entropy_mask, self)
    return self


def generation(
    self: SimpleNamespace, inputs: LossInputs, length_N: Tensor, total: int
) -> dict[str, Any]:
    """TRL's own batch of these rows: masks, tokens of the step, ratios to the sampler."""
    rows = range(len(length_N))
    sampler = None  # vLLM gives these, and a rollout_func may
    if inputs.sampler_logp_NR is not None:
        sampler = [inputs.sampler_logp_NR[i, : length_N[i]].tolist() for i in rows]
    masks = [inputs.mask_NR[i, : length_N[i]].long().tolist() for i in rows]
    tokens = [[EOS] * int(n) for n in length_N]
    self._generate = lambda _: ([[EOS]] * len(tokens), tokens, masks, tokens, sampler, {}, None, None)
    self._calculate_rewards = lambda *_: torch.ones(total, 1)

    def logps(model, *_, **__):
        return (inputs.ref_logp_NR if model is self.ref_model else inputs.old_logp_NR), None, None

    self._get_per_token_logps_and_entropies = logps
    # TRL computes the old log-probabilities unless the steps of a generation divide this number.
    self.args.gradient_accumulation_steps = 0 if inputs.old_logp_NR is None else 1
    found = GRPOTrainer._generate_and_score_completions(self, [{"prompt": "x"} for _ in rows])
    return found | {"advantages": inputs.advantage_N}


def of_rows(inputs: LossInputs, rows: Tensor) -> LossInputs:
    return LossInputs(*(x[rows] if isinstance(x, Tensor) else x for x in inputs))


def trl_step(
    s: TrlLoss, l_NR: Tensor, h_NR: Tensor, inputs: LossInputs, length_N: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, float]]:
    """Loss of the step, its gradients in l and h by autograd, and what TRL logs of it.

    One thread per process; each process's first row has to be of the longest length.
    """
    l_NR, h_NR = l_NR.clone().requires_grad_(), h_NR.clone().requires_grad_()
    steps, processes = int(inputs.microbatch_N.max()) + 1, int(inputs.process_N.max()) + 1
    ranks = Ranks(processes)

    def process(rank: int) -> tuple[Tensor, dict[str, list[float]]]:
        try:
            self = trainer(s, Accelerator(ranks, rank), steps)
            own = (inputs.process_N == rank).nonzero()[:, 0]
            batch = generation(self, of_rows(inputs, own), length_N[own], len(length_N))
            self._metrics["train"].clear()
            losses = []
            for step in range(steps):
                rows = inputs.microbatch_N[own] == step
                of_it = {k: x[rows] if x.dim() else x for k, x in batch.items()}
                at = own[rows]
                if inputs.generated_tokens_N is not None:
                    of_it["num_items_in_batch"] = inputs.generated_tokens_N[at[0]].float()
                self._get_per_token_logps_and_entropies = lambda *_, at=at, **__: (
                    l_NR[at],
                    h_NR[at],
                    None,
                )
                self.accelerator.sync_gradients = step == steps - 1
                losses.append(GRPOTrainer._compute_loss(self, self.model, of_it))
            return torch.stack(losses).sum(), self._metrics["train"]
        except BaseException:
            ranks.barrier.abort()
            raise

    with ThreadPoolExecutor(processes) as pool:
        losses, logs = zip(*pool.map(process, range(processes)), strict=True)
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, (l_NR, h_NR), allow_unused=True)
    zeros = (
        torch.zeros_like(x) if g is None else g for x, g in zip((l_NR, h_NR), gradients, strict=True)
    )
    numbers = {name: [x for x in found if not math.isnan(x)] for name, found in logs[0].items()}
    means = {name: sum(x) / len(x) if x else math.nan for name, x in numbers.items()}
    return loss.detach(), tuple(zeros), means
