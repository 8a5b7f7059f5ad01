"""Tools in POST /v1/chat/completions: the prompt, the answer, the stream, what is refused."""

import json
from typing import Any

import openai
import pytest

from nsa_http.tools.formats import choose_format
from nsa_serve.request import SamplingParams
from tests.server.chat_helpers import (
    CLOCK,
    MESSAGES,
    URL,
    WEATHER,
    ask,
    connect,
    connect_sdk,
    make_engine,
    prompt_of,
    tool,
)
from tests.server.fake_engine import CHAT_TEMPLATE, MODEL, FakeEngine

ROME = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>'
TWO_CALLS = f'{CALL}\n<tool_call>{{"name": "get_time", "arguments": {{}}}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "get_weather"}}
REQUIRED = f'[{{"name": "get_weather", "parameters": {ROME}}}]'
TOOLS = [WEATHER, CLOCK]


def functions(choice: dict[str, Any]) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize(
    ("reply", "body", "expected"),
    [
        ("Fine.", {}, ("Fine.", [], "stop")),
        (CALL, {}, (None, [("get_weather", ROME)], "tool_calls")),
        (f"Let me see. {CALL}", {}, ("Let me see.", [("get_weather", ROME)], "tool_calls")),
        (TWO_CALLS, {}, (None, [("get_weather", ROME), ("get_time", "{}")], "tool_calls")),
        (TWO_CALLS, {"parallel_tool_calls": False}, (None, [("get_weather", ROME)], "tool_calls")),
        (CALL, {"tool_choice": "none"}, (CALL, [], "stop")),
        (REQUIRED, {"tool_choice": "required"}, (None, [("get_weather", ROME)], "tool_calls")),
        (ROME, {"tool_choice": NAMED}, (None, [("get_weather", ROME)], "stop")),
        (CALL, {"max_tokens": 59}, (None, [("get_weather", '{"city": "')], "length")),
        (CALL, {"max_tokens": 12}, (CALL[:12], [], "length")),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_an_answer_with_tools(
    reply: str, body: dict[str, Any], expected: tuple[str | None, Any, str]
) -> None:
    async with connect(make_engine(reply)) as client:
        choice = await ask(client, tools=TOOLS, **body)
        content, calls, reason = expected
        assert (choice["message"]["content"], choice["finish_reason"]) == (content, reason)
        assert functions(choice) == calls
        assert ("tool_calls" in choice["message"]) == bool(calls)


async def test_without_tools_markers_are_text() -> None:
    async with connect(make_engine(CALL)) as client:
        choice = await ask(client)
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


async def test_every_choice_has_its_own_calls() -> None:
    async with connect(make_engine(CALL)) as client:
        body = {"messages": MESSAGES, "tools": TOOLS, "n": 2, "temperature": 1}
        choices = (await client.post(URL, json=body)).json()["choices"]
        assert [functions(choice) for choice in choices] == [[("get_weather", ROME)]] * 2
        ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
        assert len(ids) == 2


async def test_token_ids_and_logprobs_of_held_back_text_are_all_reported() -> None:
    async with connect(make_engine(CALL)) as client:
        body = {"messages": MESSAGES, "tools": TOOLS, "return_token_ids": True, "logprobs": True}
        whole = (await client.post(URL, json=body)).json()["choices"][0]
        text = (await client.post(URL, json={**body, "stream": True})).text
        chunks = [json.loads(event[6:]) for event in text.split("\n\n")[:-2]]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert [i for choice in choices for i in choice.get("token_ids", [])] == whole["token_ids"]
        parts = [c["logprobs"]["content"] for c in choices if c["logprobs"]]
        assert [item for part in parts for item in part] == whole["logprobs"]["content"]


async def test_the_template_gets_the_tools_and_the_calls() -> None:
    engine = make_engine("ok")
    messages = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ROME},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    async with connect(engine) as client:
        await ask(client, messages=messages, tools=[WEATHER])
        assert prompt_of(engine) == (
            f"<tools>{json.dumps([WEATHER])}</tools><user>hi;<assistant><tool_call>"
            '{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>;'
            "<tool>sunny;<a>"
        )
        answer = await client.post("/tokenize", json={"messages": messages, "tools": [WEATHER]})
        assert answer.json()["tokens"] == engine.calls[-1][0]


async def test_a_template_without_tools_gets_them_as_text() -> None:
    engine = make_engine("ok", CHAT_TEMPLATE)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Well.", "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    async with connect(engine) as client:
        await ask(client, messages=messages, tools=[tool("f", a={"type": "integer"})])
        prompt = prompt_of(engine)
        assert prompt.startswith("<system>Be kind.\n\nYou may call functions")
        assert '"name":"f","description":"Do f."' in prompt and "<tool_call>" in prompt
        written = '<tool_call>\n{"name":"f","arguments":{"a":1}}\n</tool_call>'
        assert f";<user>hi;<assistant>Well.\n{written}\n{written};" in prompt
        assert prompt.endswith(
            "<user><tool_response>\none\n</tool_response>\n"
            "<tool_response>\ntwo\n</tool_response>;<a>"
        )
        # Without a system message there is a new one; without tools nothing is added.
        await ask(client, tools=[WEATHER])
        assert prompt_of(engine).startswith("<system>You may call functions")
        await ask(client)
        assert prompt_of(engine) == "<user>hi;<a>"


async def test_the_llama_form_by_setting_and_by_template() -> None:
    reply = f'{{"name": "get_weather", "parameters": {ROME}}}'
    async with connect(make_engine(reply), tool_call_parser="llama3_json") as client:
        assert functions(await ask(client, tools=TOOLS)) == [("get_weather", ROME)]
    async with connect(make_engine(reply)) as client:
        assert (await ask(client, tools=TOOLS))["message"]["content"] == reply
    engine = make_engine(reply, CHAT_TEMPLATE + "{# <|python_tag|> #}")
    async with connect(engine) as client:
        assert functions(await ask(client, tools=TOOLS)) == [("get_weather", ROME)]
        assert "answer with nothing but JSON" in prompt_of(engine)


def test_auto_looks_for_the_marker() -> None:
    assert choose_format("auto", None) is choose_format("hermes", None)
    assert choose_format("auto", "<tool_call> <|python_tag|>") is choose_format("hermes", "")
    llama = 'Respond as {"name": function name, "parameters": dictionary}.'
    assert choose_format("auto", llama) is choose_format("llama3_json", None)


async def params_of(body: dict[str, Any]) -> SamplingParams:
    engine = make_engine("[]")
    async with connect(engine) as client:
        response = await client.post(URL, json={"messages": MESSAGES, **body})
        assert response.status_code == 200, response.text
        return engine.calls[0][1]


async def test_a_forced_call_constrains_the_output() -> None:
    local = {"$defs": {"D": {"type": "string"}}, "type": "object"}
    local["properties"] = {"d": {"$ref": "#/$defs/D"}, "$ref": {"enum": [{"$ref": "#/x"}]}}
    refs = {"type": "function", "function": {"name": "f", "parameters": local}}
    params = await params_of(
        {"tools": [WEATHER, refs], "tool_choice": "required", "parallel_tool_calls": False}
    )
    assert params.structured is not None and params.structured.kind == "json_schema"
    schema = json.loads(params.structured.value)
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 1)
    first, second = (item["properties"] for item in schema["items"]["anyOf"])
    assert first["name"]["enum"] == ["get_weather"]
    assert first["parameters"] == WEATHER["function"]["parameters"]
    properties = second["parameters"]["properties"]
    assert properties["d"] == {"$ref": "#/items/anyOf/1/properties/parameters/$defs/D"}
    assert properties["$ref"] == {"enum": [{"$ref": "#/x"}]}

    params = await params_of({"tools": TOOLS, "tool_choice": NAMED})
    assert params.structured is not None
    assert json.loads(params.structured.value) == WEATHER["function"]["parameters"]
    assert (await params_of({"tools": TOOLS})).structured is None
    assert (await params_of({"tools": TOOLS, "tool_choice": "none"})).structured is None


