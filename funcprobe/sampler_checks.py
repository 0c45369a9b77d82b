"""Sanity checks of who sampled the batches: the policy, or a sampler with log-probabilities."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from .checks import Check
from .policy.layout import response_mask
from .statistics import sampler
from .types import Batch, TokenStats


def sampled_from_policy(batch: Batch, stats: TokenStats, name: Literal["E", "U"] = "E") -> Check:
    """z-score of sum_ik (l_ik + h_ik), whose mean is 0 if theta sampled the batch (`entropy_drift`)."""
    found = sampler.entropy_drift(stats, response_mask(batch))
    remedy = {
        "E": "supply its sampler_logp, or sample it here",
        "U": "supply the rollouts of this checkpoint's next step; nothing is wrong if the trainer "
        "itself samples so",
    }
    return Check(
        f"{name} is sampled from the policy",
        abs(found.z) < 4,
        f"log-probability plus entropy of a response {found.mean:+.3g} nats, standard error "
        f"{found.se:.2g}, z = {found.z:.2g}",
        "|z| < 4",
        f"{name} was sampled at another temperature, with top_p or top_k, or from another policy: "
        f"{remedy[name]}",
        advisory=True,
    )


def sampler_near_policy(
    batch: Batch, stats: TokenStats, sampler_logp_NR: Float[Tensor, "N R"]
) -> Check:
    """ESS of the whole-response weights of theta against the sampler, at eta = 0.

    Beside it the root mean square of l - l_sampler over all tokens, nats.
    """
    mask_NR = response_mask(batch)
    gap_NR = (stats.logp_NR - sampler_logp_NR).double() * mask_NR
    log_ratio_N, rms = gap_NR.sum(1), float((gap_NR.square().sum() / mask_NR.sum()).sqrt())
    weight_N = (log_ratio_N - log_ratio_N.max()).exp()
    ess, count = float(weight_N.sum().square() / weight_N.square().sum()), len(weight_N)
    return Check(
        "E's sampler is near the policy",
        ess >= count / 2,
        f"ESS {ess:.4g} of {count} at eta = 0; log-probability of a token {rms:.2g} nats from the "
        "policy's, root mean square",
        f">= {count / 2:g}",
        "E was sampled by an older policy, or sampler_logp is not the sampler's",
        advisory=True,
    )


def sampler_logp_is_its_own(
    batch: Batch, stats: TokenStats, sampler_logp_NR: Float[Tensor, "N R"]
) -> Check:
    """z-score of sum_ik (policy's / sampler's probability - 1), of mean 0 (`ratio_drift`).

    A sum within the rounding of sampler_logp to bfloat16 passes: half a unit in the last place, 2^-9 of
    its size. Where few contexts recur, such errors do not average out.
    """
    mask_NR = response_mask(batch)
    found = sampler.ratio_drift(stats, sampler_logp_NR, mask_NR)
    rounding = 2**-9 * float((sampler_logp_NR.abs() * mask_NR).sum()) / len(mask_NR)
    return Check(
        "sampler_logp is the sampler's",
        abs(found.z) < 4 or abs(found.mean) < rounding,
        f"probability ratio to the sampler minus 1, summed over a response, {found.mean:+.3g}, "
        f"standard error {found.se:.2g}, z = {found.z:.2g}",
        f"|z| < 4, or a sum below {rounding:.2g} (rounding to bfloat16)",
        "sampler_logp is not of the distribution that E was drawn from: taken before the temperature, "
        "or of another model; or top_p or top_k kept the sampler from tokens that the policy samples",
        advisory=True,
    )


def explained_by_temperature(
    found: Check,
    batch: Batch,
    stats: TokenStats,
    untempered: TokenStats,
    sampler_logp_NR: Float[Tensor, "N R"],
) -> Check:
    """A failed `sampler_logp_is_its_own` with its cause, if that is the missing temperature.

    `stats` are those of a few responses at the temperature of sampling, `untempered` at 1. The cause is
    found where sampler_logp is nearer to the latter by a factor of ten, root mean square over tokens.
    """
    mask_NR = response_mask(batch)
    gap, gap_at_1 = (
        float((at.logp_NR - sampler_logp_NR)[mask_NR].double().square().mean().sqrt())
        for at in (stats, untempered)
    )
    if found.passed or not gap_at_1 < gap / 10:
        return found
    return found._replace(
        saw=f"{found.saw}; {gap_at_1:.2g} nats from the policy's at temperature 1, {gap:.2g} from "
        "those at the temperature of sampling",
        failure_means="these are log-probabilities before the temperature (vLLM's logprobs_mode = "
        "raw_logprobs): supply processed ones (processed_logprobs), or drop the column",
    )
