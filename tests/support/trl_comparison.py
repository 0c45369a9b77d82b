"""The next step and the log of a TRL training, against those that funcprobe computes."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from funcprobe.adapters import rollouts
from funcprobe.losses.loss import LossInputs, LossReport
from funcprobe.policy.layout import response_mask
from funcprobe.types import Batch
from support.checkpoints import PIECES
from support.trl_cases import Change
from support.trl_training import Distance, Step, captured, distance, ours


def is_of_the_loss(name: str) -> bool:
    """Whether what TRL logs under this name is computed with the loss."""
    return name in {"loss", "policy_loss", "entropy", "kl", "cispo_clip_ratio"} or name.startswith(
        ("clip_ratio/", "vespo/")
    )


def recorded(step: Step) -> tuple[Batch, LossInputs]:
    """From the file that was recorded of the step, where nothing else is known of it."""
    U = rollouts.load_rollouts(step.recorded, len(PIECES), rewards=False, advantages=True, eos_ids=(1,))
    assert U.temperature == step.temperature
    assert U.entropy_coef == step.settings.entropy_coef
    assert U.advantage is not None
    batch = rollouts.to_batch(U)
    return batch, rollouts.loss_inputs(U, batch, torch.tensor(U.advantage, dtype=torch.float64))


def sequences(batch: Batch, inputs: LossInputs) -> list[tuple[object, ...]]:
    """Every sequence with all that is known of it, in an order of its own."""
    arrays = {
        k: x for k, x in inputs._asdict().items() if isinstance(x, torch.Tensor) and k != "prompt_N"
    }
    rows = []
    for i, n in enumerate(batch.response_length_N.tolist()):
        known = {k: repr(x[i, :n].tolist() if x.ndim > 1 else x[i].item()) for k, x in arrays.items()}
        tokens = batch.tokens_NL[i, : int(batch.prompt_length_N[i]) + n].tolist()
        rows.append((tokens, n, inputs.generated_tokens, known))
    return sorted(rows, key=repr)


def require_the_step(step: Step, seen: Sequence[Change]) -> Distance:
    """Parameters and log of the step that TRL took; with each change `seen`, other parameters.

    From the recorded file, in which everything is as TRL gave it to its loss. `pytest -s` shows the
    figures.
    """
    batch, inputs = recorded(step)
    assert sequences(batch, inputs) == sequences(*captured(step.calls))
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
