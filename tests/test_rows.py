"""Packed rows and shared prompts: who sees whom, by hand; and the same numbers as plain rows."""

from typing import NamedTuple

import pytest
import torch
from architectures import SHAPE
from conftest import random_batch, random_like
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import make_policy
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import funcprobe
from funcprobe import Batch, collate, response_mask, select
from funcprobe.policy import precision
from funcprobe.policy.attention import NotPackedError, PackedAttention, no_mask
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.layout import PACKING, SHARING, in_microbatches, microbatches
from funcprobe.policy.rows import ALIKE, Rows, packed_rows, plain_rows

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
                if block.key_nK is None:
                    assert block.mask_n1QK is None
                    keys = places[i][: j + 1]
                else:
                    allowed = block.mask_n1QK[i, 0, j].tolist()
                    every = block.key_nK[i].tolist()
                    keys = [k for k, shown in zip(every, allowed, strict=True) if shown]
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


@settings(max_examples=80)
@given(groups(), st.integers(0, 60), st.sampled_from(LAYOUTS))
def test_a_response_token_sees_its_own_prefix_and_nothing_else(sequences, room, layout):
    batch = collate(*sequences)
    longest = int((batch.prompt_length_N + batch.response_length_N).max())
    parts = microbatches(batch, longest + room, layout)
    require_right(batch, parts)
    assert all(rows.tokens <= longest + room for rows in parts)


@settings(max_examples=50)
@given(groups())
def test_rows_of_every_layout_whether_they_save_or_not(sequences):
    """All sequences in one microbatch, by each of the three ways, so that none is passed over."""
    prompts, responses, _ = sequences
    batch = collate(*sequences)
    every = torch.arange(len(prompts))
    # Equal prompts may share a copy whatever their number is; that is the caller's to say.
    first_N = torch.tensor([prompts.index(x) for x in prompts])
    plain, packed = plain_rows(batch, every), packed_rows(batch, every)
    shared = packed_rows(batch, every, first_N)
    for rows in (plain, packed, shared):
        require_right(batch, [rows])
    # A last token is predicted, never read.
    lengths = [len(x) + len(y) - 1 for x, y in zip(prompts, responses, strict=True)]
    assert (plain.tokens, plain.real) == (max(lengths) * len(lengths), sum(lengths))
    assert (packed.tokens, packed.padding) == (sum(lengths), 0)
    # A prompt that two have stands there once, and is nobody's own.
    repeated = {tuple(x) for x in prompts if prompts.count(x) > 1}
    alone = [x for x in prompts if tuple(x) not in repeated]
    once = sum(map(len, alone)) + sum(map(len, repeated))
    assert shared.tokens == once + sum(len(y) - 1 for y in responses)
    assert shared.padding == 0
    assert int((shared.sequence_NL == -1).sum()) == sum(map(len, repeated))
    assert not (packed.sequence_NL == -1).any()
    for rows in (packed, shared):
        lengths = rows.sequence_NL[rows.sequence_NL >= 0].bincount(minlength=len(prompts)).tolist()
        for i, (x, y) in enumerate(zip(prompts, responses, strict=True)):
            own_prompt = rows is packed or tuple(x) not in repeated
            assert lengths[i] == len(x) * own_prompt + len(y) - 1


def prompts_in(rows: Rows) -> list[int]:
    """First tokens of prompts that stand in the rows; 7 and up here."""
    return [t for t in rows.tokens_NL.flatten().tolist() if t >= 7]


def test_a_prompt_stands_once_in_every_microbatch_that_has_it():
    """3 prompts of 4 tokens, whose first names them, 5 responses of 2 tokens each."""
    prompts = [[7 + i % 3, 1, 1, 1] for i in range(15)]
    batch = collate(prompts, [[2, 3]] * 15, [i % 3 for i in range(15)])
    (rows,) = microbatches(batch, 90, "shared")
    assert sorted(prompts_in(rows)) == [7, 8, 9]
    assert rows.tokens == 3 * 4 + 15
    for max_tokens in range(6, 90):
        parts = microbatches(batch, max_tokens, "shared")
        require_right(batch, parts)
        for rows in parts:
            assert len(set(prompts_in(rows))) == len(prompts_in(rows)) or max_tokens < 8
    # A group too large for one microbatch is cut, and each piece has the prompt: 4 + 2 + 2.
    parts = microbatches(batch, 8, "shared")
    assert max(rows.tokens for rows in parts) <= 8
    assert sum(rows.tokens for rows in parts) < 15 * 5


