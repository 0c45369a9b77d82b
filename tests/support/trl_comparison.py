"""The next step and the log of a TRL training, against those that funcprobe computes."""

import math
from collections.abc import Mapping, Sequence

import pytest

from funcprobe.losses.loss import LossInputs, LossReport
from funcprobe.policy.layout import response_mask
from funcprobe.types import Batch
from support.trl_cases import Change
from support.trl_training import Distance, Step, distance, ours


def is_of_the_loss(name: str) -> bool:
    """Whether what TRL logs under this name is computed with the loss."""
    return name in {"loss", "policy_loss", "entropy", "kl", "cispo_clip_ratio"} or name.startswith(
        ("clip_ratio/", "vespo/")
    )


def require_the_step(step: Step, batch: Batch, inputs: LossInputs, seen: Sequence[Change]) -> Distance:
    """Parameters and log of the step that TRL took; with each change `seen`, other parameters.

    `pytest -s` shows the figures.
    """
    direction = ours(step, batch)
    v, report = direction(step.settings, inputs)
    found = distance(v, step.taken)
    print(f"largest relative error {found.worst:.1e}, 1 - cosine {1 - found.cosine:.1e}")
    assert found.is_the_step, found
    require_the_log(report, step.logged)
    for change in seen:
        settings = step.settings._replace(
            **{k: x for k, x in change.items() if k in step.settings._fields}
        )
        arrays = {k: x for k, x in change.items() if k in inputs._fields}
        if "mask_NR" in arrays:
            arrays["mask_NR"] = response_mask(batch)
        other, _ = direction(settings, inputs._replace(**arrays))
        assert not distance(other, step.taken).is_the_step, change
    return found


def require_the_log(report: LossReport, logged: Mapping[str, float | None]) -> None:
    """All that TRL logged of its loss, under its names.

    TRL's sums of up to 96 terms of order 1 are in float32: relative 1e-5, and 1e-6 where they cancel.
    None stands for NaN, as in TRL's log.
    """
    theirs = {k: math.nan if x is None else x for k, x in logged.items() if is_of_the_loss(k)}
    assert report.loss == pytest.approx(report.metrics["loss"], rel=1e-12)
    assert report.metrics == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True)
