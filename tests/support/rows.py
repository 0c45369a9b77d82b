"""Which tokens a response sees in rows of any layout, and all that the passes make of one batch."""

from typing import NamedTuple

from hypothesis import strategies as st

import funcprobe
from funcprobe import Batch, collate, response_mask
from funcprobe.policy.rows import Rows
from support.policies import random_batch, random_like

LAYOUTS = ("plain", "packed", "shared")


class Token(NamedTuple):
    """A token of the row: its own, and what attention shows its queries."""

    token: int
    position: int


@st.composite
def groups(draw):
    """Prompts of several responses, in any order; equal prompts under two numbers, and the reverse."""
    prompts, responses, number = [], [], []
    size = st.integers(1, 12)
    alphabet = draw(st.sampled_from([2, 1000]))  # 2: prompts are often equal
    for group in range(draw(st.integers(1, 5))):
        length = draw(size)
        prompt = draw(st.lists(st.integers(0, alphabet), min_size=length, max_size=length))
        for _ in range(draw(st.integers(1, 5))):
            odd = draw(st.integers(0, 7)) == 0  # another prompt under the same number
            other = draw(st.lists(st.integers(0, alphabet), min_size=1, max_size=5))
            prompts.append(other if odd else prompt)
            count = draw(st.one_of(st.just(1), size))
            # A number of its own for every response token, so that none is taken for another.
            responses.append([2000 + 100 * len(responses) + k for k in range(count)])
            number.append(group)
    order = draw(st.permutations(range(len(prompts))))
    return [[part[i] for i in order] for part in (prompts, responses, number)]


def seen_by(rows: Rows) -> dict[tuple[int, int], list[Token]]:
    """(row, place) -> the tokens that the hidden state there may depend on, itself among them, in the
    order of their positions. Written with loops from what a model does with the fields."""
    tokens = rows.tokens_NL.tolist()
    if rows.packing is None:
        return {
            (i, j): [Token(t, position) for position, t in enumerate(row[: j + 1])]
            for i, row in enumerate(tokens)
            for j in range(len(row))
        }
    (row,), (position,) = tokens, rows.packing.position_1S.tolist()
    assert len(position) == len(row)
    # For every query of every block, in the order in which the blocks' outputs lie: its place in the
    # row and the places of its keys.
    outputs = []
    for block in rows.packing.blocks:
        n, width = block.shape
        if block.query_nQ is None:
            places = [[block.start + i * width + j for j in range(width)] for i in range(n)]
        else:
            places = block.query_nQ.tolist()
        assert [len(p) for p in places] == [width] * n
        for i in range(n):
            for j in range(width):
                every = places[i] if block.key_nK is None else block.key_nK[i].tolist()
                if block.seen is None:
                    assert block.key_nK is None
                    keys = every[: j + 1]
                else:
                    (part,) = [k for q, k in block.seen.spans if q.start <= j < q.stop]
                    allowed = block.seen.mask(slice(j, j + 1), part).expand(n, 1, 1, -1)[i, 0, 0]
                    shown = zip(every[part], allowed.tolist(), strict=True)
                    keys = [k for k, seen in shown if seen]
                outputs.append((places[i][j], keys))
    where = range(len(row)) if rows.packing.place_S is None else rows.packing.place_S.tolist()
    if rows.packing.place_S is None:
        assert len(outputs) == len(row)
    keys_of = {}
    for place, at in enumerate(where):
        query, keys_of[place] = outputs[at]
        assert query == place  # the output goes back to where its query was
    seen = {}
    for place, keys in keys_of.items():
        assert len(set(keys)) == len(keys)
        # In the layers above, what a key has seen itself; it must be no more than this.
        assert all(set(keys_of[k]) <= set(keys) for k in keys)
        found = sorted((Token(row[k], position[k]) for k in keys), key=lambda t: t.position)
        assert found[-1] == Token(row[place], position[place])
        seen[0, place] = found
    return seen


def require_right(batch: Batch, parts: list[Rows]) -> None:
    """Every response token once, predicted from exactly its own prefix, in order."""
    found, length_N = [], batch.prompt_length_N + batch.response_length_N
    for rows in parts:
        seen = seen_by(rows)
        present = rows.sequence_T.unique().tolist()
        columns = zip(*(column.tolist() for column in rows[1:6]), strict=True)
        for row, place, target, sequence, k in columns:
            prompt = int(batch.prompt_length_N[sequence])
            ids = batch.tokens_NL[sequence, : prompt + int(batch.response_length_N[sequence])].tolist()
            assert target == ids[prompt + k]
            prefix = [Token(t, position) for position, t in enumerate(ids[: prompt + k])]
            assert seen[row, place] == prefix
            found.append((sequence, k))
            # Whose token it is: the sequence's own, or a prompt's that it shares.
            owner = int(rows.sequence_NL[row, place])
            assert owner == -1 or present[owner] == sequence
            assert owner != -1 or k == 0
        # The same of every place, prompts among them; what is not an end of a prefix is padding.
        assert rows.sequence_NL.shape == rows.tokens_NL.shape
        shown = 0
        for (row, place), tokens in seen.items():
            owner, position = int(rows.sequence_NL[row, place]), len(tokens) - 1
            of = [s for s in present if owner == -1 or present[owner] == s]
            ends = (batch.prompt_length_N if owner == -1 else length_N)[of] - 1 + (owner == -1)
            ids = batch.tokens_NL[of, : position + 1].tolist()
            inside = [[t.token for t in tokens] == x for x in ids]
            shown += any(a and position < int(end) for a, end in zip(inside, ends, strict=True))
        assert shown == rows.real
    counts = batch.response_length_N.tolist()
    assert sorted(found) == [(i, k) for i, count in enumerate(counts) for k in range(count)]


# A group of four, one of two, single ones; responses of one token; equal prompts of two numbers.
LENGTHS = [(0, 5, 4), (1, 7, 1), (0, 5, 1), (2, 1, 6), (0, 5, 7), (3, 2, 2), (1, 7, 3), (0, 5, 4)]
BATCH = random_batch(LENGTHS, vocabulary=14, seed=5)
MASK_NR = response_mask(BATCH).double()
P_NR = random_like({"p": MASK_NR}, seed=2)["p"] * MASK_NR
Q_NR = random_like({"q": MASK_NR}, seed=3)["q"] * MASK_NR


def everything(params, forward, v, max_tokens, second=True):
    """All that the primitives make, by name."""
    at = (forward, max_tokens)
    stats = funcprobe.token_stats(params, BATCH, *at)
    value, tangent = funcprobe.tangents(params, BATCH, v, *at)
    found = {
        "token_stats": stats,
        "tangents": (*value, *tangent),
        "weighted_grad": funcprobe.weighted_grad(params, BATCH, P_NR, Q_NR, *at).values(),
        "alpha_vjp": (funcprobe.alpha_vjp(params, BATCH, v, *at, p_NR=P_NR, q_NR=Q_NR),),
    }
    if second:
        jet = funcprobe.second_tangents(params, BATCH, v, *at)
        found["second_tangents"] = [x for pair in jet for x in pair]
    return {name: [x.double() for x in tensors] for name, tensors in found.items()}


def equal_lengths(count: int, prompt: int, response: int, number) -> Batch:
    return collate([[1] * prompt] * count, [[2] * response] * count, number)
