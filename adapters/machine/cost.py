"""The cost of every stage of a run: seconds, passes over the batches, tokens, memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from funcprobe.policy.forward import Forward
from funcprobe.policy.rows import Rows
from funcprobe.progress import NOTHING_KEPT, Progress
from funcprobe.types import Params

from .ranks import World


@dataclass
class Cost:
    """Cost of one stage, accumulated while it runs."""

    stage: str
    seconds: float = 0.0
    sequences: Counter[str] = field(default_factory=Counter)  # by batch, counted once per pass
    tokens: int = 0
    padding: int = 0  # of these tokens
    drawn: int = 0  # tokens of generation
    drawn_padding: int = 0
    computed: int = 0  # results computed in this run
    reused: int = 0  # results read from an earlier run
    process_peak: int = 0  # bytes
    peak_of_stage: bool = True  # else since the start of the process
    device_peak: int | None = None  # bytes


class Stage(NamedTuple):
    """A stage that is running."""

    cost: Cost
    advance: Callable[[int], None]  # advances the progress bar by this many sequences
    total: int | None = None  # sequences
    say: Callable[[str], None] = lambda _: None
    progress: Progress = NOTHING_KEPT  # of the results that it computes

    def drew(self, tokens: int, padding: int) -> None:
        """Count the tokens that went through the model to sample responses."""
        self.cost.drawn += tokens
        self.cost.drawn_padding += padding

    def found(self, reused: bool) -> None:
        """Count one result, computed in this run or reused from an earlier one."""
        self.cost.reused += reused
        self.cost.computed += not reused


def together(costs: dict[str, Cost], world: World) -> dict[str, Cost]:
    """The costs of all processes: what was counted is added, the highest peaks, the first's time."""
    own, *others = world.gathered(costs)
    for cost in own.values():
        for other in (found[cost.stage] for found in others if cost.stage in found):
            cost.sequences = cost.sequences + other.sequences
            for name in ("tokens", "padding", "drawn", "drawn_padding"):
                setattr(cost, name, getattr(cost, name) + getattr(other, name))
            cost.process_peak = max(cost.process_peak, other.process_peak)
            if other.device_peak is not None:
                cost.device_peak = max(cost.device_peak or 0, other.device_peak)
    return own


def counted(forward: Forward, stage: Stage, batch: str) -> Forward:
    """The same forward, which counts each microbatch as a fraction of a pass over `batch`.

    Its passes keep what they have in the stage's progress.
    """

    def hidden(params: Params, rows: Rows) -> torch.Tensor:
        out = forward.hidden(params, rows)
        sequences = len(rows.sequence_T.unique())
        stage.cost.sequences[batch] += sequences
        stage.cost.tokens += rows.tokens
        stage.cost.padding += rows.padding
        stage.advance(sequences)
        return out

    return forward._replace(hidden=hidden, progress=stage.progress)
