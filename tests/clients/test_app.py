"""The clients against the real app over a fake engine: in memory, and over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

import nsa_client
from nsa_client import AsyncClient, Client, join_tool_calls
from nsa_client.bench import run_bench
from nsa_client.bench_config import BenchConfig
from nsa_serve.errors import QueueFullError
from tests.server.fake_engine import REPLY, FakeEngine, make_app, make_state
from tests.server.test_live import serving, until

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASK = [{"role": "user", "content": "hi"}]


@dataclass(slots=True)
class Caller:
    """Call a method of either client; a stream comes back as the list of its chunks."""

    client: Any
    is_async: bool

    async def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        method = getattr(self.client, name)
        if not self.is_async:
            return await asyncio.to_thread(_call, method, args, options)
        result = method(*args, **options)
        if isinstance(result, Coroutine):
            return await result
        return [chunk async for chunk in result]


def _call(method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    result = method(*args, **options)
    return list(result) if isinstance(result, nsa_client.Stream) else result


@asynccontextmanager
async def connected(kind: str, engine: FakeEngine, **options: Any) -> AsyncIterator[Caller]:
    """Connect the asynchronous client in memory, or the synchronous one over HTTP."""
    if kind == "async":
        transport = httpx.ASGITransport(app=make_app(engine, **options))
        async with AsyncClient("http://server", transport=transport) as client:
            yield Caller(client, is_async=True)
        return
    async with serving(make_state(engine, **options)) as port:
        with Client(f"http://127.0.0.1:{port}/v1") as client:
            yield Caller(client, is_async=False)


@pytest.fixture
async def engine() -> FakeEngine:
    engine = FakeEngine()
    # The descriptions of tools alone are longer than its usual context.
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    return engine


@pytest.fixture(params=["async", "sync"])
async def call(request: pytest.FixtureRequest, engine: FakeEngine) -> AsyncIterator[Caller]:
    async with connected(request.param, engine) as caller:
        yield caller


async def test_completions_and_their_streams_agree(call: Caller) -> None:
    options = {"max_tokens": 8, "logprobs": 1, "return_token_ids": True, "temperature": 0.0}
    whole = await call("complete", "abc", **options)
    assert whole.text == REPLY[:8]
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage == nsa_client.Usage(3, 8, 11, num_prefix_hit_tokens=3)
    assert whole.request_id
    chunks = await call("stream", "abc", **options)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].usage == whole.usage
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert tuple(i for piece in pieces for i in piece.token_ids or ()) == whole.choices[0].token_ids
    logprobs = tuple(entry for piece in pieces for entry in piece.logprobs or ())
    assert logprobs == whole.choices[0].logprobs


async def test_chat_and_its_stream_agree_and_an_answer_can_be_sent_back(
    call: Caller, engine: FakeEngine
) -> None:
    whole = await call("chat", ASK, max_completion_tokens=5)
    assert (whole.text, whole.choices[0].message["role"]) == (REPLY[:5], "assistant")
    assert (whole.tool_calls, whole.choices[0].reasoning) == ((), None)
    chunks = await call("stream_chat", ASK, max_completion_tokens=5)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    await call("chat", [*ASK, whole.choices[0].message, *ASK], max_tokens=1)
    prompt = engine.tokenizer.decode(engine.calls[-1][0], skip_special_tokens=False)
    assert prompt == f"<user>hi;<assistant>{whole.text};<user>hi;<a>"


async def test_tool_calls_whole_and_streamed(call: Caller, engine: FakeEngine) -> None:
    engine.reply = (
        'Hm. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    )
    options = {"tools": [WEATHER], "tool_choice": "auto"}
    whole = await call("chat", ASK, **options)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert [tool.name for tool in whole.tool_calls] == ["weather", "weather"]
    cities = [json.loads(tool.arguments)["city"] for tool in whole.tool_calls]
    assert cities == ["Oslo", "Rome"]
    assert len({tool.id for tool in whole.tool_calls}) == 2
    chunks = await call("stream_chat", ASK, **options)
    streamed = join_tool_calls(delta for chunk in chunks for delta in chunk.tool_calls)
    assert [(tool.name, json.loads(tool.arguments)["city"]) for tool in streamed] == [
        ("weather", "Oslo"),
        ("weather", "Rome"),
    ]
    assert "".join(chunk.text for chunk in chunks).strip() == whole.text.strip() == "Hm."
    results = [
        {"role": "tool", "tool_call_id": tool.id, "content": "rain"} for tool in whole.tool_calls
    ]
    engine.reply = "It rains."
    after = await call("chat", [*ASK, whole.choices[0].message, *results], tools=[WEATHER])
    assert after.text == "It rains."


async def test_reasoning_is_apart_from_the_answer(engine: FakeEngine) -> None:
    engine.reply = "<think>so</think>yes"
    for kind in ("async", "sync"):
        async with connected(kind, engine, reasoning_parser="think") as call:
            whole = await call("chat", ASK)
            assert (whole.text, whole.choices[0].reasoning) == ("yes", "so")
            assert whole.choices[0].message == {"role": "assistant", "content": "yes"}
            chunks = await call("stream_chat", ASK)
            assert "".join(chunk.text for chunk in chunks) == "yes"
            assert "".join(chunk.reasoning for chunk in chunks) == "so"


async def test_samples_are_told_apart(call: Caller) -> None:
    whole = await call("complete", ["a", "b"], n=2, max_tokens=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    chunks = await call("stream", "a", n=2, max_tokens=2)
    texts = {0: "", 1: ""}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
    assert texts == {0: REPLY[:2], 1: REPLY[:2]}
    assert "".join(chunk.text for chunk in chunks) == REPLY[:2]


async def test_small_routes(call: Caller, engine: FakeEngine) -> None:
    (model,) = await call("models")
    assert (model.id, model.max_model_len) == ("tiny", 4096)
    assert await call("model", "tiny") == model
    with pytest.raises(nsa_client.NotFoundError, match="none"):
        await call("model", "none/of these")
    tokens = await call("tokenize", "hé", return_token_strs=True)
    assert len(tokens.token_ids) == len(tokens.token_strs) == 3
    assert await call("detokenize", tokens.token_ids) == "hé"
    assert len((await call("tokenize", ASK)).token_ids) > 3
    assert (await call("health"), await call("ready")) == (True, True)
    assert await call("version")
    assert "nsa_serve:num_requests_running" in await call("metrics")
    engine.is_dead.set()
    assert (await call("health"), await call("ready")) == (False, False)


async def test_a_refused_field_is_named(call: Caller) -> None:
    with pytest.raises(nsa_client.BadRequestError) as caught:
        await call("complete", "abc", temperature=3.0)
    assert (caught.value.status, caught.value.param) == (400, "temperature")
    with pytest.raises(nsa_client.BadRequestError) as caught:
        await call("stream", "abc", temperature=3.0)
    assert caught.value.request_id


async def test_a_wrong_key_is_refused(engine: FakeEngine) -> None:
    async with connected("async", engine, api_key=["secret"]) as call:
        with pytest.raises(nsa_client.AuthenticationError):
            await call("models")


async def test_a_full_queue_is_waited_for(engine: FakeEngine, monkeypatch: Any) -> None:
    waits_s: list[float] = []

    async def sleep(delay_s: float) -> None:
        waits_s.append(delay_s)
        engine.refusal = None

    async with connected("async", engine) as call:
        engine.refusal = QueueFullError("full", retry_after_s=7)
        monkeypatch.setattr("nsa_client.async_client.asyncio.sleep", sleep)
        answer = await call("complete", "abc", max_tokens=1)
    # The fake engine sleeps too, for no time at all.
    assert (answer.text, [wait_s for wait_s in waits_s if wait_s]) == (REPLY[:1], [7.0])


async def test_an_engine_that_dies_breaks_the_stream_after_its_text(engine: FakeEngine) -> None:
    engine.die_after = 3
    transport = httpx.ASGITransport(app=make_app(engine))
    async with AsyncClient("http://server", transport=transport) as client:
        text = ""
        with pytest.raises(nsa_client.StreamError):
            async for chunk in client.stream("abc", max_tokens=8):
                text += chunk.text
    assert text == REPLY[:3]


async def test_closing_a_stream_ends_the_request(engine: FakeEngine) -> None:
    engine.delay_s = 0.01
    async with serving(make_state(engine)) as port:

        def read_one() -> str:
            client = Client(f"http://127.0.0.1:{port}")
            with client, client.stream("abc", max_tokens=12) as stream:
                return next(chunk.text for chunk in stream if chunk.text)

        assert await asyncio.to_thread(read_one) == REPLY[0]
        await until(lambda: len(engine.aborted) == 1)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_bench_makes_prompts_of_the_servers_own_tokens(
    engine: FakeEngine, endpoint: Any
) -> None:
    async with serving(make_state(engine)) as port:
        config = BenchConfig(
            base_url=f"http://127.0.0.1:{port}",
            endpoint=endpoint,
            num_prompts=3,
            num_warmups=1,
            random_input_len=5,
            random_prefix_len=4,
            output_len=6,
        )
        records = []
        result = await run_bench(config, on_record=records.append)
    assert result.num_failed == 0, result.to_dict()["error_counts"]
    assert sorted(records, key=id) == sorted(result.records, key=id)
    assert result.num_output_tokens == 18
    texts = [engine.tokenizer.decode(ids, skip_special_tokens=False) for ids, *_ in engine.calls]
    texts = [text.removeprefix("<user>").removesuffix(";<a>") for text in texts]
    assert len(texts) == len(set(texts)) == 4
    assert len({text[:4] for text in texts}) == 1
    assert all(len(text) == 9 and set(text) <= set("abcdefghijklmnopqrstuvwxyz ") for text in texts)
