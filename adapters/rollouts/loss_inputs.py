"""What a loss depends on besides log-probabilities and entropies, from rollouts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from funcprobe.losses.loss import LossInputs
from funcprobe.policy.layout import response_mask
from funcprobe.types import Batch

from .schema import Rollouts, padded, sampler_logp


def loss_inputs(rollouts: Rollouts, batch: Batch, advantage_N: Float[Tensor, " N"]) -> LossInputs:
    """LossInputs of the rows of `batch`, which is `to_batch(rollouts)`.

    Without the columns: all response tokens are in the loss, and the step is one micro-batch of one
    process. Log-probabilities are [N, R] in nats, 0 past the end of a response.
    """
    mask_NR, tokens = response_mask(batch), rollouts.generated_tokens
    if rollouts.loss_mask is not None:
        mask_NR = padded(rollouts.loss_mask, batch) > 0
    return LossInputs(
        advantage_N=advantage_N,
        mask_NR=mask_NR,
        prompt_N=batch.prompt_N,
        microbatch_N=_counted(rollouts.microbatch, batch),
        process_N=_counted(rollouts.process, batch),
        old_logp_NR=None if rollouts.old_logp is None else padded(rollouts.old_logp, batch),
        ref_logp_NR=None if rollouts.ref_logp is None else padded(rollouts.ref_logp, batch),
        sampler_logp_NR=sampler_logp(rollouts, batch),
        generated_tokens_N=None if tokens is None else torch.tensor(tokens, dtype=torch.float64),
    )


def _counted(values: Sequence[int] | None, batch: Batch) -> Tensor:
    return torch.zeros_like(batch.prompt_N) if values is None else torch.tensor(values)
