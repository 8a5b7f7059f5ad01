"""The synchronous client, and the stream it returns."""

import time
from collections.abc import Generator, Sequence
from typing import Any, Self, TypeVar, Unpack

import httpx

from nsa_client.core import (
    DEFAULT_BASE_URL,
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT,
    Call,
    ClientCore,
    Messages,
    Prompt,
    first_model,
)
from nsa_client.errors import connection_error, status_error
from nsa_client.options import ChatOptions, CompletionOptions
from nsa_client.parse import ChunkParser, parse_response
from nsa_client.types import ChatCompletion, Chunk, Completion, Model, TokenizeResult

T = TypeVar("T")


class Stream:
    """Iterate over the chunks of an answer. The request is sent when the first one is asked for.

    `close`, or the end of a `with` block, closes the connection: the server stops generating.
    """

    def __init__(self, chunks: Generator[Chunk, None, None]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Close the connection; a finished stream is already closed."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Client(ClientCore):
    """Talk to a server. Every method raises `APIError` or one of its subclasses.

    model: which to ask for; without it, the first one that the server lists.
    timeout: seconds, or an `httpx.Timeout`; it bounds each wait, not the whole answer.
    max_retries: how often a refused or lost request is sent again, after the wait that the server
    asked for. transport: an httpx transport, for tests and for Unix sockets.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, model=model, timeout=timeout, max_retries=max_retries)
        self._http = httpx.Client(headers=self._headers, timeout=self._timeout, transport=transport)

    def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Return the continuation of a prompt: text, token ids, or a list of either."""
        return self._run(self._completion_call(prompt, options, stream=False))

    def stream(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Stream:
        """Return the continuation of a prompt piece by piece."""
        return Stream(self._chunks(self._completion_call(prompt, options, stream=True)))

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Return the answer to a conversation."""
        return self._run(self._chat_call(messages, options, stream=False))

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Stream:
        """Return the answer to a conversation piece by piece."""
        return Stream(self._chunks(self._chat_call(messages, options, stream=True)))

    def models(self) -> list[Model]:
        """Return the models that the server offers."""
        return self._run(self._models_call())

    def model(self, name: str) -> Model:
        """Return one model. Raises NotFoundError when the server does not offer it."""
        return self._run(self._model_call(name))

    def tokenize(
        self,
        text: str | Messages,
        *,
        add_special_tokens: bool | None = None,
        return_token_strs: bool | None = None,
    ) -> TokenizeResult:
        """Return the tokens of a text, or of a conversation in the model's chat template."""
        call = self._tokenize_call(
            text, add_special_tokens=add_special_tokens, return_token_strs=return_token_strs
        )
        return self._run(call)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._run(self._detokenize_call(token_ids))

    def metrics(self) -> str:
        """Return the Prometheus metrics in their text format."""
        return self._send("GET", self.base_url + "/metrics", None).text

    def version(self) -> str:
        """Return the version of the server."""
        return self._run(self._version_call())

    def health(self) -> bool:
        """Return True when the server can answer, False when it says 503. Never retries."""
        return self._probe("/health")

    def ready(self) -> bool:
        """Return True when the server takes requests, False while it loads or drains."""
        return self._probe("/ready")

    def _probe(self, path: str) -> bool:
        try:
            response = self._http.get(self.base_url + path)
        except httpx.RequestError as error:
            raise connection_error(error, self.base_url) from error
        if response.status_code not in (200, 503):
            raise status_error(response)
        return response.status_code == 200

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _default_model(self, call: Call[Any]) -> str | None:
        if self._needs_default_model(call):
            self._model = first_model(self.models(), self.base_url)
        return self._model

    def _run(self, call: Call[T]) -> T:
        response = self._send(*self._request(call, self._default_model(call)))
        return parse_response(response, call.build)

    def _chunks(self, call: Call[Any]) -> Generator[Chunk, None, None]:
        response = self._send(*self._request(call, self._default_model(call)), stream=True)
        parser = ChunkParser(response.headers.get("x-request-id"))
        try:
            for data in response.iter_bytes():
                yield from parser.feed(data)
                if parser.is_done:
                    break
        except httpx.RequestError as error:
            raise connection_error(error, self.base_url) from error
        finally:
            response.close()
        parser.close()

    def _send(
        self, method: str, url: str, content: bytes | None, *, stream: bool = False
    ) -> httpx.Response:
        num_tries = 0
        headers = None if content is None else {"Content-Type": "application/json"}
        while True:
            request = self._http.build_request(method, url, content=content, headers=headers)
            num_tries += 1
            try:
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                response.read()
            except httpx.RequestError as error:
                delay_s = self._retry_delay_s(num_tries, None)
                if delay_s is None:
                    raise connection_error(error, self.base_url) from error
            else:
                delay_s = self._retry_delay_s(num_tries, response)
                if delay_s is None:
                    raise status_error(response)
            time.sleep(delay_s)
