"""The completions protocol of OpenAI, with the token ids and log-probabilities of vLLM and SGLang.

What a server sends is data of unknown origin: only ids and numbers are read of it, each checked.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .. import strict_json
from ..config.schema import SamplingConfig
from ..console import excerpt

ROUNDING = 1e-3  # a log-probability above 0 by less is rounding
TOKEN = re.compile(r"token_id:(\d{1,10})")
BYTES_OF_A_TOKEN = 1024  # of an answer, which takes about a tenth of it
BYTES_OF_AN_ANSWER = 65536


class AnswerError(Exception):
    """An answer that is not usable; another one to the same request may be."""


class Asked(NamedTuple):
    """What an answer is checked against."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    eos_ids: Sequence[int]
    vocabulary: int  # rows of the model's embedding


class Answer(NamedTuple):
    """A response with the sampler's log-probability of every token, nats."""

    ids: list[int]
    logp: list[float]


def body(asked: Asked, model: str, config: SamplingConfig, seed: int) -> dict[str, Any]:
    """A request for one response. Everything that a server has a default for is said.

    vLLM takes unset values from the model's generation_config.json. Fields that a server does not know
    are ignored by both.
    """
    return {
        "model": model,
        "prompt": list(asked.prompt_ids),
        "max_tokens": asked.max_new_tokens,
        "n": 1,
        "seed": seed,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or -1,  # off; SGLang rejects 0
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "stop_token_ids": list(asked.eos_ids),
        # SGLang reads stop_token_ids only where an end of sequence counts.
        "ignore_eos": False,
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # vLLM before 0.10.2 has the ids only so
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "no_stop_trim": True,
        "echo": False,
        "stream": False,
    }


def most_bytes(asked: Asked) -> int:
    """Longer answers are not read to their end."""
    tokens = len(asked.prompt_ids) + asked.max_new_tokens
    return BYTES_OF_AN_ANSWER + BYTES_OF_A_TOKEN * tokens


def read(text: str, asked: Asked, model: str) -> Answer:
    """The response in an answer. AnswerError, one line, unless it is one to this request."""
    try:
        answer = strict_json.parse(text)
    except ValueError as error:
        raise AnswerError(f"an answer that is no JSON ({excerpt(str(error))})") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise AnswerError("an answer without choices")
    named = answer.get("model", model)
    if named != model:
        raise AnswerError(f"an answer of model {excerpt(str(named))}, not of {model}")
    if len(answer["choices"]) != 1 or not isinstance(answer["choices"][0], dict):
        raise AnswerError(f"{len(answer['choices'])} choices in an answer, expected 1")
    choice = answer["choices"][0]
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and prompt != list(asked.prompt_ids):
        raise AnswerError("an answer to another prompt (prompt_token_ids)")
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise AnswerError("an answer without log-probabilities: the server must return logprobs")
    ids = _ids(choice.get("token_ids"), logprobs.get("tokens"), asked.vocabulary)
    logp = _logp(logprobs.get("token_logprobs"), len(ids))
    _require_end(ids, choice.get("finish_reason"), asked)
    return Answer(ids, logp)


def _ids(given: Any, tokens: Any, vocabulary: int) -> list[int]:
    named = None
    if isinstance(tokens, list):
        found = [TOKEN.fullmatch(x) if isinstance(x, str) else None for x in tokens]
        named = [int(x[1]) for x in found if x] if all(found) else None
    ids = named if given is None else given
    if not isinstance(ids, list) or not all(type(x) is int for x in ids):
        raise AnswerError(
            "an answer without token ids: the server must know return_token_ids (vLLM 0.10.2 and "
            "later, SGLang)"
        )
    if not ids:
        raise AnswerError("an empty response")
    if named is not None and named != ids:
        raise AnswerError("token_ids that are not those of logprobs.tokens")
    if bad := [x for x in ids if not 0 <= x < vocabulary]:
        raise AnswerError(f"token {excerpt(str(bad[0]))}, but the model has {vocabulary} rows")
    return ids


def _logp(given: Any, count: int) -> list[float]:
    numbers = isinstance(given, list) and all(type(x) in (int, float) for x in given)
    if not numbers or len(given) != count:
        raise AnswerError(f"no log-probability for each of {count} tokens (logprobs.token_logprobs)")
    logp = [float(x) if abs(x) < 1e9 else math.inf for x in given]
    if bad := [x for x in logp if not -9998 < x <= ROUNDING]:
        raise AnswerError(f"a log-probability of {bad[0]:g}")
    return [min(x, 0.0) for x in logp]


def _require_end(ids: list[int], reason: Any, asked: Asked) -> None:
    ends = [k for k, x in enumerate(ids) if x in asked.eos_ids]
    if ends and ends[0] < len(ids) - 1:
        raise AnswerError(f"tokens after the end of sequence {ids[ends[0]]}: stop_token_ids is ignored")
    if len(ids) > asked.max_new_tokens:
        raise AnswerError(
            f"a response of {len(ids)} tokens, at most {asked.max_new_tokens} were asked for"
        )
    if not ends and len(ids) < asked.max_new_tokens:
        raise AnswerError(
            f"a response that stopped ({excerpt(str(reason))}) after {len(ids)} of "
            f"{asked.max_new_tokens} tokens with {ids[-1]}, which is no end of sequence here: name all "
            "of the server's in sampling.eos_ids, or give it a longer context"
        )
