"""Keys, request ids, readiness, body limits, metric labels."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message

from nsa_http.middleware import PROBE_PATHS
from tests.server.fake_engine import FakeEngine, make_app, make_state

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "hi"}


def client_of(app: ASGIApp, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


async def call(app: ASGIApp, path: str, *, method: str = "GET", **scope: Any) -> int:
    """Status of a request whose scope is exactly this; httpx would tidy the path."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    base = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("server", 80),
        "client": ("client", 1),
    }
    await app({**base, **scope}, receive, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_every_path_but_the_probes_needs_a_key(engine: FakeEngine, method: str) -> None:
    app = make_app(engine, api_key=["secret"], playground=False)
    paths = [
        COMPLETIONS,
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/tiny",
        "/tokenize",
        "/detokenize",
        "/metrics",
        "/version",
        "/load",
        "/openapi.json",
        "/",
        "/nope",
        "//v1/models",
        "/v1/../v1/models",
        "/health/../v1/models",
        "/health/",
        "//health",
        "/health%2f..%2fv1/models",
        "/health\x00/v1/models",
        "/HEALTH",
    ]
    for path in paths:
        for headers in ([], [(b"authorization", b"Bearer wrong")], [(b"host", b"x/health?")]):
            assert await call(app, path, method=method, headers=headers) == 401, path
    for path in PROBE_PATHS:
        assert await call(app, path, method=method) != 401, path


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer first", 200),
        (b"bearer second", 200),
        (b"Bearer  first ", 200),
        (b"Bearer third", 401),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"Basic first", 401),
        (b"first", 401),
        (b"Bearer \xff\xfe", 401),
        (b"Bearer firs", 401),
    ],
)
async def test_any_of_the_keys_opens(engine: FakeEngine, header: bytes, status: int) -> None:
    app = make_app(engine, api_key=["first", "second"])
    assert await call(app, "/v1/models", headers=[(b"authorization", header)]) == status


async def test_a_refusal_for_the_key_is_an_openai_error(engine: FakeEngine) -> None:
    async with client_of(make_app(engine, api_key=["\u00fcmlaut"])) as client:
        response = await client.post(COMPLETIONS, json=BODY)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "AuthenticationError"
        assert engine.calls == []


async def test_a_root_path_opens_only_its_own_probes(engine: FakeEngine) -> None:
    app = make_app(engine, api_key=["k"])
    assert await call(app, "/llm/health", root_path="/llm") == 200
    assert await call(app, "/llm/v1/models", root_path="/llm") == 401
    assert await call(app, "/llm/health", root_path="") == 401
    assert await call(app, "/llmx/health", root_path="/llm") == 401


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1.2:3_X", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)],
)
async def test_a_request_id_is_kept_when_it_is_safe(
    client: httpx.AsyncClient, given: str, is_kept: bool
) -> None:
    ids = []
    for path in ("/health", "/nope"):
        response = await client.get(path, headers={"x-request-id": given})
        ids.append(response.headers["x-request-id"])
    assert (ids == [given, given]) == is_kept
    assert all(ids)
    assert is_kept or ids[0] != ids[1]


async def test_the_clients_id_is_not_the_engines(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for _ in range(2):
        await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "same"})
    first, second = (facts["request_id"] for _, _, facts in engine.calls)
    assert first != second
    assert "same" not in str(first)


async def test_while_loading_all_but_live_is_503_with_retry_after() -> None:
    async with client_of(make_app(None)) as client:
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        for path in ("/health", "/health/ready", "/ready", "/ping", "/v1/models"):
            response = await client.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "5"), path
        response = await client.post(COMPLETIONS, json=BODY)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "The model is loading."


async def test_while_draining_new_work_is_refused_and_the_rest_answers(
    engine: FakeEngine,
) -> None:
    from nsa_http.app import create_app

    state = make_state(engine)
    state.phase = "draining"
    async with client_of(create_app(state)) as client:
        response = await client.post(COMPLETIONS, json=BODY)
        assert response.status_code == 503
        assert response.headers["connection"] == "close"
        assert int(response.headers["retry-after"]) >= 1
        statuses = {
            path: (await client.get(path)).status_code
            for path in ("/health", "/ready", "/health/ready", "/health/live", "/v1/models")
        }
        rejected = 'admission_rejections_total{engine="0",model_name="tiny",reason="shutting_down"}'
        assert f"nsa_serve:{rejected} 1.0" in (await client.get("/metrics")).text
    assert statuses == {
        "/health": 200,
        "/ready": 503,
        "/health/ready": 503,
        "/health/live": 200,
        "/v1/models": 200,
    }


async def test_a_dead_engine_fails_every_probe(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.is_dead.set()
    for path in sorted(PROBE_PATHS):
        assert (await client.get(path)).status_code == 503, path


async def test_a_declared_length_over_the_limit_is_413_unread(engine: FakeEngine) -> None:
    async with client_of(make_app(engine, max_request_bytes=100)) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "x" * 100})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == 413
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200


async def test_a_chunked_body_is_cut_at_the_limit(engine: FakeEngine) -> None:
    num_chunks = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_chunks
        for _ in range(1000):
            num_chunks += 1
            yield b" " * 50

    async with client_of(make_app(engine, max_request_bytes=120)) as client:
        headers = {"content-type": "application/json"}
        response = await client.post(COMPLETIONS, content=chunks(), headers=headers)
    assert response.status_code == 413
    assert num_chunks == 3


async def test_a_body_that_does_not_arrive_is_408(engine: FakeEngine) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with client_of(make_app(engine, request_read_timeout=0.05)) as client:
        headers = {"content-type": "application/json"}
        response = await client.post(COMPLETIONS, content=chunks(), headers=headers)
    assert response.status_code == 408


async def test_clients_cannot_create_metric_series(client: httpx.AsyncClient) -> None:
    async def num_series() -> int:
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(1 for line in lines if line.startswith("http_requests_total"))

    async def fuzz(start: int) -> None:
        for i in range(start, start + 50):
            await client.request(f"M{i}", f"/p{i}", params={"q": i})
            await client.post(COMPLETIONS, json={"prompt": "a", "model": f"m{i}"})
            await client.get(f"/v1/models/m{i}")

    await num_series()
    await fuzz(0)
    before = await num_series()
    await fuzz(50)
    assert await num_series() == before


async def test_no_prompt_and_no_newline_reaches_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="nsa_http"):
        await client.post(COMPLETIONS, json={"prompt": "sesame"})
        await client.get("/a%0aERROR")
    assert "sesame" not in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2
