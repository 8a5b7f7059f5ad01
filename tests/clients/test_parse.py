"""Answers beyond plain text: tool calls, reasoning, traces; and the options that ask for them."""

import json
from typing import Any

import httpx
import pytest

from nsa_client import (
    ChatOptions,
    Client,
    CompletionOptions,
    InvalidResponseError,
    ToolCall,
    ToolCallDelta,
    join_tool_calls,
)
from nsa_http.protocol import ChatBody, CompletionBody
from tests.clients.raw_server import DONE, event

ENVELOPE = {"id": "c", "model": "tiny", "created": 1}


def client(answer: Any, seen: list[Any] | None = None) -> Client:
    def handler(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        if isinstance(answer, bytes):
            return httpx.Response(200, content=answer)
        return httpx.Response(200, json=answer)

    return Client(model="tiny", transport=httpx.MockTransport(handler))


def chat_answer(**message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": "stop"}
    return {**ENVELOPE, "choices": [choice]}


def delta(*calls: Any, **fields: Any) -> bytes:
    fields |= {"tool_calls": list(calls)} if calls else {}
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"a": 1}'},
}


def test_a_message_of_tool_calls_keeps_what_can_be_sent_back() -> None:
    answer = client(chat_answer(content=None, tool_calls=[CALL], reasoning="hm")).chat([])
    assert answer.tool_calls == (ToolCall("call_1", "f", '{"a": 1}'),)
    assert answer.text == ""
    message = answer.choices[0].message
    assert message == {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        ({"reasoning": "new"}, "new"),
        ({"reasoning_content": "old"}, "old"),
        ({"reasoning": "same", "reasoning_content": "same"}, "same"),
        ({"reasoning": None, "reasoning_content": None}, None),
        ({}, None),
    ],
)
def test_reasoning_has_two_names(message: dict[str, Any], reasoning: str | None) -> None:
    answer = client(chat_answer(content="a", **message)).chat([])
    assert answer.choices[0].reasoning == reasoning
    chunks = list(client(delta(**message) + DONE).stream_chat([]))
    assert [chunk.reasoning for chunk in chunks] == [reasoning or ""]


def test_streamed_calls_are_put_together_by_their_index() -> None:
    body = b"".join(
        [
            delta({"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}),
            delta({"index": 0, "function": {"arguments": '{"a"'}}),
            delta({"index": 1, "id": "y", "function": {"name": "g", "arguments": "{}"}}),
            delta({"index": 0, "function": {"arguments": ": 1}"}}),
            DONE,
        ]
    )
    deltas = [d for chunk in client(body).stream_chat([]) for d in chunk.tool_calls]
    assert len(deltas) == 4
    calls = join_tool_calls(deltas)
    assert calls == (ToolCall("x", "f", '{"a": 1}'), ToolCall("y", "g", "{}"))
    assert join_tool_calls([]) == ()
    with pytest.raises(ValueError, match="tool call 3 has no delta with its id and name"):
        join_tool_calls([ToolCallDelta(3, None, None, "{}")])


def test_a_trace_is_read_from_answers_and_chunks() -> None:
    trace = {"block_size": 64, "position": 9, "layers": [0, 5], "tokens": [[[[0, 2]], [[1]]]]}
    choice = {"index": 0, "text": "a", "finish_reason": None, "nsa_trace": trace}
    whole = client({**ENVELOPE, "choices": [choice]}).complete("x").choices[0].nsa_trace
    (chunk,) = client(event(choices=[choice]) + DONE).stream("x")
    assert whole is not None
    assert chunk.choices[0].nsa_trace == whole
    assert (whole.block_size, whole.position, whole.layers) == (64, 9, (0, 5))
    assert whole.tokens == ((((0, 2),), ((1,),)),)
    assert not whole.is_truncated
    cut = {**choice, "nsa_trace": {**trace, "truncated": True}}
    (chunk,) = client(event(choices=[cut]) + DONE).stream("x")
    assert chunk.choices[0].nsa_trace is not None
    assert chunk.choices[0].nsa_trace.is_truncated


@pytest.mark.parametrize(
    "message", [{"tool_calls": [{"id": "x"}]}, {"tool_calls": 5}, {"tool_calls": ["x"]}]
)
def test_malformed_calls_are_an_invalid_response(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidResponseError):
        client(chat_answer(**message)).chat([])
    with pytest.raises(InvalidResponseError):
        list(client(delta(**message) + DONE).stream_chat([]))


def test_what_shapes_the_output_is_sent_as_it_is() -> None:
    seen: list[Any] = []
    options: ChatOptions = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "structured_outputs": {"choice": ["a"]},
        "allowed_token_ids": [1, 2],
        "bad_words": ["x"],
        "nsa_trace": {"layers": [0]},
        "chat_template_kwargs": {"k": 1},
        "include_reasoning": False,
    }
    client(chat_answer(content="a"), seen).chat([], **options)
    assert {name: seen[0][name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "body"), [(CompletionOptions, CompletionBody), (ChatOptions, ChatBody)]
)
def test_every_option_is_a_field_of_the_server(options: Any, body: Any) -> None:
    # `user` identifies the caller to OpenAI; the server takes it and has no use for it.
    names = set(options.__annotations__) - {"extra_body", "user"}
    assert names - set(body.model_fields) == set()