async def test_special_tokens_are_shown_where_a_marker_is_one() -> None:
    assert (await params_of({"tools": TOOLS})).skip_special_tokens
    engine = make_engine("ok")
    engine.tokenizer._backend.add_special_tokens(["<tool_call>"])
    marker = engine.tokenizer.encode("<tool_call>", add_special_tokens=False)
    engine.tokenizer._special_ids |= frozenset(marker)
    engine.info = engine.info.__class__(
        **{name: getattr(engine.info, name) for name in engine.info.__struct_fields__}
        | {"vocab_size": engine.info.vocab_size + 1}
    )
    async with connect(engine) as client:
        await client.post(URL, json={"messages": MESSAGES, "tools": TOOLS})
        await client.post(URL, json={"messages": MESSAGES})
        await client.post(URL, json={"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"})
    assert [call[1].skip_special_tokens for call in engine.calls] == [False, True, True]


DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]


def call_message(**call: Any) -> dict[str, Any]:
    return {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": fields}]}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": []}, "tools", "at least one tool"),
        ({"tools": {}}, "tools", "at least one tool"),
        ({"tools": ["f"]}, "tools", "tools.0 must be an object"),
        ({"tools": [WEATHER] * 129}, "tools", "at most 128"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two functions named 'get_weather'"),
        ({"tools": [tool("f", a={"enum": ["x" * 300_000]})]}, "tools", "bytes"),
        ({"tools": [tool("f", a=DEEP)]}, "tools", "nested too deeply"),
        (
            call_message(function={"name": "f", "arguments": {"a": DEEP}}),
            "messages.1.tool_calls.0",
            "nested too deeply",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools", "function must be"),
        (function(name=""), "tools", "1 to 128 letters"),
        (function(name="a b"), "tools", "'a b'"),
        (function(name=1), "tools", "1 to 128 letters"),
        (function(name="f", description=1), "tools", "description"),
        (function(name="f", parameters=[]), "tools", "JSON schema"),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "must be 'none'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "'x', which is not among",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format",
            "must be left out",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls", "bool"),
        (
            {"tools": [tool("f", a={"type": "nonsense"})], "tool_choice": "required"},
            "tools",
            "nonsense",
        ),
        (
            {"messages": [{"role": "user", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "assistant",
        ),
        (call_message(), "messages.1.tool_calls.0", "function.name"),
        (call_message(function={"name": 1}), "messages.1.tool_calls.0", "function.name"),
        (call_message(function={"name": "f"}, id=1), "messages.1.tool_calls.0", "`id`"),
        (call_message(function={"name": "f"}, type="x"), "messages.1.tool_calls.0", "type"),
        (
            call_message(function={"name": "f", "arguments": "{"}),
            "messages.1.tool_calls.0",
            "not valid JSON",
        ),
        (
            call_message(function={"name": "f", "arguments": "[1]"}),
            "messages.1.tool_calls.0",
            "JSON object",
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": 1, "content": ""}]},
            "messages.0.tool_call_id",
            "string",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "messages.0",
            "send tool_calls",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_refused(body: dict[str, Any], param: str, message: str) -> None:
    engine = make_engine("ok")
    async with connect(engine) as client:
        for is_stream in (False, True):
            response = await client.post(
                URL, json={"messages": MESSAGES, "stream": is_stream, **body}
            )
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == param
            assert message in error["message"]
            assert len(response.content) < 2000
    assert engine.calls == []


async def test_completions_take_no_tools() -> None:
    async with connect(FakeEngine()) as client:
        body = {"prompt": "hi", "tools": TOOLS}
        response = await client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_the_sdk_reads_calls() -> None:
    tools: Any = TOOLS
    async with connect_sdk(make_engine(TWO_CALLS)) as sdk:
        answer = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, tools=tools)
        calls = answer.choices[0].message.tool_calls or []
        assert [call.type for call in calls] == ["function"] * 2
        async with sdk.chat.completions.stream(
            model=MODEL, messages=MESSAGES, tools=tools
        ) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        choice = final.choices[0]
        assert choice.finish_reason == "tool_calls"
        got = [call.function for call in choice.message.tool_calls or []]
        assert [(f.name, f.arguments) for f in got] == [("get_weather", ROME), ("get_time", "{}")]
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[])
        assert caught.value.param == "tools"
