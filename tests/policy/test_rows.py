"""Packed rows and shared prompts: who sees whom, by hand; and the same numbers as plain rows."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import funcprobe
from funcprobe import collate, select
from funcprobe.policy import blocks, precision
from funcprobe.policy.attention import NotPackedError, PackedAttention, no_mask
from funcprobe.policy.blocks import ALIKE
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.layout import PACKING, SHARING, microbatches
from funcprobe.policy.rows import Rows, packed_rows, plain_rows
from support.architectures import SHAPE, make_policy
from support.policies import random_like
from support.rows import BATCH, LAYOUTS, P_NR, Q_NR, equal_lengths, everything, groups, require_right


@settings(max_examples=80)
@given(groups(), st.integers(0, 60), st.sampled_from(LAYOUTS), st.sampled_from([1, 3, 512]))
def test_a_response_token_sees_its_own_prefix_and_nothing_else(sequences, room, layout, queries):
    batch = collate(*sequences)
    longest = int((batch.prompt_length_N + batch.response_length_N).max())
    with patch.object(blocks, "QUERIES", queries):
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
    # Tails far longer than their prompt, with it, so that they stay causal.
    assert [b.shape for b in rows.packing.blocks] == [(1, 2), (2, 2 + 19), (2, 2 + 15), (2, 2)]
    assert [b.seen is None for b in rows.packing.blocks] == [True, True, True, False]
    assert ALIKE * 19 > 15  # why 15 is a block's longest


# The model with each of the three layouts.

PACK = ("qwen2", "llama", "gemma", "mistral", "gpt2", "gemma3", "mistral-window")
FIRST = [("qwen2", torch.float64), ("qwen2", torch.float32), ("gpt2", torch.float64)]
FIRST += [("gemma3", torch.float64), ("mistral-window", torch.float64)]


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


def test_whatever_a_trial_of_packed_rows_raises_is_a_note():
    """Falcon's ALiBi counts positions from a mask of two dimensions; its ValueError is no failure."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 14}
    base = FalconForCausalLM(FalconConfig(**shape, alibi=True, multi_query=False))
    model = make_policy(base=base)
    params = funcprobe.trainable_params(model)
    forward = frozen_forward(model, params)
    assert forward.layout == "plain"
    assert "ValueError: too many values to unpack" in forward.notes[0]
    stats = funcprobe.token_stats(params, BATCH, forward, 200)
    for i in (0, 4):
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


def test_a_row_of_a_single_token_is_plain():
    """transformers takes one token for a step of generation, and folds its heads otherwise."""
    batch = funcprobe.collate([[5]] * 4, [[1], [2], [3], [4]], [0] * 4)
    (rows,) = microbatches(batch, 64, "shared")
    assert rows.packing is None
    assert rows.tokens == 4
