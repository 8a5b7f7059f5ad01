"""What is refused, with which status and which `param`; and what is not."""

import logging
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import FakeEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}

BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": ["a"] * 9, "n": 128}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [999_999]}, "stop_token_ids"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1e30}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"priority": 1}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "s" * 257}, "cache_salt"),
    ({"request_id": "a b"}, "request_id"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": "a" * 200}, "prompt"),
    ({"prompt": "a" * 100_000}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 3, "n": 2}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": True}, "length_penalty"),
    ({"guided_json": {}}, "guided_json"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
]

BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [USER] * 4097}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [USER, {"content": "x"}]}, "messages.1"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0",
    ),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"unknown": 1}}, "chat_template_kwargs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [(COMPLETIONS, {"prompt": "hi", **body}, param) for body, param in BAD_COMPLETIONS]
    + [(CHAT, {"messages": [USER], **body}, param) for body, param in BAD_CHATS],
    ids=lambda value: str(value)[:60],
)
async def test_a_bad_value_is_400_and_names_its_field(
    client: httpx.AsyncClient, engine: FakeEngine, url: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(url, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, 400, "BadRequestError")
    assert len(response.content) < 3000
    assert engine.calls == []


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}},
        {"tools": None, "tool_choice": "none"},
        {"use_beam_search": False, "length_penalty": 1.0, "suffix": ""},
        {"best_of": 2, "n": 2},
        {"user": "u", "metadata": {"a": "b"}, "store": False},
        {"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1, "presence_penalty": -2},
        {"n": 128, "max_tokens": 1},
        {"priority": 0},
        {"logprobs": 20, "max_tokens": 1},
    ],
    ids=str,
)
async def test_a_neutral_or_extreme_value_is_accepted(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "hi", **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
    ],
    ids=lambda content: content[:40].decode("latin1"),
)
async def test_a_body_that_is_not_a_json_object_is_400(
    client: httpx.AsyncClient, content: bytes
) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await client.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_another_content_type_is_400(client: httpx.AsyncClient, media_type: str) -> None:
    response = await client.post(
        COMPLETIONS, content=b'{"prompt": "hi"}', headers={"content-type": media_type}
    )
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


async def test_echoed_input_and_the_number_of_errors_are_capped(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "stop_token_ids": ["x" * 10_000] * 1000, "top_k": "y" * 100_000}
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 400
    assert len(response.content) < 5000
    assert "more errors" in response.json()["error"]["message"]


async def test_an_unknown_field_is_ignored_with_one_warning(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nsa_http"):
        for _ in range(3):
            response = await client.post(COMPLETIONS, json={"prompt": "hi", "frobnicate\n": 1})
            assert response.status_code == 200
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["unknown request field ignored: 'frobnicate\\n'"]


async def test_an_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json={"model": "m" * 5000, "prompt": "hi"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert len(response.content) < 500


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"prompt": "h\u00e9", "return_token_strs": True})
    content = answer.json()
    assert content["count"] == len(content["tokens"]) == len(content["token_strs"]) == 3
    assert content["max_model_len"] == 111
    text = await client.post("/detokenize", json={"tokens": content["tokens"]})
    assert text.json() == {"prompt": "h\u00e9"}
    chat = await client.post("/tokenize", json={"messages": [USER]})
    assert chat.json()["count"] == len("<user>hi;<a>")


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
    ids=str,
)
async def test_bad_tokenizer_calls_are_400(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(url, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
