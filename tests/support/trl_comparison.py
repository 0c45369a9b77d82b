"""The next step and the log of a TRL training, against those that funcprobe computes."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from funcprobe.adapters import rollouts
from funcprobe.losses.loss import LossInputs
from funcprobe.policy.layout import response_mask
from funcprobe.types import Batch, TokenStats
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
        rows.append((tokens, n, known))
    return sorted(rows, key=repr)


def require_the_step(step: Step, seen: Sequence[Change]) -> Distance:
    """Parameters and log of the step that TRL took; with each change `seen`, other parameters.

    From the recorded file, in which everything is as TRL gave it to its loss. `pytest -s` shows the
    figures.
    """
    batch, inputs = recorded(step)
    assert sequences(batch, inputs) == sequences(*captured(step.calls))
    stats, direction = ours(step, batch)
    v, report = direction(step.settings, inputs)
    found, log = distance(v, step.taken), logged(step)
    print(f"largest relative error {found.worst:.1e}, 1 - cosine {1 - found.cosine:.1e}")
    equal = found.is_the_step and report.metrics == log
    if not equal and step.settings.top_entropy_quantile < 1 and tied(step, stats, inputs):
        pytest.skip("tokens of one context are at the threshold of entropy: TRL's rounding decides")
    assert found.is_the_step, found
    assert report.metrics == log
    assert report.loss == report.metrics["loss"]
    for change in seen:
        settings = step.settings._replace(
            **{k: x for k, x in change.items() if k in step.settings._fields}
        )
        arrays = {k: x for k, x in change.items() if k in inputs._fields}
        if "mask_NR" in arrays:
            arrays["mask_NR"] = response_mask(batch)
        if "generated_tokens_N" in arrays:
            arrays["generated_tokens_N"] = torch.full_like(
                inputs.advantage_N, arrays["generated_tokens_N"]
            )
        other, _ = direction(settings, inputs._replace(**arrays))
        assert not distance(other, step.taken).is_the_step, change
    return found


def tied(step: Step, stats: TokenStats, inputs: LossInputs) -> bool:
    """Whether several tokens have the threshold's entropy, up to rounding in float32.

    Those of one context do, such as the first of all responses to a prompt, and TRL keeps some of them.
    """
    for microbatch in inputs.microbatch_N.unique():
        of_it_NR = inputs.mask_NR & (inputs.microbatch_N == microbatch)[:, None]
        h = stats.entropy_NR[of_it_NR].double()
        gap = h - torch.quantile(h, 1 - step.settings.top_entropy_quantile)
        if int((gap.abs() < 1e-5).sum()) > 1:
            return True
    return False


def logged(step: Step) -> Any:
    """All that TRL logged of its loss, under its names, to compare with; None stands for NaN there.

    TRL's sums of up to 96 terms of order 1 are in float32: relative 1e-5, and 1e-6 where they cancel.
    """
    found = {k: math.nan if x is None else x for k, x in step.logged.items() if is_of_the_loss(k)}
    return pytest.approx(found, rel=1e-5, abs=1e-6, nan_ok=True)
