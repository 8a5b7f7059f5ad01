"""POST /v1/responses: items in and out, the typed events, and the openai SDK."""

import json
from typing import Any

import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_http.responses_input import read_input
from nsa_http.responses_items import OutputItems
from nsa_http.tools.events import ArgumentsDelta, CallStart, ContentDelta, ReasoningDelta
from nsa_serve.errors import EngineDeadError
from tests.server.chat_helpers import connect, connect_sdk, make_engine, prompt_of
from tests.server.fake_engine import CHAT_TEMPLATE, MODEL, FakeEngine

URL = "/v1/responses"
ROME = '{"city": "Rome"}'
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CALL = f'<tool_call>{{"name": "get_weather", "arguments": {ROME}}}</tool_call>'
THINKING = CHAT_TEMPLATE + "{# <think> #}"
REPLY = f"<think>hm</think>Sure.{CALL}{CALL}"


async def post(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    """Ask whole and streamed; both must end in the same response. Returns it."""
    async with connect(engine) as client:
        response = await client.post(URL, json={"input": "hi", **body})
        assert response.status_code == 200, response.text
        streamed = await client.post(URL, json={"input": "hi", "stream": True, **body})
        assert streamed.status_code == 200, streamed.text
    whole: dict[str, Any] = response.json()
    final = read_events(streamed.text)[-1]["response"]
    assert without_ids(final) == without_ids(whole)
    return whole


def read_events(text: str) -> list[dict[str, Any]]:
    *blocks, end = text.split("\n\n")
    assert end == ""
    events = []
    for block in blocks:
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    hidden = ("id", "call_id", "created_at", "completed_at")
    return {name: without_ids(item) for name, item in value.items() if name not in hidden}


async def test_a_response_has_what_was_asked_and_said() -> None:
    response = await post(
        make_engine("Hello"),
        instructions="Be kind.",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        metadata={"a": "b"},
        store=False,
    )
    assert response["object"] == "response" and response["id"].startswith("resp_")
    (item,) = response.pop("output")
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    assert response["completed_at"] >= response["created_at"] > 0
    prompt = "<system>Be kind.;<user>hi;<a>"
    assert without_ids(response) == {
        "object": "response",
        "model": MODEL,
        "background": False,
        "instructions": "Be kind.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 0.9,
        "truncation": "disabled",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "usage": {
            "input_tokens": len(prompt),
            "input_tokens_details": {"cached_tokens": 3},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(prompt) + 5,
        },
    }


async def test_items_become_messages() -> None:
    engine = make_engine("ok")
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "r1"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "r2"}],
        },
        {"type": "function_call", "call_id": "c3", "name": "h", "arguments": ""},
    ]
    await post(engine, input=items, tools=[WEATHER], instructions="i")
    prompt = prompt_of(engine)
    assert prompt.startswith('<tools>[{"type": "function", "function": {"name": "get_weather"')
    assert '"strict"' not in prompt
    assert prompt[prompt.index("</tools>") + 8 :] == (
        '<system>i;<system>d;<user>u;<assistant>a<tool_call>{"name": "f", "arguments": {}}'
        '</tool_call><tool_call>{"name": "g", "arguments": {"a": 1}}</tool_call>;'
        '<tool>r1;<tool>r2;<assistant><tool_call>{"name": "h", "arguments": {}}</tool_call>;<a>'
    )


def test_reasoning_goes_back_with_its_turn() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "why"}]}
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "sum"}]}
    answer = {"role": "assistant", "content": "a"}
    assert read_input([thought, answer, summary, answer, answer], None) == [
        {"role": "assistant", "content": "a", "reasoning": "why"},
        {"role": "assistant", "content": "a", "reasoning": "sum"},
        {"role": "assistant", "content": "a"},
    ]


async def test_the_output_can_be_sent_back() -> None:
    engine = make_engine(REPLY, THINKING)
    response = await post(engine, tools=[WEATHER])
    items = [{"role": "user", "content": "hi"}, *response["output"]]
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    items += [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
        for call in calls
    ]
    await post(engine, input=items, tools=[WEATHER])
    assert prompt_of(engine).count("get_weather") == 3
    assert prompt_of(engine).count("sun") == 2


async def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    response = await post(make_engine(REPLY, THINKING), tools=[WEATHER])
    reasoning, message, *calls = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (reasoning["summary"], reasoning["encrypted_content"]) == ([], None)
    assert message["content"][0]["text"] == "Sure."
    assert [(call["name"], call["arguments"]) for call in calls] == [("get_weather", ROME)] * 2
    assert len({call["call_id"] for call in calls} | {call["id"] for call in calls}) == 4
    details = response["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": len(">hm</think>")}
    hidden = await post(make_engine(REPLY, THINKING), include_reasoning=False)
    assert [item["type"] for item in hidden["output"]] == ["message"]


async def test_the_events_of_a_stream() -> None:
    async with connect(make_engine(REPLY, THINKING)) as client:
        body = {"input": "hi", "tools": [WEATHER], "stream": True}
        events = read_events((await client.post(URL, json=body)).text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    runs = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert runs == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *call,
        *call,
        "completed",
    ]
    final = events[-1]["response"]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}
    for index, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["item"]["status"] == "in_progress" and own[-1]["item"] == item
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        text = item.get("arguments") or item["content"][0]["text"]
        assert deltas == text
        (done,) = [e for e in own if e["type"].endswith(("text.done", "arguments.done"))]
        assert done.get("text", done.get("arguments")) == text


async def test_a_cut_answer_is_incomplete() -> None:
    response = await post(make_engine("Hello"), max_output_tokens=3)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["completed_at"] is None


