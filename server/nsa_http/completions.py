"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from nsa_http.constraints import constrain
from nsa_http.generation import IndexedStream, UsageCounter, drop_output, fold, start_streams
from nsa_http.logprobs import LegacyLogprobs, prompt_logprobs
from nsa_http.prompts import PromptInput, encode_prompts
from nsa_http.protocol import CompletionBody
from nsa_http.state import ServerState
from nsa_http.streaming import ChunkEncoder, EventStreamResponse, respond_until_disconnect
from nsa_http.trace import make_trace_writer
from nsa_http.unsupported import check_unsupported, unknown_fields
from nsa_serve.request import RequestOutput, TokenLogprobs

_DEFAULT_MAX_TOKENS = 16


async def create_completion(request: Request, body: CompletionBody, state: ServerState) -> Response:
    """Complete prompts, streamed or whole."""
    extra = body.model_extra or {}
    check_unsupported(extra)
    model = state.check_model(body.model)
    state.warn_unknown_fields(unknown_fields(extra))
    body.check(allows_priority=state.allows_priority)
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = body.sampling_params(
        max_tokens=max(1, max_tokens), logprobs=body.logprobs, defaults=state.sampling_defaults
    )
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params = msgspec.structs.replace(params, prompt_logprobs=body.logprobs)
    prompts = await encode_prompts(
        state,
        body.prompt,
        add_special_tokens=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
        truncation_side=body.truncation_side,
    )
    params = await constrain(state, body, params)
    completion_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
    stream = await start_streams(state, prompts, params, body, request_id=completion_id)
    if max_tokens == 0:
        stream = drop_output(stream)
    base = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    writer = CompletionWriter(state, body, prompts)
    if body.stream:
        return EventStreamResponse(_events(stream, writer, base), state)
    return await respond_until_disconnect(request, _whole(stream, writer, base), state)


async def _whole(
    stream: IndexedStream, writer: "CompletionWriter", base: dict[str, Any]
) -> Response:
    outputs = await fold(stream, writer.usage, num_choices=writer.num_choices)
    choices = [writer.choice(index, output) for index, output in enumerate(outputs)]
    content = {**base, "choices": choices, "usage": writer.usage.as_dict()}
    return Response(orjson.dumps(content), media_type="application/json")


async def _events(
    stream: IndexedStream, writer: "CompletionWriter", base: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    body, usage = writer.body, writer.usage
    encoder = ChunkEncoder(base, has_usage=body.has_usage_chunk)
    is_continuous = body.has_continuous_usage
    async with aclosing(stream):
        async for index, output in stream:
            usage.add(index, output)
            choice = writer.choice(index, output)
            if writer.says_something(choice):
                yield encoder.chunk(choice, usage.as_dict() if is_continuous else None)
    if body.has_usage_chunk:
        yield encoder.usage_chunk(usage.as_dict())


class CompletionWriter:
    """Turns outputs into `choices` entries; a whole output is one big delta."""

    def __init__(
        self, state: ServerState, body: CompletionBody, prompts: Sequence[PromptInput]
    ) -> None:
        self.body = body
        self.usage = UsageCounter(prompts, body.num_samples)
        self.num_choices = len(prompts) * body.num_samples
        self._tokenizer = state.tokenizer
        self._prompts = prompts
        self._skip_special_tokens = body.skip_special_tokens is not False
        self._trace = make_trace_writer(state, body)
        self._started: set[int] = set()
        self._logprobs: dict[int, LegacyLogprobs] = {}

    @staticmethod
    def says_something(choice: dict[str, Any]) -> bool:
        """True when a delta is worth a chunk."""
        return bool(
            choice["text"]
            or choice["finish_reason"]
            or choice["logprobs"]
            or choice.get("token_ids")
            or choice.get("prompt_token_ids")
            or choice.get("nsa_trace")
        )

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Return the entry of one delta."""
        is_first = index not in self._started
        text = output.text
        if is_first:
            self._started.add(index)
            if self.body.echo:
                text = self._prompt_text(index) + text
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self.body.logprobs is not None:
            choice["logprobs"] = self._legacy_logprobs(index, output, is_first)
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids
            choice["prompt_token_ids"] = self._prompt(index).token_ids if is_first else None
        if self.body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, output.prompt_logprobs or []
            )
        if self._trace is not None and output.token_ids:
            choice["nsa_trace"] = self._trace.entry(output)
        return choice

    def _legacy_logprobs(
        self, index: int, output: RequestOutput, is_first: bool
    ) -> dict[str, list[Any]] | None:
        token_ids = output.token_ids
        items: list[TokenLogprobs | None] = list(output.logprobs or [])
        if is_first:
            self._logprobs[index] = LegacyLogprobs(
                self._tokenizer,
                skip_special_tokens=self._skip_special_tokens,
                as_token_ids=bool(self.body.return_tokens_as_token_ids),
            )
            if self.body.echo:
                token_ids = [*self._prompt(index).token_ids, *token_ids]
                items = [None, *(output.prompt_logprobs or []), *items]
        return self._logprobs[index].add(token_ids, items) if token_ids else None

    def _prompt(self, index: int) -> PromptInput:
        return self._prompts[index // self.body.num_samples]

    def _prompt_text(self, index: int) -> str:
        prompt = self._prompt(index)
        if prompt.text is not None and self._skip_special_tokens:
            return prompt.text
        return self._tokenizer.decode(
            prompt.token_ids, skip_special_tokens=self._skip_special_tokens
        )
