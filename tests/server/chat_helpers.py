"""A fake engine for chats with tools or reasoning, and how a client puts a stream together."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import msgspec
import openai

from nsa_http.app import create_app
from tests.server.fake_engine import FakeEngine, make_state, make_tokenizer

URL = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
# Writes what it gets, so that a test sees all of it in the prompt.
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}<a>"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    function = {"name": name, "description": f"Do {name}.", "parameters": schema}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", city={"type": "string"})
CLOCK = tool("get_time", zone={"type": "string"})


def make_engine(reply: str, template: str = TOOL_TEMPLATE) -> FakeEngine:
    engine = FakeEngine(reply=reply)
    engine.tokenizer = make_tokenizer(template)
    engine.info = msgspec.structs.replace(engine.info, max_model_len=8192)
    return engine


def prompt_of(engine: FakeEngine, index: int = -1) -> str:
    return engine.tokenizer.decode(engine.calls[index][0], skip_special_tokens=False)


@asynccontextmanager
async def connect(engine: FakeEngine, **options: object) -> AsyncIterator[httpx.AsyncClient]:
    state = make_state(engine, **options)
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
    state.close()


@asynccontextmanager
async def connect_sdk(engine: FakeEngine, **options: object) -> AsyncIterator[openai.AsyncOpenAI]:
    state = make_state(engine, **options)
    transport = httpx2.ASGITransport(app=create_app(state))
    async with openai.AsyncOpenAI(
        api_key="k",
        base_url="http://server/v1",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as sdk:
        yield sdk
    state.close()


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """Ask for one choice, whole and streamed; both must say the same. Returns the choice."""
    body = {"messages": MESSAGES, **body}
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    streamed = join_stream((await client.post(URL, json={**body, "stream": True})).text)
    assert streamed["finish_reason"] == choice["finish_reason"]
    assert without_ids(streamed["message"]) == without_ids(choice["message"])
    return choice


def join_stream(text: str) -> dict[str, Any]:
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    reason = None
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        delta = choice["delta"]
        assert reason is None
        reason = choice["finish_reason"]
        message["content"] += delta.get("content") or ""
        for name in ("reasoning", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for part in delta.get("tool_calls", []):
            join_call(message["tool_calls"], part)
    return {"message": message, "finish_reason": reason}


def join_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    if "id" in part:
        assert part["index"] == len(calls) and part["type"] == "function"
        assert part["function"]["arguments"] == ""
        calls.append({"id": part["id"], "function": dict(part["function"])})
    else:
        assert part["index"] == len(calls) - 1 and set(part["function"]) == {"arguments"}
        calls[-1]["function"]["arguments"] += part["function"]["arguments"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["id"].startswith("call_") for call in calls)
    kept = {name: message.get(name) for name in ("reasoning", "reasoning_content")}
    functions = [call["function"] for call in calls]
    return {**kept, "content": message.get("content") or "", "calls": functions}
