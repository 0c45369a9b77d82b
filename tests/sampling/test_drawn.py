"""What is kept of responses that were drawn: as it was packed, or not at all."""

import pytest
import torch

from funcprobe.adapters.sampling.drawn import are_packed, packed, unpacked

IDS = {0: [3, 1], 2: [4], 3: [2, 2, 1]}
LOGP = {0: [-0.5, -0.1], 2: [-2.0], 3: [-0.3, -0.2, -0.4]}
ASKED, MOST, VOCABULARY = 4, 3, 5


@pytest.mark.parametrize("logp", [None, LOGP])
def test_packed_responses_are_packed(logp) -> None:
    tensors = packed(IDS, logp) if logp else packed(IDS)
    assert are_packed(tensors, ASKED, MOST, VOCABULARY, logp=logp is not None)
    assert not are_packed(tensors, ASKED, MOST, VOCABULARY, logp=logp is None)
    ids, of_tokens = unpacked(tensors)
    assert (ids, of_tokens) == (IDS, logp or {})


FORGED = {
    "a row twice": (0, [0, 0, 3]),
    "rows in another order": (0, [2, 0, 3]),
    "a row below 0": (0, [-1, 2, 3]),
    "a row that was not asked for": (0, [0, 2, 4]),
    "fewer rows": (0, [0, 2]),
    "no tokens": (1, [3, 0, 3]),
    "too many tokens of one": (1, [1, 1, 4]),
    "fewer tokens than lengths": (1, [2, 2, 3]),
    "a token below 0": (2, [3, 1, 4, 2, 2, -1]),
    "a token beyond the vocabulary": (2, [3, 1, 4, 2, 2, 5]),
}


@pytest.mark.parametrize("name", FORGED)
def test_others_are_not(name: str) -> None:
    place, numbers = FORGED[name]
    tensors = packed(IDS)
    tensors[place] = torch.tensor(numbers)
    assert not are_packed(tensors, ASKED, MOST, VOCABULARY)


def test_other_types_are_not() -> None:
    for place in range(3):
        tensors = packed(IDS)
        tensors[place] = tensors[place].double()
        assert not are_packed(tensors, ASKED, MOST, VOCABULARY)
    assert not are_packed([x[None] for x in packed(IDS)], ASKED, MOST, VOCABULARY)
    assert not are_packed([torch.zeros(0, dtype=torch.int64)] * 3, ASKED, MOST, VOCABULARY)
