"""What is sampled is the policy whose log-probabilities the core computes: by counting."""

import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import funcprobe
from funcprobe import InputError
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.config.schema import PolicyConfig, SamplingConfig
from funcprobe.adapters.machine import memory
from funcprobe.adapters.sampling.batch_size import batch_size, bytes_of_a_token
from funcprobe.adapters.sampling.batched import pads
from funcprobe.adapters.sampling.generate import sample_responses
from support.checkpoints import Checkpoint, edit_json, make_checkpoint
from support.policies import of_shifted_positions

PIECES = ("<pad>", "<eos>", "1", "2", "<end>")
EOS = (1, 4)  # the tokenizer's, and one more that the base's generation_config names
PROMPT, LONG = [2, 3, 3], [3, 2, 3, 3, 2, 2, 3, 2, 2]
MOST = 3  # tokens of a response
COUNT = 4000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Checkpoint:
    """A base whose own generation settings would change what is sampled."""
    found = make_checkpoint(tmp_path_factory.mktemp("hostile"), pieces=PIECES)
    edit_json(
        found.base / "generation_config.json",
        do_sample=True,
        top_k=2,
        top_p=0.5,
        temperature=0.3,
        repetition_penalty=3.0,
        eos_token_id=list(EOS),
        suppress_tokens=[2],
    )
    return found


@pytest.fixture(scope="module")
def policy(hostile) -> Policy:
    return load_policy(
        PolicyConfig(checkpoint=str(hostile.adapter), dtype="float32"), torch.device("cpu")
    )


def settings(**changes) -> SamplingConfig:
    return SamplingConfig.model_validate({"max_new_tokens": MOST, "generation_batch": 500, **changes})


def outcomes() -> list[tuple[int, ...]]:
    """Every response there can be: up to the first end of sequence, or MOST tokens without one."""
    words = [2, 3, 0]  # the pad token is a token like any other to the policy
    found = [(*start, end) for n in range(MOST) for start in product(words, repeat=n) for end in EOS]
    return found + list(product(words, repeat=MOST))


def probabilities(
    policy: Policy, prompt: list[int], temperature: float
) -> dict[tuple[int, ...], float]:
    """By teacher forcing, as the core has them."""
    responses = outcomes()
    batch = funcprobe.collate([prompt] * len(responses), responses, [0] * len(responses))
    probe = funcprobe.bind(policy.model, temperature=temperature)
    return dict(zip(responses, probe.seq_logprobs(probe.params, batch).exp().tolist(), strict=True))


