"""Continuous batching draws the responses of plain batches, and leaves the model as it was."""

import gc
import logging
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe
from funcprobe import InputError, sampler_checks
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.config.schema import PolicyConfig, SamplingConfig
from funcprobe.adapters.sampling import batched, continuous
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.policy.forward import with_params
from support.checkpoints import make_checkpoint
from support.policies import of_shifted_positions

PROMPTS = [[2, 3, 3], [3, 2, 3, 3, 2, 2, 3, 2, 2], [3, 3], [2, 2, 3, 3, 2]] * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("continuous"))


@pytest.fixture(scope="module", params=["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def policy(checkpoint, request) -> Policy:
    chosen = PolicyConfig(checkpoint=str(checkpoint.adapter), dtype="float32", attention=request.param)
    return load_policy(chosen, torch.device("cpu"))


def settings(**changes) -> SamplingConfig:
    given = {"max_new_tokens": 12, "generation_batch": 5, "engine": "continuous", **changes}
    return SamplingConfig.model_validate(given)


@pytest.mark.slow
def test_prompts_longer_than_a_step_are_read_in_parts(policy, monkeypatch) -> None:
    """The rows of logits then include some that no token is drawn from."""
    expected = sample_responses(policy, PROMPTS, settings(engine="batched"), seed=3).ids
    for chunk in (5, 13):
        monkeypatch.setattr(continuous, "CHUNK", chunk)
        assert sample_responses(policy, PROMPTS, settings(), 3).ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}])
def test_the_responses_are_those_of_plain_batches(policy, changes) -> None:
    expected = sample_responses(policy, PROMPTS, settings(engine="batched", **changes), seed=3)
    done: list[int] = []
    found = sample_responses(policy, PROMPTS, settings(**changes), 3, done.append)
    assert found.ids == expected.ids
    assert found.finished == expected.finished
    assert len({tuple(y) for y in found.ids}) > 10
    assert {len(y) for y in found.ids} != {12}  # some end before
    assert sum(done) == len(PROMPTS)
    assert found.padding == 0
    assert found.tokens == expected.tokens - expected.padding
    part = [7, 30, 2]
    own = [PROMPTS[i] for i in part]
    assert sample_responses(policy, own, settings(**changes), 3, indices=part).ids == [
        found.ids[i] for i in part
    ]


