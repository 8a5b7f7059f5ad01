"""Tools and responses on the default model, whose template knows no tools."""

import json
from typing import Any

import openai
import pytest

from tests.e2e.conftest import connect
from tests.e2e.process import Server

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m-nsa"
QUESTION = "What is the weather in Paris?"
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "$defs": {"City": {"enum": ["Paris", "Rome"]}},
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
OPTIONS: dict[str, Any] = {"model": MODEL, "temperature": 0}


def check(name: str, arguments: str) -> None:
    assert name == "get_weather"
    assert json.loads(arguments).keys() == {"city", "unit"}
    assert json.loads(arguments)["city"] in ("Paris", "Rome")


def test_forced_calls_match_their_schema(default_server: Server) -> None:
    tools: list[Any] = [{"type": "function", "function": FUNCTION}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    with connect(default_server) as client:
        for choice, reason in (("required", "tool_calls"), (named, "stop")):
            with client.chat.completions.stream(
                messages=messages,
                tools=tools,
                tool_choice=choice,
                parallel_tool_calls=False,
                max_tokens=100,
                **OPTIONS,
            ) as stream:
                answer = stream.get_final_completion().choices[0]
            assert answer.finish_reason == reason
            assert answer.message.tool_calls is not None
            (call,) = answer.message.tool_calls
            check(call.function.name, call.function.arguments)


def test_responses_go_round(default_server: Server) -> None:
    tools: list[Any] = [{"type": "function", "strict": True, **FUNCTION}]
    with connect(default_server) as client:
        first = client.responses.create(
            input=QUESTION,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=100,
            **OPTIONS,
        )
        (call,) = first.output
        assert call.type == "function_call" and first.status == "completed"
        check(call.name, call.arguments)
        items: list[Any] = [
            {"role": "user", "content": QUESTION},
            call.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 20 C"},
        ]
        *events, last = client.responses.create(
            input=items,
            tools=tools,
            tool_choice="none",
            max_output_tokens=8,
            stream=True,
            **OPTIONS,
        )
        text = "".join(
            event.delta for event in events if event.type == "response.output_text.delta"
        )
        assert last.type == "response.incomplete"
        assert text and last.response.output_text == text
        assert last.response.usage is not None and last.response.usage.output_tokens == 8
        with pytest.raises(openai.BadRequestError):
            client.responses.create(input=items, background=True, **OPTIONS)
