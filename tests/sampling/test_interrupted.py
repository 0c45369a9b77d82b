"""Sampling that ends after any batch or response, and goes on from what was kept."""

import pytest
import torch

from funcprobe import InputError
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.config.schema import PolicyConfig, SamplingConfig, ServerConfig
from funcprobe.adapters.sampling import batched, client, continuous, server
from funcprobe.adapters.sampling.drawn import packed, unpacked
from funcprobe.adapters.sampling.generate import sample_responses
from support.kept import InMemory, KilledError
from support.stand_in import StandIn, serving

PROMPTS = [[2, 3, 3], [3, 2, 3, 3, 2, 2, 3], [3, 3], [2, 2, 3, 3, 2, 4], [4, 2]] * 4


@pytest.fixture(scope="module")
def policy(checkpoint) -> Policy:
    chosen = PolicyConfig(checkpoint=str(checkpoint.adapter), dtype="float64")
    return load_policy(chosen, torch.device("cpu"))


def settings(**changes) -> SamplingConfig:
    return SamplingConfig.model_validate({"max_new_tokens": 6, "generation_batch": 4, **changes})


def sampled(policy, progress, **changes):
    done: list[int] = []
    config = settings(**changes)
    found = sample_responses(policy, PROMPTS, config, 3, done.append, progress=progress)
    return found, done


def generated(monkeypatch, room: list[int]) -> list[list[list[int]]]:
    """The batches that are generated; memory runs out over as many responses as `room` has, by call."""
    calls: list[list[list[int]]] = []
    generate = batched._generate

    def limited(policy, prompt_ids, config, u_NR):
        calls.append([list(ids) for ids in prompt_ids])
        if len(prompt_ids) > room[min(len(calls), len(room)) - 1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(policy, prompt_ids, config, u_NR)

    monkeypatch.setattr(batched, "_generate", limited)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("room", [(99,), (3,), (99, 99, 3), (1,)])
def test_batches_are_those_of_the_undisturbed_run(policy, monkeypatch, room) -> None:
    """Also where memory runs out before or after, and where there would be another size by now."""
    with monkeypatch.context() as patch:
        calls, whole = generated(patch, list(room)), InMemory()
        expected, _ = sampled(policy, whole)
        every = list(calls)
    assert whole.kept >= 5
    for done in range(1, whole.kept + 1):
        first = InMemory(done)
        with monkeypatch.context() as patch:
            before = generated(patch, list(room))
            with pytest.raises(KilledError):
                sampled(policy, first)
        last = InMemory(None, first)
        with monkeypatch.context() as patch:
            after = generated(patch, list(room[len(before) :] or room[-1:]))
            found, advanced = sampled(policy, last)
        assert found == expected  # with the tokens that went through the model
        assert before + after == every
        assert last.kept == len(advanced) == whole.kept - done


def test_the_size_that_memory_allowed_is_kept(policy, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(batched, "batch_size", lambda *_: 3)
        expected, done = sampled(policy, InMemory(), generation_batch="auto")
        first = InMemory(2)
        with pytest.raises(KilledError):
            sampled(policy, first, generation_batch="auto")
    monkeypatch.setattr(batched, "batch_size", lambda *_: 64)
    found, left = sampled(policy, InMemory(None, first), generation_batch="auto")
    assert found == expected
    assert left == done[2:] == [3] * 4 + [2]


@pytest.mark.slow
def test_continuous_batching_draws_the_missing_responses(policy, monkeypatch) -> None:
    expected, _ = sampled(policy, InMemory(), engine="continuous")
    asked: list[int] = []
    generate = continuous._generated

    def counted(policy, prompt_ids, *given):
        asked.append(len(prompt_ids))
        return generate(policy, prompt_ids, *given)

    monkeypatch.setattr(continuous, "_generated", counted)
    for done in (1, 7, 19, 20):
        first = InMemory(done)
        with pytest.raises(KilledError):
            sampled(policy, first, engine="continuous")
        asked.clear()
        found, advanced = sampled(policy, InMemory(None, first), engine="continuous")
        assert asked == [2, 20 - done][: 1 + (done < 20)]  # two of the trial
        assert sum(advanced) == 20 - done
        assert found.ids == expected.ids  # in float64, where rounding decides no draw


@pytest.mark.slow
def test_a_server_is_asked_for_the_missing_responses(policy, monkeypatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(StandIn(policy)) as stand_in:
        chosen = ServerConfig(url=stand_in.url, model="policy", retries=0)
        sent: list[int] = []
        answers = server.answers

        def counted(config, calls, arrived):
            sent.append(len(calls))
            return answers(config, calls, arrived)

        monkeypatch.setattr(server, "answers", counted)

        def asked(progress):
            sent.clear()
            config = settings(engine="server")
            return sample_responses(policy, PROMPTS, config, 1, server=chosen, progress=progress)

        expected = asked(InMemory())
        for done in (1, 5, 12):
            first = InMemory(done)
            with pytest.raises(KilledError):
                asked(first)
            found = asked(InMemory(None, first))
            # Those of the comparison are kept with the first one after it.
            left = 20 - 8 - done
            assert sent == [min(left, 8), max(0, left - 8)]
            assert found.ids == expected.ids
            assert found.logp == expected.logp


def test_responses_of_another_policy_are_not_kept(policy, monkeypatch) -> None:
    """The eight that show it: the server is asked again when it has the right one."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(StandIn(policy)) as stand_in:
        chosen = ServerConfig(url=stand_in.url, model="policy", retries=0)
        kept, config = InMemory(), settings(engine="server")

        def refuse(*_):
            raise InputError("another policy")

        with monkeypatch.context() as patch:
            patch.setattr("funcprobe.adapters.sampling.server._compared", refuse)
            with pytest.raises(InputError, match="another policy"):
                sample_responses(policy, PROMPTS, config, 1, server=chosen, progress=kept)
        assert len(stand_in.bodies) == 8
        assert kept.stored == {}


def test_what_is_packed_is_unpacked() -> None:
    ids, logp = {3: [1, 2], 0: [5], 7: [4, 4, 4]}, {0: [-0.1], 3: [0.0, -3.0], 7: [-1.0, -2.0, -1e-300]}
    assert unpacked(packed(ids)) == (ids, {})
    assert unpacked(packed(ids, logp)) == (ids, logp)
    assert unpacked(packed({})) == ({}, {})
