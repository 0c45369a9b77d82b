"""Whether an engine samples from the logits of the model's own forward."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from funcprobe.policy.precision import arithmetic_of
from funcprobe.policy.suitability import causal_lm
from funcprobe.types import InputError

from ..checkpoint.model import Policy

TRIED = 3  # tokens; the second and third come from a cache


def gap(policy: Policy, prompt: Sequence[int], response: Sequence[int], scores_RV: Tensor) -> float:
    """Largest difference of an engine's logits from a forward's, in units of what is allowed.

    `scores_RV`: the logits from which the response's tokens were taken. NaN if the forward's own are
    not finite.
    """
    scores_RV = scores_RV[: len(response)]
    ids_1L = torch.tensor([[*prompt, *response]], device=next(policy.model.parameters()).device)
    with arithmetic_of(dict(policy.model.named_parameters())):
        logits_LV = policy.model(input_ids=ids_1L, use_cache=False).logits[0]
    plain_RV: Float[Tensor, "R V"] = logits_LV[len(prompt) - 1 : -1].to(scores_RV)
    if not bool(plain_RV.isfinite().all()):
        return math.nan
    # Rounding through all layers, and a cache of the values' own precision; padding that is read, and
    # positions that are others, change logits by their size.
    allowed = 0.1 if torch.finfo(logits_LV.dtype).eps > 1e-4 else 1e-3
    error = float((scores_RV - plain_RV).abs().max() / plain_RV.abs().max())
    return math.inf if math.isnan(error) else error / allowed


def refused(policy: Policy, call: str, remedy: str) -> InputError:
    """Responses of this call would be samples of another policy."""
    return InputError(
        f"{type(causal_lm(policy.model)).__name__}: {call} gives other logits than the model's own "
        f"forward, so that its responses are no samples of this policy: {remedy}"
    )
