"""What the synchronous and the asynchronous client share: requests, retries, errors. No I/O."""

import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from nsa_client import parse
from nsa_client.errors import InvalidResponseError
from nsa_client.options import ChatOptions, CompletionOptions, request_body
from nsa_client.types import ChatCompletion, Completion, Model, TokenizeResult

T = TypeVar("T")
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages = Sequence[Mapping[str, Any]]

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
DEFAULT_MAX_RETRIES = 2

_RETRIED_STATUSES = frozenset({408, 409, 429})
_INITIAL_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 8.0
_MAX_RETRY_AFTER_S = 120.0


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request and how to read its answer. needs_model: the body must name a model."""

    method: str
    path: str
    build: Callable[[Any, str | None], T]
    body: Mapping[str, Any] | None = None
    needs_model: bool = False


class ClientCore:
    """Settings and request building. `base_url` may end in `/v1`, as other clients write it."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {max_retries}")
        self.base_url = base_url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.max_retries = max_retries
        self._model = model
        self._timeout = timeout
        self._headers = {"User-Agent": "nsa-client"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def _completion_call(
        self, prompt: Prompt, options: CompletionOptions, *, stream: bool
    ) -> Call[Completion]:
        body = request_body(options, CompletionOptions, prompt=prompt, **_stream_fields(stream))
        return Call("POST", "/v1/completions", parse.parse_completion, body, needs_model=True)

    def _chat_call(
        self, messages: Messages, options: ChatOptions, *, stream: bool
    ) -> Call[ChatCompletion]:
        body = request_body(options, ChatOptions, messages=messages, **_stream_fields(stream))
        path = "/v1/chat/completions"
        return Call("POST", path, parse.parse_chat_completion, body, needs_model=True)

    def _model_call(self, name: str) -> Call[Model]:
        return Call("GET", f"/v1/models/{quote(name)}", parse.parse_model)

    def _version_call(self) -> Call[str]:
        return Call("GET", "/version", parse.parse_version)

    def _models_call(self) -> Call[list[Model]]:
        return Call("GET", "/v1/models", parse.parse_models)

    def _tokenize_call(self, text: str | Messages, **options: bool | None) -> Call[TokenizeResult]:
        body: dict[str, Any] = {"prompt" if isinstance(text, str) else "messages": text}
        body |= {name: value for name, value in options.items() if value is not None}
        return Call("POST", "/tokenize", parse.parse_tokenize, body, needs_model=True)

    def _detokenize_call(self, token_ids: Sequence[int]) -> Call[str]:
        body = {"tokens": token_ids}
        return Call("POST", "/detokenize", parse.parse_detokenize, body, needs_model=True)

    def _request(self, call: Call[Any], model: str | None) -> tuple[str, str, bytes | None]:
        """Return method, URL and encoded body."""
        content = None
        if call.body is not None:
            body = dict(call.body)
            if call.needs_model:
                body.setdefault("model", model)
            content = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        return call.method, self.base_url + call.path, content

    def _needs_default_model(self, call: Call[Any]) -> bool:
        return call.needs_model and self._model is None and "model" not in (call.body or {})

    def _retry_delay_s(self, num_tries: int, response: httpx.Response | None) -> float | None:
        """Return how long to wait before the next try, or None when there is to be none.

        num_tries: tries made so far. response: None when the connection failed.
        """
        if num_tries > self.max_retries:
            return None
        return retry_delay_s(num_tries, response)


def first_model(models: Sequence[Model], base_url: str) -> str:
    """Return the model to ask for when the caller named none."""
    if not models:
        raise InvalidResponseError(f"{base_url} offers no model; name one with `model`")
    return models[0].id


def retry_delay_s(num_tries: int, response: httpx.Response | None) -> float | None:
    """Return the wait before try `num_tries` + 1, or None when a retry cannot help.

    The rules are those of the `openai` package: 408, 409, 429, 500 and above and lost connections
    are tried again unless `x-should-retry` says otherwise; `retry-after-ms` and `retry-after` up to
    120 s are obeyed, a longer one means do not retry; else 0.5 s doubling up to 8 s, less 0-25 %.
    """
    if response is not None:
        retry_after_s = parse_retry_after_s(response.headers)
        if retry_after_s is not None and retry_after_s > _MAX_RETRY_AFTER_S:
            return None
        should_retry = response.headers.get("x-should-retry")
        is_retried = response.status_code in _RETRIED_STATUSES or response.status_code >= 500
        if should_retry == "false" or (should_retry != "true" and not is_retried):
            return None
        if retry_after_s is not None and retry_after_s > 0:
            return retry_after_s
    backoff_s: float = min(_INITIAL_BACKOFF_S * 2.0 ** min(num_tries - 1, 10), _MAX_BACKOFF_S)
    return backoff_s * (1 - 0.25 * random.random())


def parse_retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in `retry-after-ms` or `retry-after` (a number or a date), if readable."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit_s
        except ValueError:
            continue
        if math.isfinite(seconds):
            return seconds
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else email.utils.mktime_tz(date) - time.time()


def _stream_fields(stream: bool) -> dict[str, Any]:
    # The usage comes with every stream, so that nobody counts chunks to count tokens.
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
