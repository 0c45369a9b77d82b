"""The server route against a stand-in on loopback: what is asked, what is read, and its faults."""

import asyncio
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe import InputError, sampler_checks
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.config.schema import Config, PolicyConfig, SamplingConfig, ServerConfig
from funcprobe.adapters.rollouts import load_rollouts
from funcprobe.adapters.sampling import client, server
from funcprobe.adapters.sampling.completions import AnswerError, Asked, body, most_bytes, read
from funcprobe.adapters.sampling.generate import sample_responses
from support.checkpoints import make_checkpoint
from support.commands import sets
from support.slow import first
from support.stand_in import KEY, StandIn, serving

PROMPTS = [[2, 3, 3], [3, 2, 3, 3, 2], [3, 3], [2, 2, 3, 3, 2, 4]] * 5


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    made = make_checkpoint(tmp_path_factory.mktemp("served"))
    chosen = PolicyConfig(checkpoint=str(made.adapter), dtype="float64")
    return load_policy(chosen, torch.device("cpu"))


@pytest.fixture
def stand_in(policy, monkeypatch) -> Iterator[StandIn]:
    monkeypatch.setattr(client, "PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(StandIn(policy)) as found:
        yield found


def settings(**changes) -> SamplingConfig:
    return SamplingConfig.model_validate({"max_new_tokens": 8, "engine": "server", **changes})


def chosen(stand_in: StandIn, **changes) -> ServerConfig:
    return ServerConfig(**{"url": stand_in.url, "model": "policy", "retries": 2, **changes})


def sampled(policy: Policy, stand_in: StandIn, config: SamplingConfig, **changes: Any) -> Any:
    return sample_responses(policy, PROMPTS, config, 1, server=chosen(stand_in, **changes))


def refusal(policy: Policy, stand_in: StandIn, config: SamplingConfig | None = None, **changes) -> str:
    with pytest.raises(InputError) as caught:
        sampled(policy, stand_in, config or settings(), **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


# What is asked


@pytest.mark.slow
def test_every_setting_is_in_the_request(policy, stand_in) -> None:
    done: list[int] = []
    config = settings(temperature=0.7)
    found = sample_responses(policy, PROMPTS, config, 1, done.append, server=chosen(stand_in))
    assert sum(done) == len(PROMPTS) == len(stand_in.bodies)
    by_prompt = sorted(json.dumps(b["prompt"]) for b in stand_in.bodies)
    assert by_prompt == sorted(map(json.dumps, PROMPTS))
    assert len({b["seed"] for b in stand_in.bodies}) == len(PROMPTS)
    assert all(0 <= b["seed"] < 2**31 for b in stand_in.bodies)
    fixed = {k: v for k, v in stand_in.bodies[0].items() if k not in {"prompt", "seed"}}
    assert fixed == {
        "model": "policy",
        "max_tokens": 8,
        "n": 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "stop_token_ids": list(policy.eos_ids),
        "ignore_eos": False,
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "no_stop_trim": True,
        "echo": False,
        "stream": False,
    }
    again = sampled(policy, stand_in, config, concurrency=1)
    assert again.ids == found.ids  # as the server keeps to the seeds
    assert again.logp == found.logp
    part = sample_responses(policy, PROMPTS[3:5], config, 1, indices=[3, 4], server=chosen(stand_in))
    assert part.ids == found.ids[3:5]


def test_top_k_and_top_p_are_sent(policy) -> None:
    asked = Asked([2, 3], 8, [1], 14)
    sent = body(asked, "policy", settings(top_k=5, top_p=0.5), 1)
    assert (sent["top_k"], sent["top_p"]) == (5, 0.5)


def test_no_more_requests_at_once_than_allowed(policy, stand_in) -> None:
    sampled(policy, stand_in, settings(), concurrency=3)
    assert 1 < stand_in.most_at_once <= 3


def test_a_key_is_sent_and_shown_nowhere(policy, stand_in, monkeypatch) -> None:
    stand_in.keyed = True
    assert "rejects the key with status 401" in refusal(policy, stand_in)
    assert "not set" in refusal(policy, stand_in, api_key_env="KEY_OF_THE_TEST")
    monkeypatch.setenv("KEY_OF_THE_TEST", "of two\nlines")
    assert "printable" in refusal(policy, stand_in, api_key_env="KEY_OF_THE_TEST")
    monkeypatch.setenv("KEY_OF_THE_TEST", KEY)
    sampled(policy, stand_in, settings(), api_key_env="KEY_OF_THE_TEST")
    assert stand_in.headers[0]["Authorization"] == f"Bearer {KEY}"
    for fault in ("400", "500"):  # which repeat it
        stand_in.fault = lambda *_, fault=fault: fault
        message = refusal(policy, stand_in, api_key_env="KEY_OF_THE_TEST")
        assert KEY not in message
        assert "dead, Bearer ***" in message


@pytest.mark.parametrize("url", ["http://\u2603.net", "http://exa\xadmple"])
def test_an_address_that_is_none_is_a_line(policy, url) -> None:
    with pytest.raises(InputError) as caught:
        client.require_model(ServerConfig.model_construct(url=url, model="policy"))
    assert "is no address" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_proxy_that_is_none_is_a_line(policy, stand_in, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://proxy")
    assert "check the variables HTTP_PROXY" in refusal(policy, stand_in)


# What is read


def test_responses_are_the_policys_with_its_log_probabilities(policy, stand_in) -> None:
    prompts = PROMPTS * 8
    found = sample_responses(policy, prompts, settings(temperature=1.4), 5, server=chosen(stand_in))
    assert found.logp is not None
    assert found.lines[0].startswith("server: log-probabilities ")
    batch = funcprobe.collate(prompts, found.ids, range(len(prompts)))
    probe = funcprobe.bind(policy.model, temperature=1.4)
    stats = probe.token_stats(probe.params, batch)
    mask_NR = funcprobe.response_mask(batch)
    flat = torch.tensor([x for row in found.logp for x in row], dtype=torch.float64)
    assert torch.allclose(stats.logp_NR[mask_NR].double(), flat, atol=1e-9)
    assert sampler_checks.sampled_from_policy(batch, stats).passed  # a fixed seed: always or never
    for ids, ended in zip(found.ids, found.finished, strict=True):
        assert ended == (ids[-1] in policy.eos_ids)
    assert len(set(found.finished)) == 2
    assert (found.tokens, found.padding) == (0, 0)


@pytest.mark.slow
def test_a_run_weighs_e_by_the_servers_probabilities(probe, checkpoint, monkeypatch) -> None:
    """The server samples from another policy nearby: E's ratios make up for it, and are reported."""
    loaded = load_policy(
        PolicyConfig(checkpoint=str(checkpoint.adapter), dtype="float64"), torch.device("cpu")
    )
    with torch.no_grad():
        for name, p in loaded.model.named_parameters():
            if "lora_B" in name:
                p.mul_(1.02)
    monkeypatch.setattr(client, "PAUSE", 0.01)
    with serving(StandIn(loaded)) as stand_in:
        stand_in.fault = lambda number, body: "500" if number % 7 == 0 else None
        given = {
            "sampling__engine": "server",
            "server__url": f"{stand_in.url}/v1/",
            "server__model": "policy",
            "policy__dtype": "float64",
        }
        results = probe("one", **given)
        asked = len(stand_in.bodies)
        assert probe("two", **given)["sweep"] == results["sweep"]
        assert len(stand_in.bodies) == asked  # the stage is reused
    E = load_rollouts("runs/one/rollouts/eval.parquet", 14, rewards=False)
    U = load_rollouts("runs/one/rollouts/update.parquet", 14, rewards=False)
    assert E.sampler_logp is not None
    assert U.sampler_logp is not None
    assert [len(x) for x in E.sampler_logp] == [len(x) for x in E.response_ids]
    seen = {c["name"]: c for c in results["checks"]}
    assert "E is sampled from the policy" not in seen
    near = seen["E's sampler is near the policy"]
    assert near["passed"]
    assert "nats from the policy's" in near["saw"]
    assert seen["sampler_logp is the sampler's"]["passed"]
    log = Path("runs/one/run.log").read_text()
    assert "server: log-probabilities" in log
    assert "requests were sent again" in log


@pytest.mark.parametrize(
    "listed", first(1, [None, [{"id": "policy"}], [{"id": "a"}, {"id": "policy"}]])
)
def test_the_list_of_models_has_it_or_is_not_there(policy, stand_in, listed) -> None:
    stand_in.listed = listed
    assert len(sampled(policy, stand_in, settings()).ids) == len(PROMPTS)


def good() -> dict[str, Any]:
    return {
        "model": "policy",
        "choices": [
            {
                "token_ids": [5, 6, 1],
                "prompt_token_ids": [2, 3],
                "finish_reason": "stop",
                "logprobs": {
                    "tokens": ["token_id:5", "token_id:6", "token_id:1"],
                    "token_logprobs": [-1.5, 0.0, -2],
                },
            }
        ],
    }


ASKED = Asked(prompt_ids=[2, 3], max_new_tokens=5, eos_ids=[1], vocabulary=14)


def test_ids_are_read_where_either_field_has_them() -> None:
    assert read(json.dumps(good()), ASKED, "policy") == ([5, 6, 1], [-1.5, 0.0, -2.0])
    for drop in ("token_ids", "prompt_token_ids"):
        found = good()
        del found["choices"][0][drop]  # vLLM before 0.10.2
        assert read(json.dumps(found), ASKED, "policy").ids == [5, 6, 1]
    found = good()
    found["choices"][0]["logprobs"]["tokens"] = ["a", "b", "<eos>"]  # SGLang
    del found["model"]
    assert read(json.dumps(found), ASKED, "policy").ids == [5, 6, 1]
    found["choices"][0]["logprobs"]["token_logprobs"][1] = 5e-4
    assert read(json.dumps(found), ASKED, "policy").logp == [-1.5, 0.0, -2.0]


def changed(path: str, value: Any) -> str:
    found = good()
    at: Any = found if path.startswith("/") else found["choices"][0]
    *way, last = path.strip("/").split(".")
    for step in way:
        at = at[step]
    at[last] = value
    return json.dumps(found)


BAD = {
    "no JSON (": "{",
    "occurs twice": '{"choices": 1, "choices": 2}',
    "without choices": "[]",
    "0 choices": changed("/choices", []),
    "2 choices": changed("/choices", [{}, {}]),
    "1 choices": changed("/choices", ["x"]),
    "model 'base'": changed("/model", "base"),
    "another prompt": changed("prompt_token_ids", [2, 4]),
    "without log-probabilities": changed("logprobs", None),
    "without token ids": changed("token_ids", ["5", 6, 1]),
    "without token ids: ": changed("token_ids", [True, 6, 1]),
    "an empty response": changed("token_ids", []),
    "not those of logprobs.tokens": changed("token_ids", [5, 7, 1]),
    "token '14', but the model has 14 rows": changed("token_ids", [5, 14, 1]).replace(
        "_id:6", "_id:14"
    ),
    "token '-1'": changed("token_ids", [5, -1, 1]).replace('"token_id:6"', '"x"'),
    "each of 3 tokens": changed("logprobs.token_logprobs", [-1.0, -1.0]),
    "each of 3 tokens (": changed("logprobs.token_logprobs", [None, -1.0, -1.0]),
    "log-probability of 0.5": changed("logprobs.token_logprobs", [-1.0, 0.5, -1.0]),
    "log-probability of -9999": changed("logprobs.token_logprobs", [-1.0, -9999.0, -1.0]),
    "log-probability of inf": changed("logprobs.token_logprobs", [-1.0, 10**400, -1.0]),
    "NaN is not a JSON number": changed("logprobs.token_logprobs", [-1.0, math.nan, -1.0]),
    "tokens after the end of sequence 1": changed("token_ids", [5, 1, 6]).replace("token_id:", ""),
    "a response that stopped ('stop') after 3 of 5": changed("token_ids", [5, 1, 6])
    .replace("token_id:", "")
    .replace("5, 1, 6", "5, 7, 6"),
}


@pytest.mark.parametrize("said", BAD)
def test_an_answer_that_is_not_one_is_a_line(said) -> None:
    with pytest.raises(AnswerError) as caught:
        read(BAD[said], ASKED, "policy")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_response_longer_than_asked_for_is_a_line() -> None:
    with pytest.raises(AnswerError, match="3 tokens, at most 2"):
        read(json.dumps(good()), ASKED._replace(max_new_tokens=2, eos_ids=[9, 1]), "policy")
    assert most_bytes(ASKED) < 100_000


# Faults


FAULTS = {
    "500": "status 500",
    "429": "status 429",
    "time-out": "no answer within 1.5 s",
    "drops": "no answer within 1.5 s",
    "half an answer": "half an answer",
    "no connection": "half an answer",
    "no JSON": "no JSON",
    "too long": "more than",
    "out of vocabulary": "1000000",
    "another prompt": "another prompt",
    "another adapter": "an answer of model 'base', not of policy",
}


QUICK = {"500", "drops", "half an answer", "another adapter"}  # one of each kind
MARKED = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS]


@pytest.mark.parametrize("fault", MARKED)
def test_a_fault_that_passes_costs_a_repetition_and_one_that_stays_is_a_line(
    policy, stand_in, fault, monkeypatch
) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)
    whole = sampled(policy, stand_in, settings())
    count = len(stand_in.bodies)
    stand_in.fault = lambda number, body: fault if number in {count + 2, count + 11} else None
    wait = {"timeout": 1.5, "concurrency": 2} if fault in {"time-out", "drops"} else {}
    found = sampled(policy, stand_in, settings(), **wait)
    assert found.ids == whole.ids
    assert found.lines[-1] == "server: 2 requests were sent again"
    stand_in.bodies.clear()
    stand_in.fault = lambda number, body: fault if body["prompt"] == PROMPTS[1] else None
    message = refusal(policy, stand_in, **wait | {"retries": 1 if wait else 2})
    assert FAULTS[fault] in message
    assert ("once more" if wait else "2 times more") in message
    assert sum(b["prompt"] == PROMPTS[1] for b in stand_in.bodies) >= 2


def test_a_request_that_is_rejected_is_not_sent_again(policy, stand_in) -> None:
    stand_in.fault = lambda *_: "400"
    message = refusal(policy, stand_in, concurrency=1)
    assert "rejects the request with status 400" in message
    assert "is dead" in message
    sent = [b["prompt"] for b in stand_in.bodies]
    assert sent == PROMPTS[: len(sent)]  # the next may have begun
    assert len(sent) <= 2


def test_no_server_and_another_program(policy, stand_in) -> None:
    stand_in.listed = "x"
    assert "is no list of models" in refusal(policy, stand_in)
    stand_in.listed = [{"id": "base\x1b[31m"}]
    message = refusal(policy, stand_in)
    assert r"""has 'base\x1b[31m': load the adapter""" in message
    stand_in.url = "http://127.0.0.1:9"  # the discard port, where nothing listens
    assert "no connection" in refusal(policy, stand_in)


def test_another_policy_is_refused_before_more_is_asked(policy, stand_in, tmp_path) -> None:
    other = load_policy(
        PolicyConfig(checkpoint=str(make_checkpoint(tmp_path, seed=6).adapter), dtype="float64"),
        torch.device("cpu"),
    )
    stand_in.policy = other
    message = refusal(policy, stand_in)
    assert 'server.model = "policy" is another policy' in message
    assert "nats" in message
    assert len(stand_in.bodies) == server.TRIED


def test_log_probabilities_from_before_the_temperature_are_refused(policy, stand_in) -> None:
    stand_in.raw = True
    message = refusal(policy, stand_in, settings(temperature=0.5))
    assert "before the temperature" in message
    assert "processed_logprobs" in message
    assert len(stand_in.bodies) == server.TRIED
    sampled(policy, stand_in, settings())  # at 1 they are the same


def test_an_interruption_cancels_what_is_under_way(policy, stand_in) -> None:
    """A background job inherits an ignored SIGINT; in the foreground it is Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(count: int) -> None:
        signal.raise_signal(signal.SIGINT)

    stand_in.fault = lambda number, body: "time-out" if number else None
    try:
        with pytest.raises(KeyboardInterrupt):
            sample_responses(policy, PROMPTS, settings(), 1, interrupted, server=chosen(stand_in))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(stand_in.bodies) <= server.TRIED


def test_a_notebook_has_an_event_loop(policy, stand_in) -> None:
    async def cell() -> Any:
        return sampled(policy, stand_in, settings())

    assert len(asyncio.run(cell()).ids) == len(PROMPTS)


# Configuration


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "needs server.url"),
        ({"url": "http://localhost:1"}, "needs server.model"),
        ({"url": "localhost:8000", "model": "x"}, "an address"),
        ({"url": "file:///etc/passwd", "model": "x"}, "an address"),
        ({"url": "http://me:secret@host", "model": "x"}, "api_key_env"),
        ({"url": "http://host/?key=secret", "model": "x"}, "has a query"),
    ],
)
def test_a_server_that_cannot_be_asked_is_refused(table, said) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"sampling": {"engine": "server"}, "server": table})


def test_the_prefix_of_the_protocol_may_be_in_the_address() -> None:
    for given in (
        "http://host:8000",
        "http://host:8000/",
        "http://host:8000/v1",
        "http://host:8000/v1/",
    ):
        assert ServerConfig(url=given, model="x").url == "http://host:8000"


def test_settings_reach_the_table(tmp_path) -> None:
    from funcprobe.adapters.config.file import read_config

    (tmp_path / "c.toml").touch()
    given = {"sampling.engine": "server", "server.url": "http://h:1", "server.model": "m"}
    config = read_config(tmp_path / "c.toml", sets(given)[1::2])
    assert (config.sampling.engine, config.server.model) == ("server", "m")
