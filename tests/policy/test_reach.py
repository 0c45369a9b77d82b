"""Windows and chunks in packed rows: transformers' masks, and the numbers of a sequence a row."""

import copy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    masking_utils,
)
from transformers.models.mistral import modeling_mistral

import funcprobe
from funcprobe import collate
from funcprobe.policy import blocks
from funcprobe.policy.attention import PackedAttention, no_mask
from funcprobe.policy.blocks import Reach, within
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.layout import microbatches
from funcprobe.policy.reach import reaches
from funcprobe.policy.rows import packed_rows
from support.architectures import SHAPE, make_policy
from support.policies import random_like
from support.rows import BATCH, LAYOUTS, everything, groups

LLAMA4 = SHAPE | {
    "head_dim": 16,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "attention_chunk_size": 4,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
}


def transformers_mask(reach, length):
    """[length, length], by the functions from which every model of transformers has its masks."""
    config = MistralConfig(**SHAPE, sliding_window=reach.window, attn_implementation="sdpa")
    config.attention_chunk_size = reach.chunk
    make = masking_utils.create_causal_mask
    if reach.window is not None:
        make = masking_utils.create_sliding_window_causal_mask
    if reach.chunk is not None:
        make = masking_utils.create_chunked_causal_mask
    x_1L1 = torch.zeros(1, length, 1)
    mask = make(config, x_1L1, None, past_key_values=None, allow_is_causal_skip=False)
    return mask[0, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_what_a_token_sees_is_transformers_mask(kind, size):
    reach, position_S = Reach(**{kind: size}), torch.arange(20)
    seen_SS = reach.sees(position_S[:, None], position_S)
    theirs_SS = transformers_mask(reach, 20)
    assert torch.equal(seen_SS.tril(), theirs_SS)
    # Where attention may stay causal.
    for position in range(20):
        whole = torch.ones(position + 1, position + 1, dtype=torch.bool).tril()
        same = torch.equal(theirs_SS[: position + 1, : position + 1], whole)
        assert reach.all_up_to(position) is same


@settings(max_examples=60)
@given(
    groups(),
    st.sampled_from(["window", "chunk"]),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([1, 3, 512]),
)
def test_attention_in_reach_is_each_sequences_own(sequences, kind, size, shared, queries):
    """Random queries, keys and values of every token, by both packings in one context."""
    prompts, responses, _ = sequences
    batch, every = collate(*sequences), torch.arange(len(prompts))
    first_N = torch.tensor([prompts.index(x) for x in prompts]) if shared else None
    with patch.object(blocks, "QUERIES", queries):
        rows = packed_rows(batch, every, first_N)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, rows.tokens, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    both = [Reach(), Reach(**{kind: size})]
    with patch.object(blocks, "QUERIES", queries):
        packings = [within(rows.packing, reach) for reach in both]
    with PackedAttention(*packings):
        outs = [
            scaled_dot_product_attention(query, key, value, no_mask(query.device, index))
            for index in range(2)
        ]
    owner_S, position_S = rows.sequence_NL[0], rows.packing.position_1S[0]
    for i, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        places = (owner_S == i).nonzero().flatten()
        if len(places) < len(x) + len(y) - 1:  # its prompt is shared
            group = [j for j, other in enumerate(prompts) if other == x]
            k_T = rows.k_T == 0
            last = rows.position_T[k_T & (rows.sequence_T == group[0])]
            places = torch.cat([torch.arange(int(last) - len(x) + 1, int(last) + 1), places])
        assert position_S[places].tolist() == list(range(len(x) + len(y) - 1))
        for out, reach in zip(outs, both, strict=True):
            alone = scaled_dot_product_attention(
                *(z[:, :, places] for z in (query, key, value)), transformers_mask(reach, len(places))
            )
            torch.testing.assert_close(out[:, :, places], alone, rtol=1e-12, atol=1e-12)


def test_blocks_that_reach_everything_stay_causal():
    batch = collate([[1, 2]] * 2, [[3] * 9, [3] * 2], [0, 1])  # read are 10 and 3 tokens
    packing = packed_rows(batch, torch.arange(2)).packing
    assert [block.seen for block in within(packing, Reach(window=10)).blocks] == [None, None]
    long, short = within(packing, Reach(window=9)).blocks
    assert long.seen is not None
    assert short.seen is None


@pytest.mark.parametrize(
    "base",
    [
        # Beside gemma3 and mistral-window in test_rows.py: chunks; a window that few sequences exceed.
        pytest.param(
            lambda: Llama4ForCausalLM(Llama4TextConfig(**LLAMA4, attn_temperature_tuning=False)),
            id="llama4",
        ),
        pytest.param(
            lambda: Olmo3ForCausalLM(
                Olmo3Config(
                    **SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
                )
            ),
            id="olmo3",
        ),
    ],
)
def test_every_layout_gives_the_same_numbers(base):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_policy(adapter="patterns", base=base())
    params = funcprobe.trainable_params(model)
    v = random_like(params)
    forwards = [frozen_forward(model, params, layout=layout) for layout in LAYOUTS]
    assert [f.layout for f in forwards] == list(LAYOUTS)
    read = [sum(r.tokens for r in microbatches(BATCH, 200, layout)) for layout in LAYOUTS]
    assert read[0] > read[1] > read[2]
    plain, *others = (everything(params, f, v, 200, second=False) for f in forwards)
    for other in others:
        for name in plain:
            for a, b in zip(plain[name], other[name], strict=True):
                assert float((a - b).norm()) <= 1e-10 * float(a.norm()), name


@pytest.mark.parametrize("more", [0, 1])
def test_a_window_longer_than_the_trial_is_tried(more, monkeypatch):
    """A model that sees a token more than its window of 4,096, which six tokens would not show."""

    def longer(config, *args, **kwargs):
        config = copy.copy(config)
        config.sliding_window += more
        return masking_utils.create_sliding_window_causal_mask(config, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", longer)
    model = make_policy(base=MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4096)))
    forward = frozen_forward(model, funcprobe.trainable_params(model))
    assert model.get_base_model().config.sliding_window == 4096
    assert forward.layout == ("plain" if more else "shared")
    assert len(forward.notes) == more
    assert all("a token depends on tokens it cannot attend to" in note for note in forward.notes)


