"""POST /v1/chat/completions, raw and through the openai SDK."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import openai
import pytest
from starlette.types import ASGIApp

from tests.server.fake_engine import MODEL, REPLY, FakeEngine, make_app

URL = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def sdk(app: ASGIApp) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(app=app)
    async with openai.AsyncOpenAI(
        api_key="k",
        base_url="http://server/v1",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as sdk:
        yield sdk


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await client.post(URL, json={"messages": MESSAGES, "stream": True, **body})
    assert response.status_code == 200, response.text
    *events, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_each_choice_has_one_role_and_one_finish(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, n=2, max_tokens=3)
    for index in (0, 1):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["delta"]["content"] for c in choices[1:-1]] == ["H", "e", "l"]
        assert choices[-1]["delta"] == {}
        assert [c["finish_reason"] for c in choices] == [None] * 4 + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")


async def test_the_template_makes_the_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "so"},
    ]
    for options in ({}, {"continue_final_message": True}, {"add_generation_prompt": False}):
        response = await client.post(URL, json={"messages": messages, **options})
        assert response.status_code == 200, response.text
    prompts = [
        engine.tokenizer.decode(ids, skip_special_tokens=False) for ids, _, _ in engine.calls
    ]
    start = "<system>s;<user>a\nb;<assistant>so"
    assert prompts == [start + ";<a>", start, start]


async def test_without_a_limit_the_context_is_filled(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post(URL, json={"messages": MESSAGES})
    await client.post(URL, json={"messages": MESSAGES, "max_tokens": 9})
    await client.post(URL, json={"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 4})
    assert [params.max_tokens for _, params, _ in engine.calls] == [None, 9, 4]


async def test_null_is_the_default_of_every_optional_field(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    from nsa_http.protocol import ChatBody

    nulls = dict.fromkeys(name for name in ChatBody.model_fields if name != "messages")
    for body in ({}, {**nulls, "response_format": None, "tool_choice": None, "tools": None}):
        response = await client.post(URL, json={"messages": MESSAGES, **body})
        assert response.status_code == 200, response.text
    assert engine.calls[0][:2] == engine.calls[1][:2]


async def test_ids_and_prompt_logprobs_are_reported(client: httpx.AsyncClient) -> None:
    body = {"messages": MESSAGES, "return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 2}
    content = (await client.post(URL, json=body)).json()
    assert len(content["prompt_token_ids"]) == content["usage"]["prompt_tokens"]
    assert len(content["prompt_logprobs"]) == len(content["prompt_token_ids"])
    assert len(content["choices"][0]["token_ids"]) == 2


async def test_the_sdk_reads_a_whole_answer(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.message.content == REPLY
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    token = choice.logprobs.content[0]
    assert (token.token, token.logprob, token.bytes) == ("H", -1.25, [72])
    assert [top.token for top in token.top_logprobs] == ["!", "H"]
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_the_sdk_reads_streams(sdk: openai.AsyncOpenAI) -> None:
    text, num_tokens = "", 0
    async for chunk in await sdk.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    assert (text, num_tokens) == (REPLY, len(REPLY))
    completions = await sdk.completions.create(model=MODEL, prompt="hi", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in completions]) == REPLY


async def test_the_sdk_lists_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).id == MODEL


async def test_the_sdk_raises_its_own_errors(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    engine.die_after = 2
    with pytest.raises(openai.APIError, match="engine stopped"):
        async for _ in await sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        ):
            pass


async def test_a_served_name_replaces_the_model_name(engine: FakeEngine) -> None:
    app = make_app(engine, served_model_name=["a/b", "c"])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.post(URL, json={"model": "c", "messages": MESSAGES})
        assert answer.json()["model"] == "c"
        assert (await client.get("/v1/models/a/b")).json()["id"] == "a/b"
        assert (
            await client.post(URL, json={"model": MODEL, "messages": MESSAGES})
        ).status_code == 404