@pytest.mark.parametrize("failure", ["died", "failed"])
async def test_a_stream_that_fails_says_so(failure: str) -> None:
    engine = make_engine("Hello")
    if failure == "died":
        engine.die_after = 2
    else:
        engine.fail_after = 2
    async with connect(engine) as client:
        response = await client.post(URL, json={"input": "hi", "stream": True})
        last = read_events(response.text)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert "/secret" not in response.text
        engine = make_engine("Hello")
    engine.stream_error = EngineDeadError("gone")
    async with connect(engine) as client:
        for is_stream in (False, True):
            response = await client.post(URL, json={"input": "hi", "stream": is_stream})
            assert response.status_code == 500


async def test_fields_reach_the_engine() -> None:
    engine = make_engine("[]")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    async with connect(engine) as client:
        for body in (
            {"text": text, "top_k": 5, "seed": 7, "stop": ["x"], "max_output_tokens": 9},
            {"text": {"format": {"type": "json_object"}}},
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}},
            {"tools": [WEATHER], "tool_choice": "required"},
            {"input": "x" * 9000, "truncation": "auto", "max_output_tokens": 100},
            {"tool_choice": "auto", "store": True, "user": "u", "max_tool_calls": 3},
            {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}},
        ):
            response = await client.post(URL, json={"input": "hi", **body})
            assert response.status_code == 200, response.text
            assert response.json()["store"] is False
    first, second, named, required, cut = (call[1] for call in engine.calls[:5])
    assert first.structured is not None and json.loads(first.structured.value) == schema
    assert (first.top_k, first.seed, first.stop, first.max_tokens) == (5, 7, ("x",), 9)
    assert second.structured is not None and second.structured.kind == "json_object"
    assert named.structured is not None
    assert json.loads(named.structured.value) == WEATHER["parameters"]
    assert required.structured is not None
    assert cut.max_tokens == 100 and len(engine.calls[4][0]) == 8192 - 100


async def test_logprobs_of_the_text_on_request() -> None:
    include = ["message.output_text.logprobs"]
    response = await post(make_engine("<think>a</think>Hi", THINKING), include=include)
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    response = await post(make_engine("Hi"), include=include, top_logprobs=2)
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert [item["token"] for item in logprobs] == ["H", "i"]
    assert [len(item["top_logprobs"]) for item in logprobs] == [2, 2]


DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]


def message(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "hi", **fields}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [{"role": "user", "content": "x"}] * 4097}, "input"),
        ({"input": "x" * 9000}, "input"),
        (message(role="tool"), "input.0.role"),
        (message(content=3), "input.0.content"),
        (message(content=[{"type": "input_image", "image_url": "x"}]), "input.0.content.0"),
        (message(type="item_reference"), "input.0"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]},
            "input",
        ),
        ({"input": [{"type": "function_call_output", "output": ""}]}, "input.0.call_id"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"truncation": "maybe"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "text", "x": DEEP}}}, "text.format"),
        ({"tools": [{**WEATHER, "x": DEEP}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"model": "other"}, "model"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_refused(body: dict[str, Any], param: str) -> None:
    engine = make_engine("ok", CHAT_TEMPLATE)
    async with connect(engine) as client:
        for is_stream in (False, True):
            response = await client.post(URL, json={"input": "hi", "stream": is_stream, **body})
            assert response.status_code == (404 if param == "model" else 400), response.text
            assert response.json()["error"]["param"] == param
    assert engine.calls == []


EVENTS = st.one_of(
    st.builds(ContentDelta, st.sampled_from(["a", "b "])),
    st.builds(ReasoningDelta, st.sampled_from(["r", "s"])),
    st.builds(CallStart, st.just(0), st.sampled_from(["f", "g"])),
)


@given(st.lists(EVENTS, max_size=12))
def test_each_item_is_opened_and_closed_once(events: list[Any]) -> None:
    output = OutputItems()
    typed = []
    for event in events:
        typed += output.add(event, [])
        if isinstance(event, CallStart):
            typed += output.add(ArgumentsDelta(0, "{}"), [])
    typed += output.close("completed")
    assert output.close("completed") == []
    for name in ("added", "done"):
        own = [e for e in typed if e["type"] == f"response.output_item.{name}"]
        assert [e["output_index"] for e in own] == list(range(len(output.items)))
    assert all(item["status"] == "completed" for item in output.items)


class Place(pydantic.BaseModel):
    city: str


async def test_the_sdk_creates_streams_and_parses() -> None:
    async with connect_sdk(make_engine(REPLY, THINKING)) as sdk:
        tools: Any = [WEATHER]
        response = await sdk.responses.create(model=MODEL, input="hi", tools=tools)
        assert response.output_text == "Sure."
        assert [item.type for item in response.output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        assert response.usage is not None
        assert response.usage.input_tokens_details.cached_tokens == 3
        deltas = ""
        async for event in await sdk.responses.create(
            model=MODEL, input="hi", tools=tools, stream=True
        ):
            if event.type == "response.output_text.delta":
                deltas += event.delta
        assert deltas == "Sure."
        async with sdk.responses.stream(model=MODEL, input="hi", tools=tools) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert final.output_text == "Sure."
        assert [item.arguments for item in final.output if item.type == "function_call"] == [
            ROME,
            ROME,
        ]
    async with connect_sdk(make_engine(ROME)) as sdk:
        parsed = await sdk.responses.parse(model=MODEL, input="hi", text_format=Place)
        assert parsed.output_parsed == Place(city="Rome")
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve("resp_1")
