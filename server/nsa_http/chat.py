"""POST /v1/chat/completions.

In a stream each choice has: a first chunk whose delta holds the role, chunks of content, and one
last chunk with an empty delta and the finish_reason, as OpenAI sends them.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from nsa_http.generation import IndexedStream, UsageCounter, fold, start_streams
from nsa_http.logprobs import chat_logprobs, prompt_logprobs
from nsa_http.prompts import PromptInput, encode_chat, truncate_ids
from nsa_http.protocol import ChatBody
from nsa_http.state import ServerState
from nsa_http.streaming import ChunkEncoder, EventStreamResponse, respond_until_disconnect
from nsa_http.unsupported import check_unsupported, unknown_fields
from nsa_serve.request import RequestOutput


async def create_chat_completion(request: Request, body: ChatBody, state: ServerState) -> Response:
    """Answer chat messages, streamed or whole."""
    extra = body.model_extra or {}
    check_unsupported(extra)
    model = state.check_model(body.model)
    state.warn_unknown_fields(unknown_fields(extra))
    body.check(allows_priority=state.allows_priority)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = body.sampling_params(
        max_tokens=limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None
    )
    token_ids = await encode_chat(state, body)
    prompt = PromptInput(truncate_ids(state, token_ids, body.truncate_prompt_tokens))
    chat_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    stream = await start_streams(state, [prompt], params, body, request_id=chat_id)
    base = {
        "id": chat_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    writer = ChatWriter(state, body, prompt)
    if body.stream:
        return EventStreamResponse(_events(stream, writer, base), state)
    return await respond_until_disconnect(request, _whole(stream, writer, base), state)


async def _whole(stream: IndexedStream, writer: "ChatWriter", base: dict[str, Any]) -> Response:
    body, usage = writer.body, writer.usage
    outputs = await fold(stream, usage, num_choices=body.num_samples)
    choices = [writer.choice(index, output) for index, output in enumerate(outputs)]
    content = {**base, "choices": choices, "usage": usage.as_dict()}
    if body.return_token_ids:
        content["prompt_token_ids"] = writer.prompt.token_ids
    if body.prompt_logprobs is not None:
        content["prompt_logprobs"] = writer.prompt_logprobs(outputs[0])
    return Response(orjson.dumps(content), media_type="application/json")


async def _events(
    stream: IndexedStream, writer: "ChatWriter", base: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    body, usage = writer.body, writer.usage
    encoder = ChunkEncoder(base, has_usage=body.has_usage_chunk)
    is_continuous = body.has_continuous_usage
    async with aclosing(stream):
        async for index, output in stream:
            usage.add(index, output)
            so_far = usage.as_dict() if is_continuous else None
            for choice in writer.deltas(index, output):
                yield encoder.chunk(choice, so_far)
    if body.has_usage_chunk:
        yield encoder.usage_chunk(usage.as_dict())


class ChatWriter:
    """Turns outputs into `choices` entries."""

    def __init__(self, state: ServerState, body: ChatBody, prompt: PromptInput) -> None:
        self.body = body
        self.prompt = prompt
        self.usage = UsageCounter([prompt], body.num_samples)
        self._tokenizer = state.tokenizer
        self._started: set[int] = set()

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Return the entry of a whole answer."""
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def deltas(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """Return the entries of one delta: role, content, finish; those that are due."""
        entries = []
        if index not in self._started:
            self._started.add(index)
            first = _delta(index, {"role": "assistant", "content": ""})
            if self.body.return_token_ids:
                first["prompt_token_ids"] = self.prompt.token_ids
            entries.append(first)
        reports_tokens = self.body.logprobs or self.body.return_token_ids
        if output.text or (output.token_ids and reports_tokens):
            entry = _delta(index, {"content": output.text})
            if self.body.logprobs:
                entry["logprobs"] = self._logprobs(output)
            if self.body.return_token_ids:
                entry["token_ids"] = output.token_ids
            entries.append(entry)
        if output.finish_reason is not None:
            last = _delta(index, {})
            last["finish_reason"] = output.finish_reason
            last["stop_reason"] = output.stop_reason
            entries.append(last)
        return entries

    def prompt_logprobs(self, output: RequestOutput) -> list[dict[str, Any] | None]:
        """Return the entries of the prompt's tokens."""
        return prompt_logprobs(self._tokenizer, output.prompt_logprobs or [])

    def _logprobs(self, output: RequestOutput) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, output.logprobs or [])


def _delta(index: int, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
