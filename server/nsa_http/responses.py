"""POST /v1/responses, without state: nothing is stored, every request brings its whole history."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from nsa_http.answer import AnswerParser
from nsa_http.chat import ChatRun, prepare_chat
from nsa_http.errors import GenerationError, describe
from nsa_http.generation import IndexedStream, UsageCounter, start_streams
from nsa_http.logprobs import chat_logprobs
from nsa_http.responses_items import OutputItems, TypedEvent
from nsa_http.responses_protocol import ResponsesBody, rename_param
from nsa_http.state import ServerState
from nsa_http.streaming import EventStreamResponse, respond_until_disconnect
from nsa_serve.errors import RequestError
from nsa_serve.request import FinishReason, RequestOutput


async def create_response(request: Request, body: ResponsesBody, state: ServerState) -> Response:
    """Answer the input, streamed or whole."""
    unknown = body.check_extra()
    model = state.check_model(body.model)
    state.warn_unknown_fields(unknown)
    try:
        chat = body.to_chat(max_model_len=state.require_engine().info.max_model_len)
        run = await prepare_chat(state, chat)
        response_id = f"resp_{body.request_id or uuid.uuid4().hex}"
        stream = await start_streams(state, [run.prompt], run.params, chat, request_id=response_id)
    except RequestError as error:
        raise rename_param(error) from None
    writer = ResponseWriter(state, body, run, response_id, model)
    if body.stream:
        return EventStreamResponse(_events(stream, writer), state, end=b"")
    return await respond_until_disconnect(request, _whole(stream, writer), state)


async def _whole(stream: IndexedStream, writer: "ResponseWriter") -> Response:
    async with aclosing(stream):
        async for _, output in stream:
            writer.add(output)
    writer.check_ended()
    return Response(orjson.dumps(writer.response()), media_type="application/json")


async def _events(stream: IndexedStream, writer: "ResponseWriter") -> AsyncGenerator[bytes, None]:
    number = 0

    def encode(event: TypedEvent) -> bytes:
        nonlocal number
        data = orjson.dumps({**event, "sequence_number": number})
        number += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)

    try:
        async with aclosing(stream):
            async for _, output in stream:
                # Not before: what goes wrong until then is answered with its HTTP status.
                if number == 0:
                    for kind in ("response.created", "response.in_progress"):
                        yield encode({"type": kind, "response": writer.response()})
                for event in writer.add(output):
                    yield encode(event)
        writer.check_ended()
    # A response that has begun says itself how it ended.
    except Exception as error:
        if number == 0:
            raise
        writer.fail(error)
    response = writer.response()
    yield encode({"type": f"response.{response['status']}", "response": response})


class ResponseWriter:
    """Turns outputs into the response object and its events."""

    def __init__(
        self, state: ServerState, body: ResponsesBody, run: ChatRun, response_id: str, model: str
    ) -> None:
        self._body = body
        self._tokenizer = state.tokenizer
        self._parser = AnswerParser(run.answer_format)
        self._usage = UsageCounter([run.prompt], 1)
        self._output = OutputItems()
        self._num_reasoning_tokens = 0
        self._logprobs: list[Any] = []
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._base = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **_echo(body, state.sampling_defaults),
        }

    def add(self, output: RequestOutput) -> list[TypedEvent]:
        """Take over an output; return the events that are due."""
        self._usage.add(0, output)
        is_last = output.finish_reason is not None
        was_reasoning = self._parser.is_reasoning
        found = self._parser.feed(output.text, is_last=is_last)
        if was_reasoning or self._parser.is_reasoning:
            self._num_reasoning_tokens += len(output.token_ids)
        if self._body.wants_logprobs:
            self._logprobs += chat_logprobs(self._tokenizer, output.logprobs or [])["content"]
        events: list[TypedEvent] = []
        for event in found:
            events += self._output.add(event, self._logprobs)
            self._logprobs = []
        if is_last:
            is_cut = output.finish_reason is FinishReason.LENGTH
            self._status = "incomplete" if is_cut else "completed"
            events += self._output.close(self._status)
        return events

    def check_ended(self) -> None:
        """Raise GenerationError when the outputs stopped before the last one."""
        if self._status == "in_progress":
            raise GenerationError

    def fail(self, error: Exception) -> None:
        """The generation ended with an error."""
        _status, message, _param, _headers = describe(error)
        self._status = "failed"
        self._error = {"code": "server_error", "message": message}
        self._output.close("incomplete")

    def response(self) -> dict[str, Any]:
        """Return the response object as it stands."""
        is_over = self._status in ("completed", "incomplete")
        is_cut = self._status == "incomplete"
        return {
            **self._base,
            "status": self._status,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": list(self._output.items),
            "usage": self._usage_object() if is_over else None,
        }

    def _usage_object(self) -> dict[str, Any]:
        usage = self._usage.as_dict()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }


def _echo(body: ResponsesBody, sampling_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a response repeats of its request, defaults filled in."""
    text = body.text
    used = {"temperature": 1.0, "top_p": 1.0, **sampling_defaults}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": used["temperature"] if body.temperature is None else body.temperature,
        "text": {"format": (text.format if text else None) or {"type": "text"}},
        "tool_choice": _echo_choice(body.tool_choice),
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": used["top_p"] if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
    }


def _echo_choice(choice: Any) -> Any:
    if isinstance(choice, dict):
        return {"type": "function", "name": choice["name"]}
    return "auto" if choice is None else choice
