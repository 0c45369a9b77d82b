"""The settings of TRL's loss that its next step is compared for, and what the comparison must see."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from trl import GRPOTrainer

Change = dict[str, Any]


def unchanged(_: GRPOTrainer) -> None:
    """The trainer as it is."""


class Case(NamedTuple):
    """Settings of GRPOConfig; changes of the loss, or of its arrays, with which the step is another.

    The changes are tried where all of the loss is at work: in the second iteration over the rollouts,
    in several micro-batches.
    """

    settings: Change
    seen: Sequence[Change]
    prepare: Callable[[GRPOTrainer], None] = unchanged


def _logps(trainer: GRPOTrainer, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Of the policy as it is, with noise of 0.1 nats, as another program's would be."""
    tokens = torch.tensor([[*prompt, *ids]])
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, tokens, torch.ones_like(tokens), len(ids)
        )
    noise = torch.Generator().manual_seed(len(prompt) + sum(ids))
    noisy = found[0] + 0.1 * torch.randn(len(ids), generator=noise)
    return [float(x) for x in noisy.clamp(max=0.0)]


class _Sampler:
    """In the place of VLLMGeneration: the policy's own samples, and other log-probabilities of them.

    The log-probability of the first token of a generation is unknown, as vLLM's are at times.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], num_generations: int, **_: Any) -> tuple[Any, ...]:
        self.trainer.use_vllm = False
        responses, _ = self.trainer._generate_single_turn(prompts, None, {}, num_generations)
        self.trainer.use_vllm = True
        logps: list[list[list[float | None]]] = [
            [[x] for x in _logps(self.trainer, *row)] for row in zip(prompts, responses, strict=True)
        ]
        logps[0][0] = [None]
        return None, responses, logps, None


def sampled_by_vllm(trainer: GRPOTrainer) -> None:
    """vLLM itself needs a GPU: `use_vllm` is set after the trainer has not started it."""
    trainer.vllm_generation = _Sampler(trainer)
    trainer.use_vllm = trainer.args.use_vllm = True
    trainer._last_loaded_step = -1


def sampled_by_a_function(trainer: GRPOTrainer) -> None:
    """A `rollout_func`: it gives log-probabilities, and says which tokens the policy generated."""

    def rollouts(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        ids, *_ = trainer._tokenize_prompts(prompts)
        responses, _ = trainer._generate_single_turn(ids, None, {}, trainer.num_generations)
        rows = list(zip(ids, responses, strict=True))
        return {
            "prompt_ids": ids,
            "completion_ids": responses,
            "logprobs": [_logps(trainer, *row) for row in rows],
            "env_mask": [[int(i != 1) for i in range(len(response))] for response in responses],
        }

    trainer.rollout_func = rollouts


# Narrow, so that at the ratios of a second iteration all that is clipped is.
NARROW = {"epsilon": 0.02, "epsilon_high": 0.03}
TYPES = {
    "grpo": NARROW,
    "dapo": NARROW,
    "bnpo": NARROW,
    "dr_grpo": NARROW,
    "luspo": NARROW | {"importance_sampling_level": "sequence"},
    "cispo": {"epsilon_high": 1.03},
    "sapo": {"sapo_temperature_pos": 3.0, "sapo_temperature_neg": 5.0},
    "vespo": {},
}
CLIPPED: Change = {"loss_type": "dapo", **NARROW}
TOKEN, OFF = {"importance_sampling_level": "token"}, {"vllm_importance_sampling_correction": False}
QUANTILE, ENTROPY = {"top_entropy_quantile": 0.2}, {"entropy_coef": 0.01}

CASES = {
    name: Case(
        {"loss_type": name, **settings},
        [{"loss_type": other, "importance_sampling_level": "token"} for other in TYPES if other != name]
        + [{key: 0.5} for key in settings if "level" not in key]
        + [{"old_logp_NR": None}],
    )
    for name, settings in TYPES.items()
} | {
    "kl": Case(
        CLIPPED | {"beta": 0.04},
        [{"beta": 0.0}, {"beta": -0.04}, {"use_bias_correction_kl": False}],
    ),
    "kl as estimated": Case(
        CLIPPED | {"beta": 0.04, "use_bias_correction_kl": False},
        [{"beta": 0.0}, {"use_bias_correction_kl": True}],
    ),
    "entropy": Case(CLIPPED | ENTROPY, [{"entropy_coef": 0.0}, {"entropy_coef": -0.01}]),
    # At the sixth step the coefficient has been raised five times, and is in effect.
    "adaptive entropy": Case(
        CLIPPED
        | ENTROPY
        | {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.002},
        [{"entropy_coef": 0.0}, {"entropy_coef": 0.01}, {"entropy_coef": 0.022}],
    ),
    "adaptive entropy above its target": Case(
        CLIPPED | ENTROPY | {"use_adaptive_entropy": True, "entropy_target": 0.0},
        [{"entropy_coef": 0.01}],
    ),
    "quantile": Case(CLIPPED | QUANTILE, [{"top_entropy_quantile": x} for x in (0.3, 1.0)]),
    "quantile of grpo, entropy and kl": Case(
        NARROW | {"loss_type": "grpo", "beta": 0.04} | QUANTILE | ENTROPY,
        [{"top_entropy_quantile": 1.0}, {"entropy_coef": 0.0}, {"beta": 0.0}],
    ),
    "delta": Case(CLIPPED | {"delta": 1.05}, [{"delta": None}]),
    "off-policy mask": Case(
        CLIPPED | {"off_policy_mask_threshold": 0.02}, [{"off_policy_mask_threshold": None}]
    ),
    "gspo": Case(
        NARROW | {"loss_type": "grpo", "importance_sampling_level": "sequence"}, [TOKEN]
    ),
    "gspo of sapo, kl": Case(
        {"loss_type": "sapo", "importance_sampling_level": "sequence", "beta": 0.04},
        [TOKEN, {"beta": 0.0}, {"use_bias_correction_kl": False}],
    ),
    "luspo by token, quantile": Case(
        NARROW | {"loss_type": "luspo"} | QUANTILE, [{"top_entropy_quantile": 1.0}]
    ),
    # Of a sequence whose tokens TRL masks the old log-probabilities mean nothing, and the ratio is
    # clipped: it is the entropy that tells whether they are in the loss.
    "truncated": Case(
        CLIPPED | ENTROPY | {"mask_truncated_completions": True},
        [{"mask_NR": None}, {"generated_tokens_N": 80.0}],
    ),
    "truncated, of grpo": Case(
        NARROW | ENTROPY | {"loss_type": "grpo", "mask_truncated_completions": True},
        [{"mask_NR": None}],
    ),
    "vllm": Case(
        CLIPPED | {"vllm_importance_sampling_clip_max": 1.1},
        [OFF, {"vllm_importance_sampling_clip_max": 3.0}],
        sampled_by_vllm,
    ),
    "vllm, sequence_truncate": Case(
        CLIPPED
        | {
            "vllm_importance_sampling_mode": "sequence_truncate",
            "vllm_importance_sampling_clip_max": 1.2,
        },
        [OFF, {"vllm_importance_sampling_mode": "sequence_mask"}],
        sampled_by_vllm,
    ),
    "vllm, token_truncate": Case(
        CLIPPED
        | {
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 1.1,
            "vllm_importance_sampling_clip_min": 0.9,
        },
        [OFF, {"vllm_importance_sampling_mode": "token_mask"}],
        sampled_by_vllm,
    ),
    "vllm, token_mask, off-policy mask": Case(
        CLIPPED
        | {
            "vllm_importance_sampling_mode": "token_mask",
            "vllm_importance_sampling_clip_max": 1.1,
            "off_policy_mask_threshold": 0.02,
        },
        [OFF, {"off_policy_mask_threshold": None}, {"use_vllm": False}],
        sampled_by_vllm,
    ),
    "vllm, vespo": Case(
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
        [OFF, {"sampler_logp_NR": None, "use_vllm": False}],
        sampled_by_vllm,
    ),
    "vllm without correction, off-policy mask": Case(
        CLIPPED | OFF | {"off_policy_mask_threshold": 0.02},
        [{"off_policy_mask_threshold": None}, {"use_vllm": False, "sampler_logp_NR": None}],
        sampled_by_vllm,
    ),
    "rollout_func, off-policy mask": Case(
        CLIPPED | {"off_policy_mask_threshold": 0.02},
        [{"mask_NR": None}, {"sampler_logp_NR": None}],
        sampled_by_a_function,
    ),
}  # fmt: skip

# Of gradient accumulation 1 and 4, num_iterations 1 and 2, temperature 0.7 and 1.3, every pair of
# values occurs together. The last two generate more than a step takes.
LAYOUTS: dict[str, Change] = {
    "first": {"num_iterations": 1, "temperature": 0.7},
    "first, accumulated": {
        "num_iterations": 1,
        "temperature": 1.3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
    "second": {"num_iterations": 2, "temperature": 1.3},
    "second, accumulated": {
        "num_iterations": 2,
        "temperature": 0.7,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
    "half of a generation": {"per_device_train_batch_size": 8, "steps_per_generation": 2},
    "half of a generation, accumulated": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
    },
    # Of the toy's 6 prompts an epoch has three generations of two prompts: a step takes two.
    "several generations": {
        "per_device_train_batch_size": 8,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 2,
        "num_iterations": 1,
    },
}
GENERAL = "second, accumulated"  # where a case's changes must be seen
