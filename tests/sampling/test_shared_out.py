"""Responses that several processes sample are those of one, in the order of the prompts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe.adapters.sampling.responses import Responses
from funcprobe.adapters.sampling.shared_out import shared_out


class Thread(NamedTuple):
    """A process, played by a thread."""

    rank: int
    size: int
    said: list[object]
    all_here: Barrier

    def gathered(self, value: object) -> list[object]:
        self.said[self.rank] = value
        self.all_here.wait(10)
        return list(self.said)


def drawn(prompt_ids: Sequence[Sequence[int]], own: Sequence[int], engine: str) -> Responses:
    """Depends on the prompt and its position alone."""
    ids = [[*prompt, i] for prompt, i in zip(prompt_ids, own, strict=True)]
    logp = [[-float(i)] for i in own] if engine == "server" else None
    finished = [i % 2 == 0 for i in own]
    return Responses(ids, finished, len(own), 2 * len(own), logp=logp, lines=("a line",))


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from(["batched", "server"]),
)
def test_any_number_of_processes_give_those_of_one(prompt_ids, size, engine) -> None:
    asked: list[list[int]] = []

    def sample(prompts: Sequence[Sequence[int]], own: Sequence[int]) -> Responses:
        assert prompts == [prompt_ids[i] for i in own]
        asked.append(list(own))
        return drawn(prompts, own, engine)

    said, barrier = [None] * size, Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        found = list(
            pool.map(
                lambda rank: shared_out(Thread(rank, size, said, barrier), prompt_ids, sample),
                range(size),
            )
        )
    one = drawn(prompt_ids, range(len(prompt_ids)), engine)
    assert found == [one] * size
    assert sorted(i for own in asked for i in own) == list(range(len(prompt_ids)))
    assert max(map(len, asked)) - min(map(len, asked)) <= 1