def test_sequences_of_one_number_with_other_tokens_do_not_share():
    """The number is the user's word; the tokens are what the model reads."""
    batch = collate([[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2]], [[5, 6]] * 4, [0, 0, 0, 0])
    (rows,) = microbatches(batch, 99, "shared")
    require_right(batch, [rows])
    assert rows.tokens == 3 + 1 + 1 + 4 + 3  # one shared by two, two whole sequences
    # And equal tokens under two numbers are not looked for.
    batch = collate([[1, 2, 3]] * 2, [[5, 6]] * 2, [0, 1])
    (rows,) = microbatches(batch, 99, "shared")
    assert rows.tokens == 8


def equal_lengths(count: int, prompt: int, response: int, number) -> Batch:
    return collate([[1] * prompt] * count, [[2] * response] * count, number)


def test_a_layout_is_taken_only_where_it_saves():
    """Counted in tokens with the predicted one; the limits, 5 and 10 %, are not enough themselves."""
    assert (PACKING, SHARING) == (0.95, 0.9)
    # Nothing is padding, nothing shared.
    batch = equal_lengths(4, 6, 4, range(4))
    for layout in LAYOUTS:
        assert microbatches(batch, 40, layout)[0].packing is None
    # One sequence shorter: 40 read, 38 real, exactly 5 %; a token shorter still, more.
    for short, packs in ((2, False), (1, True)):
        lengths = [4, 4, 4, short]
        batch = collate([[1] * 6] * 4, [[2] * y for y in lengths], range(4))
        assert microbatches(batch, 40, "plain")[0].packing is None
        for layout in ("packed", "shared"):
            assert (microbatches(batch, 40, layout)[0].packing is not None) is packs
    # Shared prompts: 3 of 10 sequences of 20 tokens have one of 10, 180 of 200; then of 11, 178.
    for prompt, shares in ((10, False), (11, True)):
        response = 20 - prompt
        batch = equal_lengths(10, prompt, response, [0, 0, 0, *range(1, 8)])
        parts = microbatches(batch, 400, "shared")
        read = sum(rows.tokens for rows in parts)
        assert (parts[0].packing is not None) is shares
        expected = 10 * (prompt + response - 1) - 2 * prompt * shares
        assert read == expected
        assert microbatches(batch, 400, "packed")[0].packing is None


@settings(max_examples=40)
@given(groups(), st.integers(0, 60))
def test_more_freedom_reads_no_more_tokens(sequences, room):
    batch = collate(*sequences)
    longest = int((batch.prompt_length_N + batch.response_length_N).max())
    read = [
        sum(r.tokens + len(r.sequence_T.unique()) for r in microbatches(batch, longest + room, layout))
        for layout in LAYOUTS
    ]
    # Every sequence counts its last token, as the budget does.
    assert read[2] <= read[1] <= read[0]


def test_tails_of_similar_length_attend_in_one_block():
    """Else every length would be a kernel call of its own, or all of them one, with padding."""
    lengths = [20, 19, 16, 15, 3, 3, 1]  # read are 19, 18, 15, 14, 2, 2, 0
    batch = collate([[1, 2]] * 7, [[3] * y for y in lengths], [0] * 7)
    (rows,) = microbatches(batch, 99, "shared")
    assert [b.shape for b in rows.packing.blocks] == [(1, 2), (2, 19), (2, 15), (2, 2)]
    assert ALIKE * 19 > 15  # why 15 is a block's longest


# The model with each of the three layouts.

