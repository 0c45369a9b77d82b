"""What every stage of a run takes: seconds, passes over the batches, tokens, memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from funcprobe.policy.forward import Forward
from funcprobe.policy.rows import Rows
from funcprobe.types import Params


@dataclass
class Cost:
    """What one stage took. It is added to while the stage runs."""

    stage: str
    seconds: float = 0.0
    sequences: Counter[str] = field(default_factory=Counter)  # by batch, each as often as it was seen
    tokens: int = 0
    padding: int = 0  # of these tokens
    drawn: int = 0  # tokens of generation
    drawn_padding: int = 0
    computed: int = 0  # results that were made,
    reused: int = 0  # and that an earlier run had made
    process_peak: int = 0  # bytes
    peak_of_stage: bool = True  # else since the process began
    device_peak: int | None = None  # bytes


class Stage(NamedTuple):
    """A stage that is running."""

    cost: Cost
    advance: Callable[[int], None]  # the progress bar, by this many sequences

    def drew(self, tokens: int, padding: int) -> None:
        """Responses were sampled, and so many tokens went through the model for them."""
        self.cost.drawn += tokens
        self.cost.drawn_padding += padding

    def found(self, reused: bool) -> None:
        """One result is there, new or of an earlier run."""
        self.cost.reused += reused
        self.cost.computed += not reused


def counted(forward: Forward, stage: Stage, batch: str) -> Forward:
    """The same forward; every microbatch that it is given counts as so much of a pass over `batch`."""

    def hidden(params: Params, rows: Rows) -> torch.Tensor:
        out = forward.hidden(params, rows)
        sequences = len(rows.sequence_T.unique())
        stage.cost.sequences[batch] += sequences
        stage.cost.tokens += rows.tokens
        stage.cost.padding += rows.padding
        stage.advance(sequences)
        return out

    return forward._replace(hidden=hidden)
