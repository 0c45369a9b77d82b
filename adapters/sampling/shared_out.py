"""The responses of a batch, each process sampling some of them."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from .responses import Responses

T = TypeVar("T")


class Processes(Protocol):
    """Those of a run (`World`), or of a training (`Together`)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        ...


def shared_out(
    processes: Processes,
    prompt_ids: Sequence[Sequence[int]],
    sample: Callable[[Sequence[Sequence[int]], Sequence[int]], Responses],
) -> Responses:
    """sample(prompts, their positions in the batch) of every process's part, as of the whole batch.

    Prompts go to the processes in turn, the longest first, so that all have similar ones. The responses
    are the same for any number of processes where each depends on its position and prompt alone.
    """
    if processes.size == 1:
        return sample(prompt_ids, range(len(prompt_ids)))
    order = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), i))
    own = sorted(order[processes.rank :: processes.size])
    found = [sample([prompt_ids[i] for i in own], own)] if own else []
    parts = [(indices, of_rank[0]) for indices, of_rank in processes.gathered((own, found)) if of_rank]
    row = {i: (part, k) for indices, part in parts for k, i in enumerate(indices)}
    whole = [row[i] for i in range(len(prompt_ids))]
    logp = [part.logp[k] for part, k in whole if part.logp is not None]
    return Responses(
        [part.ids[k] for part, k in whole],
        [part.finished[k] for part, k in whole],
        tokens=sum(part.tokens for _, part in parts),
        padding=sum(part.padding for _, part in parts),
        logp=logp if len(logp) == len(whole) else None,
        lines=tuple(dict.fromkeys(line for _, part in parts for line in part.lines)),
    )
