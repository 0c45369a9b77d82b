"""Which prompts of E the largest prompts of U change: a gradient and a pass over E for each."""

from functools import partial

import torch
from torch import Tensor

import funcprobe
from funcprobe.statistics.estimators import FirstOrder

from ..checkpoint.padding import as_trained
from ..console import Narrator
from ..machine.cost import Stage, counted
from ..resume import computed
from ..store import Stages
from .first_order import Predicted, step_inputs
from .like import like


def influences(
    found: Predicted, attribution: funcprobe.Attribution | None, stages: Stages, narrator: Narrator
) -> funcprobe.Influence | None:
    """Columns of the `attribution.influence` prompts of U with the largest shares; None without any.

    By columns, over all of E: a gradient over the prompt's responses, and tangents of E.
    """
    plan, batches, passes = found.plan, found.batches, found.passes
    count = plan.config.attribution.influence
    if attribution is None or not count:
        return None
    columns = largest(attribution.update, count)
    if not columns:
        return None
    E, update, params = batches.eval_batch, batches.update, plan.policy.params
    rows = int(torch.isin(update.batch.prompt_N, torch.tensor(columns)).sum())
    inputs = {**step_inputs(plan, batches), "units": found.unit_N}

    def column(m: int, stage: Stage) -> dict[str, Tensor]:
        return _packed(
            funcprobe.influence(
                params,
                passes,
                E,
                update,
                plan.adam_state,
                counted(plan.forward, stage, "E"),
                columns=[m],
                route="columns",
                entropy=plan.entropy,
                step=plan.step,
                max_tokens=plan.max_tokens,
                sampler_logp_NR=batches.sampler_logp_NR,
                unit_N=found.unit_N,
                update_forward=counted(as_trained(plan.forward, plan.policy.padding), stage, "U"),
            )
        )

    with narrator.phase("influence", rows + len(columns) * len(E.prompt_N)) as stage:
        count = len(E.prompt_N)
        shapes = {
            "pair": like(len(E.prompt_N.unique()), 1),
            "tensor": like(1, len(params)),
            "scalar": like(1, 3),
            "influence": like(1, count),
            "per_sequence": like(1, count),
        }
        each = [
            computed(stages, "influence", {**inputs, "column": m}, shapes, partial(column, m), stage)
            for m in columns
        ]
    packed = {key: torch.cat([of_m[key] for of_m in each], int(key == "pair")) for key in shapes}
    return _unpacked(packed, E.prompt_N.unique(), columns, sorted(params))


def largest(shares: funcprobe.TokenShares, count: int) -> list[int]:
    """The prompts of the largest absolute shares, none of which is 0; at most `count`."""
    order = shares.prompt_M.abs().argsort(descending=True, stable=True)[:count].tolist()
    return [int(shares.prompt_index_M[m]) for m in order if shares.prompt_M[m] != 0]


def _packed(found: funcprobe.Influence) -> dict[str, Tensor]:
    def rows(values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    shares = found.share_M
    return {
        "pair": found.pair_NM,
        "tensor": rows([[by[name] for name in sorted(by)] for by in found.tensor_M]),
        "scalar": rows([[s.derivative, s.se, s.se_jackknife] for s in shares]),
        "influence": torch.stack([s.influence_N for s in shares]),
        "per_sequence": torch.stack([s.per_sequence_N for s in shares]),
    }


def _unpacked(
    packed: dict[str, Tensor], row_N: Tensor, columns: list[int], names: list[str]
) -> funcprobe.Influence:
    shares = [
        FirstOrder(derivative, se, jackknife, influence_N, per_N)
        for (derivative, se, jackknife), influence_N, per_N in zip(
            packed["scalar"].tolist(), packed["influence"], packed["per_sequence"], strict=True
        )
    ]
    return funcprobe.Influence(
        packed["pair"],
        row_N,
        torch.tensor(columns),
        tuple(shares),
        tuple(dict(zip(names, by, strict=True)) for by in packed["tensor"].tolist()),
    )
