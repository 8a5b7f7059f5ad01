"""POST /v1/chat/completions.

In a stream each choice has: a first chunk whose delta holds the role, chunks of content, and one
last chunk with an empty delta and the finish_reason, as OpenAI sends them. A tool call begins with
a chunk that has its id and name; chunks with pieces of its arguments follow.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from nsa_http.answer import AnswerFormat, AnswerParser, make_format
from nsa_http.constraints import constrain
from nsa_http.generation import IndexedStream, UsageCounter, fold, start_streams
from nsa_http.logprobs import chat_logprobs, prompt_logprobs
from nsa_http.prompts import (
    PromptInput,
    echoed_text,
    encode_rendered,
    render_chat,
    truncate_ids,
)
from nsa_http.protocol import ChatBody
from nsa_http.state import ServerState
from nsa_http.streaming import ChunkEncoder, EventStreamResponse, respond_until_disconnect
from nsa_http.structured import structured_from_schema
from nsa_http.tools.definitions import ToolRequest, read_tools
from nsa_http.tools.events import ArgumentsDelta, CallStart, ContentDelta, Event, ReasoningDelta
from nsa_http.tools.forced import required_schema
from nsa_http.trace import make_trace_writer
from nsa_http.unsupported import check_unsupported, unknown_fields
from nsa_serve.request import RequestOutput, SamplingParams, StructuredOutput


@dataclass(frozen=True, slots=True)
class ChatRun:
    """A chat request made ready: what the engine gets, and how its answers are read."""

    prompt: PromptInput
    params: SamplingParams
    answer_format: AnswerFormat


async def create_chat_completion(request: Request, body: ChatBody, state: ServerState) -> Response:
    """Answer chat messages, streamed or whole."""
    extra = body.model_extra or {}
    check_unsupported(extra)
    model = state.check_model(body.model)
    state.warn_unknown_fields(unknown_fields(extra))
    run = await prepare_chat(state, body)
    chat_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    stream = await start_streams(state, [run.prompt], run.params, body, request_id=chat_id)
    base = {
        "id": chat_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    writer = ChatWriter(state, body, run)
    if body.stream:
        return EventStreamResponse(_events(stream, writer, base), state)
    return await respond_until_disconnect(request, _whole(stream, writer, base), state)


async def prepare_chat(state: ServerState, body: ChatBody) -> ChatRun:
    """Check the fields, write the prompt and compile constraints. Raises RequestError."""
    body.check(allows_priority=state.allows_priority)
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = body.sampling_params(
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        defaults=state.sampling_defaults,
    )
    rendered = render_chat(state, body, tools.tools)
    token_ids = await encode_rendered(state, body, rendered)
    params = await constrain(state, body, params, structured=await _call_output(state, tools))
    kept = truncate_ids(state, token_ids, body.truncate_prompt_tokens, body.truncation_side)
    answer_format = make_format(
        state, body, tools, rendered, is_constrained=params.structured is not None
    )
    if answer_format.needs_special_tokens(state.tokenizer):
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    prompt = PromptInput(kept, echoed_text(body) if body.echo else None)
    return ChatRun(prompt, params, answer_format)


async def _call_output(state: ServerState, tools: ToolRequest) -> StructuredOutput | None:
    """Return what the output must match when the tool choice asks for a call."""
    if not tools.is_forced:
        return None
    if tools.choice.mode == "named":
        return await structured_from_schema(state, tools.chosen.parameters, param="tools")
    schema = required_schema(tools.tools, allows_several=tools.allows_several)
    return await structured_from_schema(state, schema, param="tools")


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

    def __init__(self, state: ServerState, body: ChatBody, run: ChatRun) -> None:
        self.body = body
        self.prompt = run.prompt
        self.usage = UsageCounter([run.prompt], body.num_samples)
        self._tokenizer = state.tokenizer
        self._format = run.answer_format
        self._trace = make_trace_writer(state, body)
        # One for each choice that has begun.
        self._parsers: dict[int, AnswerParser] = {}

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Return the entry of a whole answer."""
        parser = AnswerParser(self._format)
        events = parser.feed(output.text, is_last=True)
        choice: dict[str, Any] = {
            "index": index,
            "message": _message(events, self.prompt.text or ""),
            "logprobs": self._logprobs(output),
            "finish_reason": self._format.finish_reason(
                output.finish_reason, has_calls=parser.has_calls
            ),
            "stop_reason": output.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids
        if self._trace is not None:
            choice["nsa_trace"] = self._trace.entry(output)
        return choice

    def deltas(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """Return the entries of one delta: role, text and calls, finish; those that are due."""
        entries = []
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = AnswerParser(self._format)
            first = _delta(index, {"role": "assistant", "content": ""})
            if self.body.return_token_ids:
                first["prompt_token_ids"] = self.prompt.token_ids
            entries.append(first)
            if self.prompt.text:
                entries.append(_delta(index, {"content": self.prompt.text}))
        is_last = output.finish_reason is not None
        parts = [_part(event) for event in parser.feed(output.text, is_last=is_last)]
        reports_tokens = self.body.logprobs or self.body.return_token_ids or self._trace
        if output.token_ids and reports_tokens and not parts:
            parts.append({"content": ""})
        new = [_delta(index, part) for part in parts]
        if new and self.body.logprobs:
            new[0]["logprobs"] = self._logprobs(output)
        if new and self.body.return_token_ids:
            new[0]["token_ids"] = output.token_ids
        if new and output.token_ids and self._trace is not None:
            new[0]["nsa_trace"] = self._trace.entry(output)
        entries += new
        if is_last:
            last = _delta(index, {})
            last["finish_reason"] = self._format.finish_reason(
                output.finish_reason, has_calls=parser.has_calls
            )
            last["stop_reason"] = output.stop_reason
            entries.append(last)
        return entries

    def prompt_logprobs(self, output: RequestOutput) -> list[dict[str, Any] | None]:
        """Return the entries of the prompt's tokens."""
        return prompt_logprobs(self._tokenizer, output.prompt_logprobs or [])

    def _logprobs(self, output: RequestOutput) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(
            self._tokenizer,
            output.logprobs or [],
            as_token_ids=bool(self.body.return_tokens_as_token_ids),
        )


def _message(events: list[Event], echo: str) -> dict[str, Any]:
    """Return the message of a whole answer."""
    content, thoughts = [echo], []
    calls: list[dict[str, Any]] = []
    for event in events:
        match event:
            case ContentDelta():
                content.append(event.text)
            case ReasoningDelta():
                thoughts.append(event.text)
            case CallStart():
                calls.append(_call(event))
            case ArgumentsDelta():
                calls[-1]["function"]["arguments"] += event.text
    text: str | None = "".join(content)
    if not text and (calls or thoughts):
        text = None
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if thoughts:
        message |= _reasoning("".join(thoughts))
    if calls:
        message["tool_calls"] = calls
    return message


def _part(event: Event) -> dict[str, Any]:
    """Return the delta of an event."""
    match event:
        case ContentDelta():
            return {"content": event.text}
        case ReasoningDelta():
            return dict(_reasoning(event.text))
        case CallStart():
            return {"tool_calls": [{"index": event.index, **_call(event)}]}
        case ArgumentsDelta():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def _reasoning(text: str) -> dict[str, str]:
    # vLLM's name, and the one that it and others had before.
    return {"reasoning": text, "reasoning_content": text}


def _call(event: CallStart) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