PACK = ("qwen2", "llama", "gemma", "mistral", "gpt2")
FIRST = [("qwen2", torch.float64), ("qwen2", torch.float32), ("gpt2", torch.float64)]
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


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(a, d, marks=() if (a, d) in FIRST else pytest.mark.slow)
        for a in PACK
        for d in (torch.float64, torch.float32)
    ],
)
def test_every_layout_gives_the_same_numbers(architecture, dtype):
    model = make_policy(architecture, dtype=dtype)
    params = funcprobe.trainable_params(model)
    v = random_like(params)
    forwards = {layout: frozen_forward(model, params, layout=layout) for layout in LAYOUTS}
    assert [f.layout for f in forwards.values()] == list(LAYOUTS)
    assert not any(f.notes for f in forwards.values())
    # All at once, and in microbatches that cut the groups; the three layouts are three.
    for max_tokens, several in ((200, False), (26, True)):
        parts = [microbatches(BATCH, max_tokens, layout) for layout in LAYOUTS]
        read = [sum(rows.tokens for rows in part) for part in parts]
        assert read[0] > read[1] > read[2]
        assert all((len(part) > 1) is several for part in parts)
        if several and (architecture, dtype) != FIRST[0]:
            continue
        found = [everything(params, f, v, max_tokens, not several) for f in forwards.values()]
        for name, plain in found[0].items():
            # Derivatives along a v of norm 30 are up to 1e4 of float32's roundings.
            bound = 1e-10 if dtype == torch.float64 else 2e-3 if "second" in name else 1e-4
            for other in found[1:]:
                for a, b in zip(plain, other[name], strict=True):
                    assert float((a - b).norm()) <= bound * float(a.norm()), name
                    assert a.any()


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("gemma2", "needs sdpa attention, the model has eager"),
        ("gemma3", "the model's attention has a sliding_window"),
        ("mistral-window", "the model's attention has a sliding_window"),
    ],
)
def test_a_model_that_cannot_pack_says_why(architecture, says):
    model = make_policy(architecture)
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params)
    assert forward.layout == "plain"
    (note,) = forward.notes
    assert says in note
    assert note.startswith("one sequence per row, prompts not shared: ")
    # Asked for nothing, nothing is missed.
    assert not frozen_forward(model, params, layout="plain").notes
    # The same sequences one at a time: none sees another.
    stats = funcprobe.token_stats(params, BATCH, forward, 200)
    for i in (0, 4, 7):
        one = funcprobe.token_stats(params, select(BATCH, torch.tensor([i])), forward, 200)
        count = int(BATCH.response_length_N[i])
        assert torch.allclose(one.logp_NR[0], stats.logp_NR[i, :count], rtol=1e-10)


class ShiftedMLP(LlamaMLP):
    """Adds what it makes of the token before, as a convolution over tokens does."""

    def forward(self, x_NLD):
        out_NLD = super().forward(x_NLD)
        return out_NLD + 0.1 * torch.nn.functional.pad(out_NLD, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_mixes_tokens_outside_of_attention_is_found_out(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**SHAPE))
        shifted = ShiftedMLP(base.config)
    mlp = base.model.layers[1].mlp
    shifted.load_state_dict(mlp.state_dict())
    base.model.layers[1].mlp = shifted
    model = make_policy("llama", dtype=dtype, base=base)
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params)
    assert forward.layout == "plain"
    (note,) = forward.notes
    assert "a token depends on tokens it cannot attend to, by " in note
    if dtype == torch.float64:
        stats = funcprobe.token_stats(params, BATCH, forward, 200)
        with torch.no_grad(), precision.StayFloat64():
            logits = model(input_ids=BATCH.tokens_NL[4:5, :12]).logits[0]
        logp_V = logits[10].log_softmax(-1)
        assert float(stats.logp_NR[4, 6]) == pytest.approx(float(logp_V[BATCH.tokens_NL[4, 11]]))


