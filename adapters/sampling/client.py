"""Requests to a server: repeated after a fault, bounded in time and size, cancelled together."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn, TypeVar

import httpx2

from funcprobe.types import InputError

from .. import strict_json
from ..config.schema import ServerConfig
from ..console import excerpt
from .completions import AnswerError

T = TypeVar("T")
PAUSE = 1.0  # seconds before the first repetition; doubled for each further one
LONGEST_PAUSE = 30.0
BUSY = {408, 425, 429}  # beside 500 and above: to be sent again
LISTED = 1 << 20  # bytes of a list of models, at most


class Call:
    """One request, and how its answer is read; `read` raises AnswerError for one that is not usable."""

    def __init__(self, body: dict[str, Any], most_bytes: int, read: Callable[[str], Any]) -> None:
        self.body, self.most_bytes, self.read = body, most_bytes, read


def answers(config: ServerConfig, calls: Sequence[Call], arrived: Callable[[int, Any], None]) -> int:
    """arrived(number of the call, what its `read` returns) of all; how many requests were sent again.

    InputError, one line, for a server that does not answer, or not so that it can be read, after
    `config.retries` repetitions; at once for a request that it rejects.
    """
    repeated: int = _run(lambda: _answers(config, calls, arrived))
    return repeated


def require_model(config: ServerConfig) -> None:
    """InputError unless the server's list has the model; a server without a list has any."""
    text = _run(lambda: _models(config))
    if text is None:
        return
    try:
        names = [x["id"] for x in strict_json.parse(text)["data"]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{config.url}/v1/models is no list of models: is it such a server?"
        ) from error
    assert config.model is not None
    # SGLang's "base:adapter" is not in the list, its base is.
    if not {config.model, config.model.partition(":")[0]} & set(map(str, names)):
        known = ", ".join(excerpt(str(x)) for x in names[:5])
        raise InputError(
            f'server.model = "{config.model}", but {config.url} has {known or "no model"}: load the '
            f"adapter under this name (vLLM: --enable-lora --lora-modules {config.model}=PATH)"
        )


async def _answers(
    config: ServerConfig, calls: Sequence[Call], arrived: Callable[[int, Any], None]
) -> int:
    repeated = 0
    free = asyncio.Semaphore(config.concurrency)

    async def one(client: httpx2.AsyncClient, number: int, call: Call) -> None:
        nonlocal repeated
        async with free:
            for attempt in range(config.retries + 1):
                try:
                    text = await _post(client, config, call)
                    found = call.read(text)
                except AnswerError as error:
                    if attempt == config.retries:
                        _give_up(config, error, attempt)
                    repeated += 1
                    await asyncio.sleep(min(LONGEST_PAUSE, PAUSE * 2**attempt))
                    continue
                arrived(number, found)
                return

    async with _client(config) as client:
        tasks = [asyncio.ensure_future(one(client, i, call)) for i, call in enumerate(calls)]
        try:
            await asyncio.gather(*tasks)
            return repeated
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _post(client: httpx2.AsyncClient, config: ServerConfig, call: Call) -> str:
    sent = client.stream("POST", f"{config.url}/v1/completions", json=call.body)
    status, text = await _answer(config, sent, call.most_bytes)
    if status != 200:
        raise InputError(
            f"{config.url} rejects the request with status {status} ({_reason(text, config)}): check "
            "server.url, server.model, server.api_key_env and the length of prompts"
        )
    return text


async def _models(config: ServerConfig) -> str | None:
    async with _client(config) as client:
        for attempt in range(config.retries + 1):
            try:
                sent = client.stream("GET", f"{config.url}/v1/models")
                status, text = await _answer(config, sent, LISTED)
            except AnswerError as error:
                if attempt == config.retries:
                    _give_up(config, error, attempt)
                await asyncio.sleep(min(LONGEST_PAUSE, PAUSE * 2**attempt))
                continue
            if status in {401, 403}:
                raise InputError(
                    f"{config.url} rejects the key with status {status}: name the environment variable "
                    "that has it in server.api_key_env"
                )
            return text if status == 200 else None
    raise AssertionError  # the last attempt returns or raises


async def _answer(
    config: ServerConfig, sent: AbstractAsyncContextManager[httpx2.Response], most: int
) -> tuple[int, str]:
    """Status and text. AnswerError if there is none in time, half of one, or a status to ask again."""
    try:
        async with asyncio.timeout(config.timeout), sent as answer:
            text = await _text(answer, most)
    except TimeoutError as error:
        raise AnswerError(f"no answer within {config.timeout:g} s") from error
    except httpx2.TransportError as error:
        raise AnswerError(_of_transport(error, config)) from error
    if answer.status_code in BUSY or answer.status_code >= 500:
        raise AnswerError(f"status {answer.status_code} ({_reason(text, config)})")
    return answer.status_code, text


async def _text(answer: httpx2.Response, most: int) -> str:
    """As it is sent: what is compressed would be larger than what was counted."""
    parts, size = [], 0
    async for part in answer.aiter_raw():
        size += len(part)
        if size > most:
            raise AnswerError(f"an answer of more than {most} bytes")
        parts.append(part)
    try:
        return b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AnswerError("an answer that is no UTF-8") from error


def _client(config: ServerConfig) -> httpx2.AsyncClient:
    headers = {"Accept-Encoding": "identity"}
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env, "")
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(
                f"server.api_key_env = {config.api_key_env}: this environment variable "
                f"{'has no key of printable characters' if key else 'is not set'}: export it"
            )
        headers["Authorization"] = f"Bearer {key}"
    try:
        httpx2.URL(f"{config.url}/v1/models")
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(config.timeout, connect=min(30.0, config.timeout)),
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
    except httpx2.InvalidURL as error:
        raise InputError(f"server.url = {excerpt(str(config.url))} is no address: {error}") from error
    except ValueError as error:  # of a proxy that the environment names
        raise InputError(
            f"{error}: check the variables HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
        ) from error


def _of_transport(error: httpx2.TransportError, config: ServerConfig) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {config.timeout:g} s"
    if isinstance(error, httpx2.ConnectError):
        return f"no connection ({excerpt(str(error))})"
    return f"half an answer ({excerpt(str(error) or type(error).__name__)})"


def _reason(text: str, config: ServerConfig) -> str:
    """The beginning of an answer, which may repeat the key that was sent."""
    key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
    text = text.replace(key, "***") if key else text
    return excerpt(text[:200].strip() or "no reason given")


def _give_up(config: ServerConfig, error: AnswerError, repeated: int) -> NoReturn:
    times = "once" if repeated == 1 else f"{repeated} times"
    again = f", asked {times} more" if repeated else ""
    raise InputError(
        f"{config.url} (server.url): {error}{again}: check that a server is running there, and its "
        "log; server.timeout, server.retries and server.concurrency say how it is asked"
    )


def _run(coroutine: Callable[[], Any]) -> Any:
    """Also where an event loop is running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(coroutine())).result()
