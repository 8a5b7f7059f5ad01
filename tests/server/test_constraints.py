"""What a request says its output must be: the fields, what reaches the engine, what is refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from nsa_http.app import create_app
from nsa_http.constraints import bad_word_ids
from nsa_http.state import ServerState
from nsa_http.structured import check_structured, structured_from_schema
from nsa_serve.errors import RequestError
from nsa_serve.request import StructuredOutput
from nsa_serve.structured.compiler import GrammarCompiler
from tests.engine.tiny_tokenizers import tokenizer_of
from tests.server.fake_engine import FakeEngine, make_state

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))


@pytest.fixture
async def state(engine: FakeEngine) -> AsyncIterator[ServerState]:
    state = make_state(engine)
    # A busy machine must not turn a good grammar into a refused one.
    state.grammar_compiler = GrammarCompiler(state._make_token_table, time_limit_s=30.0)
    yield state
    state.close()


@pytest.fixture
async def client(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


def schema_format(schema: object, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": None, "structured_outputs": None}, None, ""),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": schema_format(SCHEMA)}, "json_schema", TEXT),
        ({"response_format": schema_format(SCHEMA, strict=True)}, "json_schema", TEXT),
        ({"response_format": schema_format(SCHEMA, strict=None)}, "json_schema", TEXT),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json_schema", TEXT),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", TEXT),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        (
            {"structured_outputs": {"json_object": False, "regex": "a+", "disable_fallback": True}},
            "regex",
            "a+",
        ),
        ({"structured_outputs": {"choice": ["a", "é"]}}, "choice", '["a", "é"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "json_schema",
            '{"x-guidance":{"whitespace_flexible":false,"whitespace_pattern":null}}',
        ),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": " ?"}},
            "json_schema",
            '{"type":"object","x-guidance":{"whitespace_pattern":" ?"}}',
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
async def test_a_constraint_reaches_the_engine(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    url: str,
    fields: dict[str, Any],
    kind: Any,
    value: str,
) -> None:
    body = {"prompt": "hi"} if url == COMPLETIONS else {"messages": [USER]}
    response = await client.post(url, json={**body, **fields})
    assert response.status_code == 200, response.text
    (call,) = engine.calls
    assert call[1].structured == (None if kind is None else StructuredOutput(kind, value))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {}}, "response_format.type", "one of text, json_object, json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "structural_tag"),
        ({"response_format": "json"}, "response_format", ""),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"response_format": schema_format([])},
            "response_format.json_schema.schema",
            "an object",
        ),
        (
            {"response_format": schema_format(SCHEMA, strict="yes")},
            "response_format.json_schema.strict",
            "true or false",
        ),
        (
            {"response_format": schema_format({"if": {}, "unevaluatedItems": False})},
            "response_format.json_schema.schema",
            'Unimplemented keys: ["if", "unevaluatedItems"]',
        ),
        (
            {"response_format": schema_format({"pattern": "(?=a)"})},
            "response_format.json_schema.schema",
            "look-around",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "got 2"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON text"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "an object"),
        ({"structured_outputs": {"json": "1" * 65537}}, "structured_outputs.json", "65536"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex parse error"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "not empty"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "text"),
        ({"structured_outputs": {"grammar": "start: y"}}, "structured_outputs.grammar", "unknown"),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs",
            "json and json_object alone",
        ),
        (
            {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
            "structured_outputs",
            '"additionalProperties": false',
        ),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": "x"}},
            "structured_outputs",
            "true or false",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": 1}},
            "structured_outputs",
            "text",
        ),
        (
            {
                "structured_outputs": {"regex": "a"},
                "response_format": {"type": "json_object"},
            },
            "structured_outputs",
            "leave one of them out",
        ),
        ({"guided_json": SCHEMA}, "guided_json", "structured_outputs.json"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs.regex"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs.choice"),
        ({"guided_grammar": "a"}, "guided_grammar", "structured_outputs.grammar"),
        ({"regex": "a"}, "regex", "structured_outputs.regex"),
        ({"ebnf": "a"}, "ebnf", "structured_outputs.grammar"),
        ({"json_schema": "{}"}, "json_schema", "structured_outputs.json"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids", "array of token ids"),
        ({"allowed_token_ids": [257]}, "allowed_token_ids", "outside the vocabulary"),
        ({"bad_words": ["x"] * 129}, "bad_words", "128"),
        ({"bad_words": [""]}, "bad_words", "empty"),
        ({"bad_words": [" "]}, "bad_words", "spaces"),
        ({"bad_words": ["x" * 1025]}, "bad_words", "1024"),
        ({"bad_words": "x"}, "bad_words", ""),
        ({"logprobs": -1}, "logprobs", "whole vocabulary"),
        ({"prompt_logprobs": -1, "stream": False}, "prompt_logprobs", "whole vocabulary"),
        ({"truncation_side": "left"}, "truncation_side", "needs truncate_prompt_tokens"),
        (
            {"truncation_side": "both", "truncate_prompt_tokens": 3},
            "truncation_side",
            "'left' or 'right'",
        ),
    ],
    ids=lambda value: str(value)[:70],
)
async def test_what_cannot_be_followed_is_400_before_a_stream_begins(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "hi", "stream": True, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"]
    assert engine.calls == []


async def test_hostile_grammars_do_not_hold_up_a_control_request(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    names = [f"p{i}" for i in range(1400)]
    hostile = [
        {"json": {"properties": {name: {} for name in names}, "required": names}},
        {"regex": "((a{1,200}){1,200}){1,200}b"},
        {"regex": "(" * 4000 + ")" * 4000},
        {"json": {"enum": [f"v{i}" for i in range(7000)]}},
        {"grammar": "start: " + "(" * 20_000},
    ]
    statuses: list[int] = []

    async def attack(item: dict[str, Any]) -> None:
        body = {"prompt": "x", "structured_outputs": item, "max_tokens": 1}
        statuses.append((await client.post(COMPLETIONS, json=body)).status_code)

    attacks = [asyncio.create_task(attack(item)) for item in hostile]
    await asyncio.sleep(0)
    control = await client.post(COMPLETIONS, json={"prompt": "control"})
    assert control.status_code == 200
    # The first of them has yet to start the process that compiles.
    assert len(statuses) < len(hostile)
    await asyncio.gather(*attacks)
    assert set(statuses) == {200, 400}


async def test_too_many_waiting_grammars_are_503(state: ServerState) -> None:
    state.grammar_compiler.close()
    state.grammar_compiler = GrammarCompiler(state._make_token_table, max_waiting=0)
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        body = {"prompt": "x", "response_format": {"type": "json_object"}}
        response = await client.post(COMPLETIONS, json=body)
        assert response.status_code == 503 and response.headers["retry-after"] == "2"


async def test_a_schema_of_our_own_is_checked_alike(state: ServerState) -> None:
    made = await structured_from_schema(state, SCHEMA, param="tools.0.function.parameters")
    assert made == StructuredOutput("json_schema", TEXT)
    with pytest.raises(RequestError, match="Unimplemented") as caught:
        await structured_from_schema(state, {"not": {}}, param="tools.0.function.parameters")
    assert caught.value.param == "tools.0.function.parameters"
    regex = StructuredOutput("regex", "a|b")
    assert await check_structured(state, regex, param="p") == regex


async def test_allowed_tokens_and_bad_words_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": "hi", "allowed_token_ids": [9, 3, 9], "bad_words": ["ab", " ab", "c"]}
    assert (await client.post(COMPLETIONS, json=body)).status_code == 200
    params = engine.calls[0][1]
    assert params.allowed_token_ids == (9, 3)
    encode = engine.tokenizer.encode
    # Byte tokens: " ab" ends with "ab" and is prevented with it.
    assert params.bad_words == tuple(
        tuple(encode(word, add_special_tokens=False)) for word in ("ab", "c")
    )


def test_a_bad_word_is_tokenized_with_and_without_a_space() -> None:
    tokenizer = tokenizer_of("byte_level")
    sequences = bad_word_ids(tokenizer, ["the"])
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in sequences]
    assert texts == ["the", " the"]
    assert sequences[0] != sequences[1][-len(sequences[0]) :]


async def test_tokens_as_token_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    want = [f"token_id:{i}" for i in engine.tokenizer.encode("Hel", add_special_tokens=False)]
    body = {"prompt": "hi", "max_tokens": 3, "logprobs": 2, "return_tokens_as_token_ids": True}
    logprobs = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == want
    assert list(logprobs["top_logprobs"][0]) == ["token_id:0", want[0]]
    chat = {
        "messages": [USER],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "return_tokens_as_token_ids": True,
    }
    content = (await client.post(CHAT, json=chat)).json()["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in content] == want
    assert [item["token"] for item in content[0]["top_logprobs"]] == ["token_id:0", want[0]]
    assert content[0]["bytes"] == [ord("H")]


async def test_top_logprobs_of_the_whole_vocabulary_are_refused(client: httpx.AsyncClient) -> None:
    body = {"messages": [USER], "logprobs": True, "top_logprobs": -1}
    error = (await client.post(CHAT, json=body)).json()["error"]
    assert error["param"] == "top_logprobs" and "whole vocabulary" in error["message"]


@pytest.mark.parametrize(
    ("side", "limit", "text"),
    [(None, 3, "efg"), ("left", 3, "efg"), ("right", 3, "abc"), ("right", -1, "abcdefg")],
)
async def test_a_prompt_is_truncated_on_either_side(
    client: httpx.AsyncClient, engine: FakeEngine, side: str | None, limit: int, text: str
) -> None:
    body = {"truncate_prompt_tokens": limit, "truncation_side": side}
    assert (await client.post(COMPLETIONS, json={"prompt": "abcdefg", **body})).status_code == 200
    assert engine.tokenizer.decode(engine.calls[0][0], skip_special_tokens=False) == text
    chat = {"messages": [{"role": "user", "content": "abc"}], **body}
    assert (await client.post(CHAT, json=chat)).status_code == 200
    whole = "<user>abc;<a>"
    kept = whole if limit == -1 else whole[:limit] if side == "right" else whole[-limit:]
    assert engine.tokenizer.decode(engine.calls[1][0], skip_special_tokens=False) == kept


@pytest.mark.parametrize(
    ("messages", "fields", "echoed"),
    [
        ([USER], {}, ""),
        ([USER, {"role": "assistant", "content": "So "}], {"continue_final_message": True}, "So "),
        ([USER, {"role": "assistant", "content": "So "}], {}, "So "),
        ([USER], {"add_generation_prompt": False}, "hi"),
    ],
)
async def test_echo_puts_the_unfinished_message_before_the_answer(
    client: httpx.AsyncClient, messages: list[Any], fields: dict[str, Any], echoed: str
) -> None:
    body = {"messages": messages, "echo": True, **fields}
    whole = (await client.post(CHAT, json=body)).json()
    assert whole["choices"][0]["message"]["content"] == echoed + "Hello, world"
    stream = await client.post(CHAT, json={**body, "stream": True})
    events = [
        json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")
    ]
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == echoed + "Hello, world"