def test_a_model_that_makes_its_own_masks_is_found_out():
    """One whose layers never see the mask that the backbone was given."""

    class Unmasked(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.register_forward_pre_hook(self._drop, with_kwargs=True)

        @staticmethod
        def _drop(_, args, kwargs):
            return args, {**kwargs, "attention_mask": None}

    model = make_policy("llama", base=Unmasked(LlamaConfig(**SHAPE)))
    forward = frozen_forward(model, funcprobe.trainable_params(model))
    assert forward.layout == "plain"
    (note,) = forward.notes
    assert note.endswith("its attention builds its own masks")


@pytest.mark.parametrize("shared", [False, True])
def test_packed_attention_is_each_sequences_own(shared):
    """Random queries, keys and values of every token; a scale and grouped heads are passed on."""
    prompts, responses = [[1, 2, 3]] * 3 + [[4] * 6], [[5] * 4, [6], [7] * 9, [8] * 2]
    batch, every = collate(prompts, responses, [0, 0, 0, 1]), torch.arange(4)
    rows = packed_rows(batch, every, torch.tensor([0, 0, 0, 3]) if shared else None)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, rows.tokens, 6, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    with PackedAttention(rows.packing):
        out = scaled_dot_product_attention(
            query, key, value, no_mask(query.device), scale=0.7, enable_gqa=True
        )
    assert out.shape == query.shape
    owner_S, position_S = rows.sequence_NL[0], rows.packing.position_1S[0]
    for i in range(4):
        mine = (owner_S == i) | ((owner_S == -1) & (i < 3))
        places = mine.nonzero().flatten()
        places = places[position_S[places].argsort()]
        assert len(places) == len(prompts[i]) + len(responses[i]) - 1
        alone = scaled_dot_product_attention(
            query[:, :, places],
            key[:, :, places].repeat_interleave(2, 1),
            value[:, :, places].repeat_interleave(2, 1),
            is_causal=True,
            scale=0.7,
        )
        torch.testing.assert_close(out[:, :, places], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.zeros(1, 1, 5, 5).double()},
        {"attn_mask": torch.zeros(1, 1, 1, 1).double(), "dropout_p": 0.1},
        {"attn_mask": torch.zeros(1, 1, 1, 1).double(), "is_causal": True},
    ],
)
def test_attention_that_is_called_otherwise_is_not_packed(call):
    batch = collate([[1, 2], [3]], [[1, 2], [4, 5]], [0, 1])
    rows = packed_rows(batch, torch.arange(2))
    x = torch.zeros(1, 1, rows.tokens, 2).double()
    with PackedAttention(rows.packing), pytest.raises(NotPackedError, match="builds its own masks"):
        scaled_dot_product_attention(x, x, x, **call)


def test_autograd_through_a_shared_prompt_sums_over_its_responses():
    """The parameters of a plain model require gradients; one backward through packed rows."""
    model = make_policy()
    params = {
        n: t.detach().clone().requires_grad_() for n, t in funcprobe.trainable_params(model).items()
    }
    grads = []
    for layout in LAYOUTS:
        forward = frozen_forward(model, {n: t.detach() for n, t in params.items()}, layout=layout)
        stats = funcprobe.token_stats(params, BATCH, forward, 200)
        total = (P_NR * stats.logp_NR + Q_NR * stats.entropy_NR).sum()
        grads.append(torch.autograd.grad(total, list(params.values())))
    for a, b, c in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 1e-10 * float(a.norm())
        assert float((a - c).norm()) <= 1e-10 * float(a.norm())


def test_the_plain_layout_is_what_the_model_itself_gives():
    """The three layouts agree; this one with a forward that knows nothing of them."""
    model = make_policy()
    params = funcprobe.trainable_params(model)
    stats = funcprobe.token_stats(params, BATCH, frozen_forward(model, params), 200)
    for i, (prompt, count) in enumerate(
        zip(BATCH.prompt_length_N.tolist(), BATCH.response_length_N.tolist(), strict=True)
    ):
        ids = BATCH.tokens_NL[i : i + 1, : prompt + count]
        with torch.no_grad(), precision.StayFloat64():
            out = functional_call(model, params, (), {"input_ids": ids})
        logp_LV = out.logits[0, prompt - 1 : -1].log_softmax(-1)
        expected = logp_LV.gather(1, ids[0, prompt:, None])[:, 0]
        torch.testing.assert_close(stats.logp_NR[i, :count], expected, rtol=1e-10, atol=1e-10)


# Halving where memory runs out.

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}


def limited(forward, most, error, read):
    """The same forward on a machine that holds activations of `most` tokens."""

    def hidden(params, rows):
        if rows.tokens > most:
            raise error()
        out = forward.hidden(params, rows)
        read.append(rows)
        return out

    bounds = []
    return forward._replace(hidden=hidden, halved=bounds.append), bounds


