"""The app as a whole: what OpenAPI declares, HEAD and OPTIONS, CORS, /server_info, odd input."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from starlette.types import ASGIApp

from nsa_http import openapi
from nsa_http.app import create_app
from nsa_http.middleware import PROBE_PATHS
from nsa_serve.errors import QueueFullError, RequestError
from tests.server.fake_engine import FakeEngine, make_app, make_state

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def client_of(app: ASGIApp, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


async def schema_of(client: httpx.AsyncClient) -> dict[str, Any]:
    schema: dict[str, Any] = (await client.get("/openapi.json")).json()
    return schema


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


async def test_openapi_declares_every_status(client: httpx.AsyncClient) -> None:
    schema = await schema_of(client)
    for path, method, operation in operations(schema):
        responses = set(operation["responses"])
        if method == "post":
            assert responses == {"200", "400", "401", "404", "408", "413", "500", "503"}, path
        elif path in PROBE_PATHS:
            assert responses == {"200", "503"}, path
        else:
            assert responses >= {"200", "401", "500"}, path
        assert "422" not in responses, path
    assert "HTTPValidationError" not in schema["components"]["schemas"]


async def test_openapi_declares_the_shapes(client: httpx.AsyncClient) -> None:
    schema = await schema_of(client)
    error = {"$ref": "#/components/schemas/ErrorAnswer"}
    for path, _method, operation in operations(schema):
        for status, response in operation["responses"].items():
            assert response["description"], (path, status)
            if int(status) >= 400 and path not in PROBE_PATHS:
                assert response["content"]["application/json"]["schema"] == error, (path, status)
    for path in (COMPLETIONS, CHAT):
        content = schema["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
        assert "$ref" in content["application/json"]["schema"]
    metrics = schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert set(metrics) == {"text/plain"}


@pytest.mark.parametrize(
    ("method", "path", "body", "shape"),
    [
        ("POST", COMPLETIONS, {"prompt": "a", "logprobs": 1}, openapi.CompletionAnswer),
        ("POST", COMPLETIONS, {"prompt": ["a", "b"], "stop": "w"}, openapi.CompletionAnswer),
        ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}]}, openapi.ChatAnswer),
        ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}, openapi.TokenizeAnswer),
        ("POST", "/detokenize", {"tokens": [1, 2]}, openapi.DetokenizeAnswer),
        ("POST", COMPLETIONS, {"prompt": 1.5}, openapi.ErrorAnswer),
        ("POST", COMPLETIONS, {"prompt": "a", "model": "b"}, openapi.ErrorAnswer),
        ("GET", "/nope", None, openapi.ErrorAnswer),
        ("GET", "/v1/models", None, openapi.ModelList),
        ("GET", "/v1/models/tiny", None, openapi.ModelCard),
        ("GET", "/health", None, openapi.StatusAnswer),
        ("GET", "/version", None, openapi.VersionAnswer),
        ("GET", "/load", None, openapi.LoadAnswer),
        ("GET", "/server_info", None, openapi.ServerInfo),
    ],
)
async def test_answers_have_the_declared_shape(
    client: httpx.AsyncClient, method: str, path: str, body: object, shape: type[BaseModel]
) -> None:
    response = await client.request(method, path, json=body)
    shape.model_validate_json(response.content, strict=True)


async def test_head_is_get_without_the_body(engine: FakeEngine) -> None:
    async with client_of(make_app(engine, api_key=["k"]), authorization="Bearer k") as client:
        for path in ("/health", "/v1/models", "/metrics", "/server_info"):
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == get.headers["content-type"]
        assert (await client.head("/v1/models/nope")).status_code == 404
        assert (await client.head(COMPLETIONS)).status_code == 405
        text = (await client.get("/metrics")).text
    assert 'http_requests_total{handler="/v1/models",method="HEAD",status="2xx"} 1.0' in text
    async with client_of(make_app(engine, api_key=["k"])) as client:
        assert (await client.head("/v1/models")).status_code == 401


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
async def test_other_methods_are_405_with_allow(client: httpx.AsyncClient, method: str) -> None:
    for path, allowed in ((COMPLETIONS, "POST"), ("/v1/models", "GET"), ("/health", "GET")):
        response = await client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert response.json()["error"]["type"] == "MethodNotAllowedError"


PREFLIGHT = {
    "origin": "https://a.b",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def test_cors_is_off_unless_asked(client: httpx.AsyncClient) -> None:
    assert (await client.options(COMPLETIONS, headers=PREFLIGHT)).status_code == 405
    response = await client.get("/v1/models", headers={"origin": "https://a.b"})
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_an_allowed_origin_may_call_and_read_errors(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=["k"], allowed_origins=["https://a.b"], allow_credentials=True)
    async with client_of(app) as client:
        preflight = await client.options(COMPLETIONS, headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.b"
        assert preflight.headers["access-control-allow-credentials"] == "true"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = await client.post(COMPLETIONS, json={}, headers={"origin": "https://a.b"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.b"
        assert "X-Request-Id" in refused.headers["access-control-expose-headers"]
        other = await client.get("/health", headers={"origin": "https://c.d"})
        assert "access-control-allow-origin" not in other.headers
        evil = await client.options(COMPLETIONS, headers={**PREFLIGHT, "origin": "https://c.d"})
        assert evil.status_code == 400


async def test_server_info_tells_all_but_secrets(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=["sesame"])
    async with client_of(app) as client:
        assert (await client.get("/server_info")).status_code == 401
        headers = {"authorization": "Bearer sesame"}
        response = await client.get("/server_info", headers=headers)
    assert "sesame" not in response.text
    info = response.json()
    assert info["phase"] == "ready"
    assert info["settings"]["api_key"] == ["**********"]
    assert info["model"]["num_parameters"] == 1_234_567
    assert info["memory"] is None
    assert info["cache"] == {
        "dtype": "float32",
        "page_size": 16,
        "num_pages": 70,
        "components": {"raw": 573_440, "compressed": 71_680},
    }
    assert {"python", "torch", "fastapi"} <= set(info["versions"])


async def test_server_info_answers_while_loading() -> None:
    async with client_of(make_app(None)) as client:
        info = (await client.get("/server_info")).json()
    assert (info["phase"], info["model"], info["cache"]) == ("loading", None, None)


async def test_ready_is_a_metric(engine: FakeEngine) -> None:
    state = make_state(engine)
    async with client_of(create_app(state)) as client:
        line = 'nsa_serve:ready{engine="0",model_name="tiny"}'
        assert f"{line} 1.0" in (await client.get("/metrics")).text
        state.phase = "draining"
        assert f"{line} 0.0" in (await client.get("/metrics")).text


async def test_metrics_have_vllms_names_unless_told_otherwise(engine: FakeEngine) -> None:
    async with client_of(make_app(engine)) as client:
        assert "vllm:num_requests_waiting{" in (await client.get("/metrics")).text
    async with client_of(make_app(engine, metrics_compat="none")) as client:
        text = (await client.get("/metrics")).text
    assert "vllm:" not in text
    assert "nsa_serve:num_requests_waiting{" in text


async def test_a_thousand_names_make_no_new_series(client: httpx.AsyncClient) -> None:
    async def num_series() -> int:
        return len((await client.get("/metrics")).text.splitlines())

    async def knock(i: int) -> None:
        await client.request(f"M{i}", f"/p{i}/{i}", params={"q": i})
        await client.request("GET", f"/v1/models/m{i}")
        body = {"prompt": "a", "model": f"m{i}", f"field{i}": i}
        await client.post(COMPLETIONS, json=body, headers={"x-request-id": f"r{i}"})

    await num_series()
    await knock(0)
    before = await num_series()
    for i in range(1, 334):
        await knock(i)
    assert await num_series() == before


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("too long for the cache", param="prompt"), 400),
        (QueueFullError("full", retry_after_s=7), 503),
        (ZeroDivisionError("a bug"), 500),
    ],
)
@pytest.mark.parametrize("where", ["refusal", "stream_error"])
@pytest.mark.parametrize("prompt", ["one", ["one", "two"]], ids=["single", "merged"])
async def test_a_stream_that_is_refused_has_its_status(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    where: str,
    error: Exception,
    status: int,
    prompt: object,
) -> None:
    setattr(engine, where, error)
    response = await client.post(COMPLETIONS, json={"prompt": prompt, "stream": True})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == status


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * 1000},
        {"prompt": [1] * 200},
        {"prompt": "a", "temperature": 3},
        {"prompt": "a", "structured_outputs": {"regex": "("}},
        {"prompt": "a", "structured_outputs": {"grammar": "start: nope"}},
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    ],
    ids=["long", "many ids", "temperature", "regex", "grammar", "schema"],
)
async def test_a_bad_request_to_stream_is_a_400(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    response = await client.post(COMPLETIONS, json={**body, "stream": True})
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"


async def test_a_silent_stream_begins_with_a_comment(engine: FakeEngine) -> None:
    engine.gate.clear()
    async with client_of(make_app(engine, sse_keep_alive_interval=0.01)) as client:
        asking = asyncio.create_task(
            client.post(COMPLETIONS, json={"prompt": "a", "stream": True, "max_tokens": 2})
        )
        await asyncio.sleep(0.05)
        engine.gate.set()
        response = await asking
    assert response.status_code == 200
    assert response.text.startswith(": keep-alive\n\n")
    assert response.text.endswith("data: [DONE]\n\n")


ODD_VALUES = [
    *("null", "true", "-1", "0", "1e400", "-0.0", "1.5", '""', '"\\u0000"', '"\\ud800"', "[]"),
    *("{}", "[[]]", "[null]", '{"a": {"b": []}}', '"\U0001f600"', '"' + "x" * 5000 + '"'),
    *(str(2**63), str(2**64), str(-(2**70)), "9" * 400, "[[[[[[1]]]]]]", '["a", 1]', "1e-320"),
]
ODD_BODIES = [
    *(b"", b"null", b"[]", b"1", b'"x"', b"{", b"\xff\xfe", b"\x00", b'{"a"}', b"{} {}", b"\xef"),
    *(b"[" * 3000, b'{"prompt": "a", "prompt": "b"}', b'{"a":' * 2000 + b"1" + b"}" * 2000),
    *(b'\xef\xbb\xbf{"prompt": "a"}', b'{"prompt": NaN}', b'{"": 1}', b'{"prompt": "\xc3"}'),
]
FIELDS = [
    *("prompt", "messages", "model", "max_tokens", "min_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "n", "best_of", "stop", "stop_token_ids", "logit_bias", "logprobs", "echo"),
    *("top_logprobs", "stream", "stream_options", "truncate_prompt_tokens", "priority", "tools"),
    *("cache_salt", "request_id", "return_token_ids", "tool_choice", "response_format", "tokens"),
    *("structured_outputs", "bad_words", "allowed_token_ids", "chat_template_kwargs", "suffix"),
    *("prompt_logprobs", "max_completion_tokens", "nsa_trace", "repetition_penalty", "input"),
    *("ignore_eos", "presence_penalty", "add_special_tokens", "reasoning_effort", "user"),
]
TOKENIZE_FIELDS = [
    *("prompt", "messages", "tokens", "model", "add_special_tokens", "return_token_strs"),
    *("tools", "chat_template_kwargs", "add_generation_prompt"),
]
BASES = {
    COMPLETIONS: '"prompt": "a", "max_tokens": 2',
    CHAT: '"messages": [{"role": "user", "content": "a"}], "max_tokens": 2',
    "/tokenize": '"prompt": "a"',
    "/detokenize": '"tokens": [1]',
}
ALLOWED = {200, 400, 404}


@pytest.mark.parametrize("path", list(BASES))
async def test_odd_bodies_are_no_server_error(client: httpx.AsyncClient, path: str) -> None:
    for body in ODD_BODIES:
        response = await client.post(path, content=body, headers=JSON)
        assert response.status_code in ALLOWED, body[:40]
        if response.status_code != 200:
            openapi.ErrorAnswer.model_validate_json(response.content, strict=True)
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "\u00e9", "a/b/c;;="):
        headers = [(b"content-type", kind.encode("latin-1"))] if kind else []
        response = await client.post(path, content=b"{}", headers=headers)
        assert response.status_code == 400, kind


@pytest.mark.parametrize(
    ("path", "field"),
    [(path, field) for path in (COMPLETIONS, CHAT) for field in FIELDS]
    + [(path, field) for path in ("/tokenize", "/detokenize") for field in TOKENIZE_FIELDS],
)
async def test_odd_values_are_no_server_error(
    client: httpx.AsyncClient, path: str, field: str
) -> None:
    for value in ODD_VALUES:
        content = f'{{{BASES[path]}, "{field}": {value}}}'.encode()
        response = await client.post(path, content=content, headers=JSON)
        assert response.status_code in ALLOWED, (value, response.text)
        assert "/work" not in response.text and "Traceback" not in response.text
        assert len(response.content) < 20_000


async def test_odd_paths_and_methods_are_no_server_error(client: httpx.AsyncClient) -> None:
    pieces = ["/", "//", "v1", "models", "%2f", "%00", "%ff", "..", "%2e%2e", ";", "?", "%", "tiny"]
    generator = random.Random(0)
    for _ in range(150):
        path = "/" + "".join(generator.choices(pieces, k=generator.randint(1, 6)))
        method = generator.choice(["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE", "X"])
        response = await client.request(method, f"http://server{path}")
        assert response.status_code in {200, 400, 404, 405}, (method, path)