def p_value(found: list[list[int]], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square, outcomes expected fewer than five times pooled into one cell."""
    counts = Counter(map(tuple, found))
    assert counts.keys() <= expected.keys()
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-5)  # float32 sums of 53 outcomes
    rare = [o for o, p in expected.items() if p * len(found) < 5]
    cells = [(counts[o], p) for o, p in expected.items() if o not in rare]
    cells.append((sum(counts[o] for o in rare), sum(expected[o] for o in rare)))
    seen, share = (list(column) for column in zip(*[c for c in cells if c[1] > 0], strict=True))
    total = sum(share)
    return float(stats.chisquare(seen, [p / total * len(found) for p in share]).pvalue)


# Seeds are fixed, so a test passes always or never; 1e-3 is what one true policy in a thousand fails.
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_policys_probabilities(policy, temperature) -> None:
    found = sample_responses(policy, [PROMPT] * COUNT, settings(temperature=temperature), seed=1)
    assert p_value(found.ids, probabilities(policy, PROMPT, temperature)) > 1e-3
    # The test has the power to tell the other temperature, and the base's top_k, from this one.
    other = {1.0: 0.7, 0.7: 1.0}[temperature]
    assert p_value(found.ids, probabilities(policy, PROMPT, other)) < 1e-6
    assert len({tuple(y) for y in found.ids}) > 30


def test_left_padding_does_not_change_the_short_prompts_of_a_batch(policy) -> None:
    mixed = [PROMPT, LONG] * COUNT
    found = sample_responses(policy, mixed, settings(), seed=2).ids
    for prompt, ids in ((PROMPT, found[::2]), (LONG, found[1::2])):
        assert p_value(ids, probabilities(policy, prompt, 1.0)) > 1e-3
    assert p_value(found[::2], probabilities(policy, LONG, 1.0)) < 1e-6


def test_a_response_ends_with_its_first_end_of_sequence(policy) -> None:
    assert policy.eos_ids == EOS
    found = sample_responses(policy, [PROMPT] * 1000, settings(), seed=3)
    ends = Counter()
    for ids, finished in zip(found.ids, found.finished, strict=True):
        assert 1 <= len(ids) <= MOST
        assert not set(ids[:-1]) & set(EOS)
        assert finished == (ids[-1] in EOS)
        assert finished or len(ids) == MOST
        ends[ids[-1] if finished else "length"] += 1
    assert ends.keys() == {*EOS, "length"}
    assert any(0 in ids for ids in found.ids)  # a sampled pad token is part of the response


def test_the_seed_decides_and_the_global_state_is_left_alone(policy) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = sample_responses(policy, [PROMPT] * 40, settings(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert sample_responses(policy, [PROMPT] * 40, settings(), seed=1) == one
    assert sample_responses(policy, [PROMPT] * 40, settings(), seed=2) != one


def test_batches_of_any_size_order_and_split_give_the_same_responses(policy) -> None:
    """As other processes would sample their parts, and as memory that runs out would cut them."""
    prompts = [PROMPT, LONG, PROMPT[:2], LONG[:5]] * 15
    whole = sample_responses(policy, prompts, settings(max_new_tokens=8), seed=4).ids
    assert len({tuple(y) for y in whole}) > 30
    for size in (1, 7):
        few = settings(max_new_tokens=8, generation_batch=size)
        assert sample_responses(policy, prompts, few, seed=4).ids == whole
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    for part in (order[:23], order[23:]):
        own = [prompts[i] for i in part]
        found = sample_responses(policy, own, settings(max_new_tokens=8), 4, indices=part)
        assert found.ids == [whole[i] for i in part]
    # The index belongs to the draw: the same prompt elsewhere in the batch has another response.
    assert len({tuple(whole[i]) for i in range(0, 60, 4)}) > 5


def test_memory_that_runs_out_halves_the_batch(policy, monkeypatch) -> None:
    prompts = [PROMPT] * 21
    whole = sample_responses(policy, prompts, settings(), seed=1)
    generate, sizes, room = policy.model.generate, [], [6]

    def limited(**given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(**given)

    monkeypatch.setattr(policy.model, "generate", limited)
    done: list[int] = []
    found = sample_responses(policy, prompts, settings(generation_batch=16), 1, done.append)
    assert found.ids == whole.ids
    assert found.lines == ("out of memory: 4 responses at once, then",)
    assert sizes == [1, 16, 8, 4, 4, 4, 4, 4, 1]  # the first is of `pads`
    assert done == [4, 4, 4, 4, 4, 1]
    room[0] = 1
    assert sample_responses(policy, prompts[:4], settings(), 1).ids == whole.ids[:4]
    room[0] = 0
    with pytest.raises(InputError, match=r"one response was sampled.*6 tokens: lower sampling.max_new"):
        sample_responses(policy, prompts[:4], settings(), 1)


def test_the_size_of_a_batch_is_of_the_free_memory(policy, monkeypatch) -> None:
    # Keys and values of 2 layers, 2 heads of 8, 4 bytes; 14 logits.
    of_token = bytes_of_a_token(policy.model)
    text = policy.model.config
    width = text.hidden_size // text.num_attention_heads
    assert of_token == 2 * text.num_hidden_layers * text.num_key_value_heads * width * 4
    of_sequence = 12 * of_token + 24 * policy.model.get_input_embeddings().num_embeddings
    auto = settings(generation_batch="auto")
    for free, expected in ((20 * of_sequence + 1, 10), (0, 1), (10**9, 64)):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        assert batch_size(policy, auto, longest=9) == expected
    assert batch_size(policy, settings(generation_batch=500), longest=9) == 500


def test_progress_and_weights(policy) -> None:
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    done: list[int] = []
    sample_responses(policy, [PROMPT] * 25, settings(generation_batch=10), 1, done.append)
    assert done == [10, 10, 5]
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())


@pytest.mark.parametrize(("option", "value"), [("top_k", 1), ("top_p", 1e-6)])
def test_top_k_and_top_p_reach_the_sampler(policy, option, value) -> None:
    """For U, where they are allowed: one choice is left, the likeliest."""
    found = sample_responses(policy, [PROMPT] * 20, settings(**{option: value}), seed=1).ids
    assert len({tuple(y) for y in found}) == 1
    prefix = PROMPT + found[0][:-1]
    with torch.no_grad():
        logits = policy.model(torch.tensor([prefix])).logits[0, -len(found[0]) :]
    assert logits.argmax(-1).tolist() == found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_are_padded_only_where_that_changes_nothing(dtype):
    """Gemma2's eager attention: its padded rows are NaN in transformers' float64, not in ours."""
    config = Gemma2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).to(dtype).eval()
    policy = SimpleNamespace(model=model, eos_ids=(1,), pad_id=0)
    prompts = [[3, 4, 5], [3], [4, 4, 4, 4], [6]]
    done = []
    found = sample_responses(
        policy, prompts, SamplingConfig(max_new_tokens=4), seed=0, advance=done.append
    )
    assert done == [4]
    assert len(found.ids) == 4
    assert all(1 <= len(ids) <= 4 for ids in found.ids)


def test_a_layer_that_reads_padding_is_found_out():
    """RWKV's states go over padding; no mask keeps them from it."""
    config = RwkvConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, context_length=32
    )
    torch.manual_seed(0)
    policy = SimpleNamespace(model=RwkvForCausalLM(config).eval(), eos_ids=(1,), pad_id=0)
    for p in policy.model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    assert not pads(policy, [[3, 4, 5], [3], [6, 7]])
    assert pads(policy, [[3, 4], [5, 6]])  # nothing is padded


def test_generation_that_is_not_the_forwards_is_refused():
    """RoBERTa counts positions from its pad token's id on, generate() from 0 (transformers 5.23)."""
    policy = SimpleNamespace(model=of_shifted_positions(), eos_ids=(1,), pad_id=0)
    with pytest.raises(InputError, match=r"RobertaForCausalLM: generate\(\) gives other logits"):
        sample_responses(policy, [[3, 4, 5]], SamplingConfig(max_new_tokens=4), seed=0)