@pytest.mark.parametrize(
    ("error", "layout"),
    [("cuda", "plain"), ("cuda", "packed"), *((error, "shared") for error in ERRORS)],
)
def test_microbatches_are_halved_where_memory_runs_out(error, layout):
    model = make_policy()
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params, layout=layout)
    v = random_like(params)
    whole = everything(params, forward, v, 200, second=False)
    read = []
    small, bounds = limited(forward, 15, ERRORS[error], read)
    parts = everything(params, small, v, 200, second=False)
    for name, tensors in whole.items():
        for a, b in zip(tensors, parts[name], strict=True):
            assert float((a - b).norm()) <= 1e-10 * float(a.norm()), name
    # Each of the four passes found the bound by itself, and read each response token once.
    assert all(rows.tokens <= 15 for rows in read)
    pairs = [pair for rows in read for pair in zip(rows.sequence_T, rows.k_T, strict=True)]
    assert len(pairs) == 4 * int(MASK_NR.sum())
    first = bounds[: len(bounds) // 4]
    assert bounds == 4 * first
    assert first == sorted(set(first), reverse=True)
    assert all(12 <= bound < 200 for bound in bounds)  # 12: the longest sequence


def halving(batch, compute, max_tokens=200, layout="plain"):
    """(rows that were computed, bounds)."""
    bounds = []
    done = list(in_microbatches(compute, batch, max_tokens, layout, bounds.append))
    assert all(out is rows for rows, out in done)
    return [rows for rows, _ in done], bounds


@settings(max_examples=60)
@given(groups(), st.integers(0, 60), st.integers(0, 40), st.sampled_from(LAYOUTS))
def test_halving_on_any_batch(sequences, room, most, layout):
    batch = collate(*sequences)
    longest = int((batch.prompt_length_N + batch.response_length_N).max())
    most += longest

    def compute(rows):
        if rows.tokens > most:
            raise MemoryError
        return rows

    parts, bounds = halving(batch, compute, longest + room, layout)
    require_right(batch, parts)
    assert bool(bounds) == any(r.tokens > most for r in microbatches(batch, longest + room, layout))
    assert [longest + room, *bounds] == sorted({longest + room, *bounds}, reverse=True)


def test_what_is_done_is_not_done_again_and_nothing_later_is_larger():
    """Memory runs out once, in the third of four microbatches."""
    batch = equal_lengths(16, 5, 5, range(16))
    calls = []

    def compute(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise MemoryError
        return rows

    parts, bounds = halving(batch, compute, 40)
    assert [len(rows.tokens_NL) for rows in calls] == [4, 4, 4, *[1] * 8]
    assert bounds == [18]  # half of 4 rows of 9 tokens
    require_right(batch, parts)


def test_a_sequence_that_does_not_fit_alone_raises():
    batch = equal_lengths(4, 5, 5, range(4))
    for make in ERRORS.values():
        calls = []

        def compute(rows, make=make, calls=calls):
            calls.append(len(rows.sequence_T.unique()))
            assert len(calls) < 9, "the same sequence again and again"
            raise make()

        with pytest.raises(type(make())):
            halving(batch, compute, 40)
        assert calls == [4, 1]


def test_other_errors_are_raised_at_once():
    batch, calls = equal_lengths(4, 5, 5, range(4)), []
    for error in (RuntimeError("the size of tensor a must match"), ValueError("can't allocate memory")):

        def compute(rows, error=error):
            calls.append(rows)
            raise error

        with pytest.raises(type(error), match=str(error)):
            halving(batch, compute, 40)
    assert len(calls) == 2


def test_halving_ends_where_a_later_sequence_is_longer_than_half():
    """Shared prompts are sorted by the prompt's length, so that a long response may come later."""
    prompts = [[7] * 12] * 8 + [[8] * 2] * 2
    responses = [[1] * 3] * 8 + [[2] * 38] * 2
    batch = collate(prompts, responses, [0] * 8 + [1] * 2)
    first = microbatches(batch, 42, "shared")[0]
    assert first.sequence_T.unique().tolist() == list(range(8))
    assert first.tokens == 12 + 8 * 2
    calls = []

    def compute(rows):
        calls.append(rows)
        assert len(calls) < 50, "the same microbatch again and again"
        # Short rows with many blocks may take more memory than long ones.
        if len(rows.sequence_T.unique()) > 4:
            raise MemoryError
        return rows

    parts, _ = halving(batch, compute, 42, "shared")
    require_right(batch, parts)


def test_a_row_of_a_single_token_is_plain():
    """transformers takes one token for a step of generation, and folds its heads otherwise."""
    batch = funcprobe.collate([[5]] * 4, [[1], [2], [3], [4]], [0] * 4)
    (rows,) = microbatches(batch, 64, "shared")
    assert rows.packing is None
    assert rows.tokens == 4