@pytest.mark.parametrize("ignored", [True, False])
def test_types_of_layers_that_a_model_does_not_go_by_are_found_out(ignored):
    """Mistral has its window in all layers, whatever layer_types says; OLMo 3 in those of that type."""
    kinds = {"layer_types": ["full_attention"] * 2, "sliding_window": 4096}
    if ignored:
        base = MistralForCausalLM(MistralConfig(**SHAPE))
        vars(base.config).update(kinds)
    else:
        base = Olmo3ForCausalLM(Olmo3Config(**SHAPE, **kinds))
    model = make_policy(base=base)
    assert reaches(base.config) == {"full_attention": Reach()}
    forward = frozen_forward(model, funcprobe.trainable_params(model))
    assert forward.layout == ("plain" if ignored else "shared")


def test_a_scale_by_the_place_in_the_row_is_not_packed():
    """Llama 4 has it from 8,192 tokens on, which no trial reaches."""
    model = make_policy(adapter="patterns", base=Llama4ForCausalLM(Llama4TextConfig(**LLAMA4)))
    forward = frozen_forward(model, funcprobe.trainable_params(model))
    assert forward.layout == "plain"
    assert "a temperature that counts tokens of the row" in forward.notes[0]


def test_the_reach_of_every_type_of_layer():
    make = partial(MistralConfig, **SHAPE)
    assert reaches(make(sliding_window=None)) == {"": Reach()}
    assert reaches(make(sliding_window=4)) == {"": Reach(window=4)}
    mixed = Llama4TextConfig(**LLAMA4)
    assert reaches(mixed) == {"chunked_attention": Reach(chunk=4), "full_attention": Reach()}
    mixed.layer_types = ["linear_attention"]
    with pytest.raises(KeyError, match="linear_attention"):
        reaches(mixed)


def test_masks_of_a_window_do_not_grow_with_the_square(monkeypatch):
    """Neither those of a packed row's window nor what is kept of them."""
    monkeypatch.setattr(blocks, "QUERIES", 8)
    kept = []
    for length in (64, 128):
        packing = packed_rows(collate([[1, 2]], [[3] * (length - 1)], [0]), torch.arange(1)).packing
        (block,) = within(packing, Reach(window=5)).blocks
        masks = [block.seen.mask(*span) for span in block.seen.spans]
        assert sum(mask.shape[2] for mask in masks) == length
        assert max(mask.shape[3] for mask in masks) == 8 + 5 - 1
        kept.append(sum(x.numel() for x in (block.seen.query_nQ, block.seen.key_nK)))
    assert kept[1] == 2 * kept[0]
