"""The batches of attribution_study.py: how large, and what is computed on them once for all U."""

from collections.abc import Sequence
from typing import NamedTuple

import funcprobe
from funcprobe import Batch, Params
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.stages.batches import Batches, sample
from funcprobe.adapters.stages.plan import Plan
from funcprobe.adapters.store import Stages
from funcprobe.attribution.proxies import PROXIES
from funcprobe.statistics import evaluation
from funcprobe.statistics.evaluation import Evaluation

OF_PAPERS = ("covariance", "own_logit", "discriminator", "quadrant")


class Scale(NamedTuple):
    """How large the batches are, and by what the tokens that leave are chosen."""

    config: str
    E: int
    L: tuple[int, int]  # prompts, responses to each
    F: tuple[int, int]
    measured: Sequence[str]  # a gradient over some of U and a forward over F each
    predicted: Sequence[str]  # the gradient alone


SCALES = {
    "toy": Scale(
        "quickstart",
        512,
        (512, 8),
        (512, 2),
        ("share", "share of L", "marginal of L", *PROXIES, "tabular", "random 0", "random 1"),
        (),
    ),
    "real": Scale(
        "smollm2",
        128,
        (128, 4),
        (24, 4),
        ("share of L", "marginal of L", *OF_PAPERS, "random 0"),
        ("share", "surprisal", "own_logit_ratio", "tabular"),
    ),
}


class Evaluated(NamedTuple):
    """A batch from the policy at theta, with the gradient of the entropy on it."""

    batch: Batch
    at: Evaluation
    X: Params


class Study(NamedTuple):
    plan: Plan
    stages: Stages
    E: Evaluated
    L: Evaluated
    F: Evaluated
    drawn: Batches  # whose E is `E`
    scale: Scale


def with_seed(plan: Plan, seed: int, **sampling: int) -> Plan:
    config = plan.config
    changes = {
        "run": config.run.model_copy(update={"seed": seed}),
        "sampling": config.sampling.model_copy(update=sampling),
    }
    return plan._replace(config=config.model_copy(update=changes))


def prepare(plan: Plan, scale: Scale, stages: Stages) -> Study:
    """E, L and F from seeds that no U has, with statistics and gradients at theta."""
    (of_L, G_L), (of_F, G_F) = scale.L, scale.F
    seeded = with_seed(plan, 10_000, B_E=scale.E, B_U=of_L, G=G_L)
    drawn = sample(seeded, stages, Narrator())
    seeded = with_seed(plan, 10_001, B_U=of_F, G=G_F)
    seeded = seeded._replace(supplied_eval=drawn.eval_rollouts)
    again = sample(seeded, stages, Narrator())
    batches = (drawn.eval_batch, drawn.update.batch, again.update.batch)
    E, L, F = (_evaluated(plan, batch) for batch in batches)
    return Study(plan, stages, E, L, F, drawn, scale)


def _evaluated(plan: Plan, batch: Batch) -> Evaluated:
    params = plan.policy.params
    stats = funcprobe.token_stats(params, batch, plan.forward, plan.max_tokens)
    at = funcprobe.evaluate(batch, stats, plan.entropy)
    p_NR, q_NR = evaluation.gradient_coefficients(at)
    X = funcprobe.weighted_grad(params, batch, p_NR, q_NR, plan.forward, plan.max_tokens)
    return Evaluated(batch, at, X)
