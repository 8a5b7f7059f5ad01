"""The asynchronous client, and the stream it returns."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
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


class AsyncStream:
    """Iterate asynchronously over the chunks of an answer; sent when the first one is asked for.

    `aclose`, the end of an `async with` block and the cancellation of the reading task close the
    connection: the server stops generating. A `break` alone leaves that to garbage collection.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Close the connection; a finished stream is already closed."""
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class AsyncClient(ClientCore):
    """`Client` for asyncio: the same arguments, the same methods to await."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, model=model, timeout=timeout, max_retries=max_retries)
        self._http = httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, transport=transport
        )

    async def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Completion:
        """Return the continuation of a prompt: text, token ids, or a list of either."""
        return await self._run(self._completion_call(prompt, options, stream=False))

    def stream(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """Return the continuation of a prompt piece by piece."""
        return AsyncStream(self._chunks(self._completion_call(prompt, options, stream=True)))

    async def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Return the answer to a conversation."""
        return await self._run(self._chat_call(messages, options, stream=False))

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncStream:
        """Return the answer to a conversation piece by piece."""
        return AsyncStream(self._chunks(self._chat_call(messages, options, stream=True)))

    async def models(self) -> list[Model]:
        """Return the models that the server offers."""
        return await self._run(self._models_call())

    async def model(self, name: str) -> Model:
        """Return one model. Raises NotFoundError when the server does not offer it."""
        return await self._run(self._model_call(name))

    async def tokenize(
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
        return await self._run(call)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await self._run(self._detokenize_call(token_ids))

    async def metrics(self) -> str:
        """Return the Prometheus metrics in their text format."""
        return (await self._send("GET", self.base_url + "/metrics", None)).text

    async def version(self) -> str:
        """Return the version of the server."""
        return await self._run(self._version_call())

    async def health(self) -> bool:
        """Return True when the server can answer, False when it says 503. Never retries."""
        return await self._probe("/health")

    async def ready(self) -> bool:
        """Return True when the server takes requests, False while it loads or drains."""
        return await self._probe("/ready")

    async def _probe(self, path: str) -> bool:
        try:
            response = await self._http.get(self.base_url + path)
        except httpx.RequestError as error:
            raise connection_error(error, self.base_url) from error
        if response.status_code not in (200, 503):
            raise status_error(response)
        return response.status_code == 200

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _default_model(self, call: Call[Any]) -> str | None:
        if self._needs_default_model(call):
            self._model = first_model(await self.models(), self.base_url)
        return self._model

    async def _run(self, call: Call[T]) -> T:
        response = await self._send(*self._request(call, await self._default_model(call)))
        return parse_response(response, call.build)

    async def _chunks(self, call: Call[Any]) -> AsyncGenerator[Chunk, None]:
        request = self._request(call, await self._default_model(call))
        response = await self._send(*request, stream=True)
        parser = ChunkParser(response.headers.get("x-request-id"))
        try:
            async for data in response.aiter_bytes():
                for chunk in parser.feed(data):
                    yield chunk
                if parser.is_done:
                    break
        except httpx.RequestError as error:
            raise connection_error(error, self.base_url) from error
        finally:
            await response.aclose()
        parser.close()

    async def _send(
        self, method: str, url: str, content: bytes | None, *, stream: bool = False
    ) -> httpx.Response:
        num_tries = 0
        headers = None if content is None else {"Content-Type": "application/json"}
        while True:
            request = self._http.build_request(method, url, content=content, headers=headers)
            num_tries += 1
            try:
                response = await self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.RequestError as error:
                delay_s = self._retry_delay_s(num_tries, None)
                if delay_s is None:
                    raise connection_error(error, self.base_url) from error
            else:
                delay_s = self._retry_delay_s(num_tries, response)
                if delay_s is None:
                    raise status_error(response)
            await asyncio.sleep(delay_s)
