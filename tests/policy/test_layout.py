"""Batches to microbatches and back: every response token once, nothing lost, little padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe import InputError, collate, response_mask, select
from funcprobe.policy.layout import gather, microbatches, scatter

pairs = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=12)


def ragged(lengths):
    """Token ids that name their place: sequence 100 * i + position, so that a swap shows."""
    prompts = [[100 * i + j for j in range(x)] for i, (x, _) in enumerate(lengths)]
    responses = [[100 * i + x + j for j in range(y)] for i, (x, y) in enumerate(lengths)]
    return prompts, responses, [(3 * i) % 5 for i in range(len(lengths))]


@given(pairs)
@settings(max_examples=60)
def test_collate_and_mask(lengths):
    prompts, responses, number = ragged(lengths)
    batch = collate(prompts, responses, number)
    assert batch.prompt_N.tolist() == number
    assert batch.tokens_NL.shape == (len(lengths), max(x + y for x, y in lengths))
    mask_NR = response_mask(batch)
    assert mask_NR.shape == (len(lengths), max(y for _, y in lengths))
    assert mask_NR.dtype == torch.bool
    for i, (x, y) in enumerate(lengths):
        row = batch.tokens_NL[i].tolist()
        assert row[: x + y] == prompts[i] + responses[i]
        assert (int(batch.prompt_length_N[i]), int(batch.response_length_N[i])) == (x, y)
        assert mask_NR[i].tolist() == [k < y for k in range(mask_NR.shape[1])]


@given(pairs, st.integers(0, 60), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_every_response_token_is_in_one_microbatch(lengths, room, padding, random):
    prompts, responses, number = ragged(lengths)
    batch = collate(prompts, responses, number)
    batch = batch._replace(tokens_NL=torch.nn.functional.pad(batch.tokens_NL, (0, padding), value=-1))
    order = list(range(len(lengths)))
    random.shuffle(order)
    batch = select(batch, torch.tensor(order))
    longest = max(x + y for x, y in lengths)
    max_tokens = longest + room
    parts = microbatches(batch, max_tokens)
    seen = []
    for rows in parts:
        n, read = rows.tokens_NL.shape
        widest = max(sum(lengths[order[s]]) for s in rows.sequence_T.tolist())
        assert n * widest <= max_tokens
        assert read == widest - 1  # a row's last token is predicted, not read
        assert len(set(rows.row_T.tolist())) == n  # no row without a response token
        columns = zip(*(column.tolist() for column in rows[1:6]), strict=True)
        for row, position, target, sequence, k in columns:
            i = order[sequence]
            place = lengths[i][0] + k
            assert target == responses[i][k] == 100 * i + place
            # The hidden state that predicts a token is that of the token before it, and everything
            # up to there is this sequence's.
            assert position == place - 1
            assert rows.tokens_NL[row, : position + 1].tolist() == [100 * i + j for j in range(place)]
            seen.append((i, k))
    assert sorted(seen) == [(i, k) for i, (_, y) in enumerate(lengths) for k in range(y)]
    # Not split further than needed: two neighbours would not have fitted into one.
    widths = [rows.tokens_NL.shape[1] + 1 for rows in parts]
    assert widths == sorted(widths, reverse=True)
    for rows, width in zip(parts[:-1], widths[:-1], strict=True):
        assert (rows.tokens_NL.shape[0] + 1) * width > max_tokens


@given(pairs, st.integers(0, 40), st.integers(0, 2**31))
@settings(max_examples=60)
def test_scatter_undoes_gather(lengths, room, seed):
    batch = collate(*ragged(lengths))
    mask_NR = response_mask(batch)
    generator = torch.Generator().manual_seed(seed)
    values_NR = torch.randn(mask_NR.shape, generator=generator, dtype=torch.float64) + 5.0
    parts = microbatches(batch, max(x + y for x, y in lengths) + room)
    back_NR = scatter([gather(values_NR, rows) for rows in parts], parts, batch)
    assert back_NR.dtype == torch.float64
    assert torch.equal(back_NR, torch.where(mask_NR, values_NR, 0.0))
    narrow_NR = scatter([gather(values_NR.float(), rows) for rows in parts], parts, batch)
    assert narrow_NR.dtype == torch.float64  # the dtype changes, the values do not
    assert torch.equal(narrow_NR, torch.where(mask_NR, values_NR.float().double(), 0.0))


@given(pairs.filter(lambda p: len(p) > 1), st.data())
@settings(max_examples=30)
def test_select_takes_sequences_in_the_order_asked(lengths, data):
    batch = collate(*ragged(lengths))
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    part = select(batch, torch.tensor(index))
    for j, i in enumerate(index):
        assert all(torch.equal(a[j], b[i]) for a, b in zip(part, batch, strict=True))


def test_padding_is_small_for_a_typical_spread():
    # U of 64 prompts and 8 responses each, of 20 to 400 tokens, log-uniform, behind prompts of 60 to
    # 200 (GSM8K's spread), in microbatches of 8192 tokens: some 30 rows each, neighbours in length.
    # Fewer sequences, or a larger max_tokens, leave wider neighbourhoods: 256 sequences 9 %.
    generator = torch.Generator().manual_seed(0)
    prompt = (60 + 140 * torch.rand(512, generator=generator)).long().tolist()
    response = (20 * 20 ** torch.rand(512, generator=generator)).long().tolist()
    batch = collate([[1] * x for x in prompt], [[2] * y for y in response], range(512))
    read = sum(rows.tokens_NL.numel() for rows in microbatches(batch, 8192))
    real = sum(prompt) + sum(response) - 512
    assert real / read > 0.95
    unsorted = 512 * (max(p + r for p, r in zip(prompt, response, strict=True)) - 1)
    assert real / unsorted < 0.6  # the case is not one where nothing needs sorting


def test_too_long_a_sequence_is_refused():
    batch = collate(*ragged([(2, 3), (4, 5), (1, 1)]))
    with pytest.raises(
        InputError, match=r"sequence 1 has 9 tokens.* 8: raise max_tokens to at least 9"
    ):
        microbatches(batch, 8)
    assert len(microbatches(batch, 9)) == 3  # 9, then 5 and 2 would be 10 padded tokens
    assert len(microbatches(batch, 10)) == 2


@pytest.mark.parametrize(
    ("prompts", "responses", "number", "says"),
    [
        ([[1], []], [[2], [3]], [0, 1], "sequence 1 has a prompt of zero tokens"),
        ([[1], [4]], [[], [3]], [0, 1], "sequence 0 has a response of zero tokens"),
        ([], [], [], "no sequences"),
        ([[1]], [[2], [3]], [0, 1], "1 prompts, 2 responses and 2 prompt numbers"),
        ([[1], [2]], [[2], [3]], [0], "2 prompts, 2 responses and 1 prompt numbers"),
    ],
)
def test_unusable_sequences_are_refused(prompts, responses, number, says):
    with pytest.raises(InputError, match=says):
        collate(prompts, responses, number)


@given(pairs, st.integers(0, 60))
@settings(max_examples=40)
def test_tokens_and_padding_are_counted(lengths, room):
    """What goes through the model; a sequence's last token does not."""
    batch = collate(*ragged(lengths))
    real = sum(x + y - 1 for x, y in lengths)
    for layout in ("plain", "packed"):
        parts = microbatches(batch, max(x + y for x, y in lengths) + room, layout)
        assert sum(rows.tokens - rows.padding for rows in parts) == real
        assert all(rows.tokens == rows.tokens_NL.numel() for rows in parts)
        assert all(rows.padding == 0 for rows in parts if rows.packing is not None)
        for rows in parts:
            of_row = [lengths[s] for s in rows.sequence_T.unique().tolist()]
            longest = max(x + y - 1 for x, y in of_row)
            if rows.packing is None:
                assert rows.padding == sum(longest - (x + y - 1) for x, y in of_row)