def test_the_model_the_random_state_and_the_log_are_left_alone(policy, capfd) -> None:
    torch.manual_seed(5)
    state, attention = torch.get_rng_state(), policy.model.config._attn_implementation
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    level = logging.getLogger(continuous.LOGGER).level
    ids = torch.tensor([[2, 3, 3, 2]])
    logits = policy.model(input_ids=ids).logits
    sample_responses(policy, PROMPTS[:4], settings(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.model.config._attn_implementation == attention
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters())
    assert torch.equal(policy.model(input_ids=ids).logits, logits)
    assert logging.getLogger(continuous.LOGGER).level == level
    assert capfd.readouterr() == ("", "")


def test_parameters_in_place_of_the_models_reach_the_thread(policy) -> None:
    other = {n: 3 * p for n, p in policy.params.items()}

    def sampled(engine: str) -> list[list[int]]:
        def call() -> list[list[int]]:
            return sample_responses(policy, PROMPTS, settings(engine=engine), 3).ids

        return with_params(policy.model, other, call)

    assert sampled("continuous") == sampled("batched")
    assert sampled("continuous") != sample_responses(policy, PROMPTS, settings(), 3).ids


def test_log_probability_plus_entropy_has_mean_zero(checkpoint) -> None:
    """A fixed seed: |z| < 4 passes always or never; at another temperature it fails."""
    chosen = PolicyConfig(checkpoint=str(checkpoint.adapter), dtype="float32")
    policy = load_policy(chosen, torch.device("cpu"))
    prompts = PROMPTS * 8
    config = settings(generation_batch=64, temperature=1.3)
    found = sample_responses(policy, prompts, config, seed=1).ids
    batch = funcprobe.collate(prompts, found, range(len(prompts)))
    checks = []
    for temperature in (1.3, 1.0):
        probe = funcprobe.bind(policy.model, temperature=temperature)
        checks.append(sampler_checks.sampled_from_policy(batch, probe.token_stats(probe.params, batch)))
    assert [c.passed for c in checks] == [True, False], checks


@pytest.mark.slow
def test_memory_that_runs_out_halves_what_is_at_once(policy, monkeypatch) -> None:
    expected = sample_responses(policy, PROMPTS, settings(), seed=3)
    generated, sizes, room = continuous._generated, [], [3]

    def limited(policy, prompt_ids, most, at_once, processor):
        sizes.append(at_once)
        with closing(generated(policy, prompt_ids, most, at_once, processor)) as made:
            for count, one in enumerate(made):
                if at_once > room[0] and count == 2 and most == 12:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                yield one

    monkeypatch.setattr(continuous, "_generated", limited)
    done: list[int] = []
    found = sample_responses(policy, PROMPTS, settings(generation_batch=12), 3, done.append)
    assert found.ids == expected.ids
    assert sizes == [2, 12, 6, 3]
    assert sum(done) == len(PROMPTS)
    assert found.lines == ("out of memory: 3 responses at once, then",)
    room[0] = 0
    with pytest.raises(InputError, match="memory ran out while one response was sampled"):
        sample_responses(policy, PROMPTS, settings(generation_batch=2), 3)


def test_an_error_of_the_thread_is_raised_and_all_is_put_back(policy, monkeypatch) -> None:
    attention, calls = policy.model.config._attn_implementation, []
    draw = continuous._Draws.__call__

    def fails(self, scores, tensor_arg):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a fault of the third step")
        return draw(self, scores, tensor_arg)

    monkeypatch.setattr(continuous._Draws, "__call__", fails)
    with pytest.raises((ValueError, RuntimeError), match="a fault of the third step"):
        sample_responses(policy, PROMPTS, settings(), seed=1)
    assert policy.model.config._attn_implementation == attention
    monkeypatch.undo()
    assert len(sample_responses(policy, PROMPTS, settings(), seed=1).ids) == len(PROMPTS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_an_error_is_one(policy, monkeypatch) -> None:
    def ends(*_) -> None:
        raise SystemExit  # which ends a thread without a word

    monkeypatch.setattr(continuous._Draws, "__call__", ends)
    with pytest.raises(RuntimeError, match="its thread ended before the responses"):
        sample_responses(policy, PROMPTS, settings(), seed=1)


def test_an_interruption_ends_the_thread(policy) -> None:
    def interrupted(count: int) -> None:
        raise KeyboardInterrupt

    attention, threads, frozen = (
        policy.model.config._attn_implementation,
        threading.active_count(),
        gc.get_freeze_count(),
    )
    with pytest.raises(KeyboardInterrupt):
        sample_responses(policy, PROMPTS, settings(), 1, interrupted)
    assert threading.active_count() == threads
    assert policy.model.config._attn_implementation == attention
    assert gc.get_freeze_count() == frozen


def test_probabilities_that_are_not_finite_are_refused() -> None:
    config = Qwen2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    model.model.norm.weight.data[0] = torch.nan
    policy = SimpleNamespace(model=model, eos_ids=(1,), pad_id=0)
    with pytest.raises(InputError, match="probabilities are not finite"):
        sample_responses(policy, [[3, 4, 5], [3, 4]], settings(), seed=0)


def test_logits_that_are_not_the_forwards_are_refused() -> None:
    """RoBERTa counts positions from its pad token's id on."""
    policy = SimpleNamespace(model=of_shifted_positions(), eos_ids=(1,), pad_id=0)
    with pytest.raises(InputError, match=r'RobertaForCausalLM: continuous batching .*"batched"'):
        sample_responses(policy, [[3, 4, 5]], settings(), seed=0)


def test_an_older_transformers_is_refused(policy, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "funcprobe.adapters.sampling.continuous", None)
    monkeypatch.delattr("funcprobe.adapters.sampling.continuous")
    with pytest.raises(InputError, match=r'"continuous" needs transformers 5.23 or later.*"batched"'):
        sample_responses(policy, PROMPTS, settings(), seed=0)


def test_both_engines_raise_the_same_line_where_nothing_fits() -> None:
    assert continuous.too_long is batched.too_long
