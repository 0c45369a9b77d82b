"""Configuration of the server that samples, if sampling.engine is "server"."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from .section import Positive, Section, Text


class ServerConfig(Section):
    """A server that has the adapter loaded (vLLM, SGLang), for sampling.engine = "server"."""

    url: Text | None = Field(
        None,
        description="Its address, of the completions protocol of OpenAI; with or without /v1.",
        examples=["http://localhost:8000"],
    )
    model: Text | None = Field(
        None,
        description="Name under which it has the adapter (vLLM: --lora-modules NAME=PATH).",
        examples=["policy"],
    )
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        None,
        description="Name of the environment variable with its API key, which is written nowhere.",
        examples=["VLLM_API_KEY"],
    )
    concurrency: Positive = Field(32, description="Requests at once, one response each.")
    timeout: float = Field(600.0, gt=0, le=86400, description="Longest wait for a response, seconds.")
    retries: int = Field(
        4,
        ge=0,
        le=20,
        description="How often a request that failed is sent again, after 1, 2, 4 seconds and so on.",
    )

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str | None) -> str | None:
        if url is None:
            return url
        parts = urlsplit(url)
        if not url.isprintable() or " " in url:
            raise ValueError("has a space or a character that cannot be printed: remove it")
        parts.port  # noqa: B018 ValueError, with the reason, if it is none
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError('an address such as "http://localhost:8000" is expected')
        if parts.username is not None or parts.password is not None:
            raise ValueError("has a user or a password: name an environment variable in api_key_env")
        if parts.query or parts.fragment:
            raise ValueError("has a query or a fragment, which the protocol has no place for")
        return url.rstrip("/").removesuffix("/v1")
