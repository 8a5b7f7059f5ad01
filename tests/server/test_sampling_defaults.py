"""What a request gets for the sampling parameters that it leaves out."""

from typing import Any

import httpx
import pytest

from nsa_http.app import create_app
from tests.server.fake_engine import FakeEngine, make_state

PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
}


@pytest.mark.parametrize("route", PROMPTS)
@pytest.mark.parametrize(
    ("defaults", "fields", "temperature", "top_p"),
    [
        ({}, {}, 1.0, 1.0),
        ({"temperature": 0.2, "top_p": 0.9}, {}, 0.2, 0.9),
        ({"temperature": 0.2, "top_p": 0.9}, {"temperature": None}, 0.2, 0.9),
        ({"temperature": 0.2, "top_p": 0.9}, {"temperature": 0}, 0.0, 0.9),
        ({"temperature": 0.2}, {"temperature": 1, "top_p": 0.5}, 1.0, 0.5),
    ],
)
async def test_the_request_comes_before_the_server_before_openai(
    engine: FakeEngine,
    route: str,
    defaults: dict[str, Any],
    fields: dict[str, Any],
    temperature: float,
    top_p: float,
) -> None:
    state = make_state(engine)
    state.sampling_defaults = defaults
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        answer = await client.post(route, json=PROMPTS[route] | fields)
    assert answer.status_code == 200, answer.text
    _, params, _ = engine.calls[0]
    assert (params.temperature, params.top_p) == (temperature, top_p)
    if route == "/v1/responses":
        assert (answer.json()["temperature"], answer.json()["top_p"]) == (temperature, top_p)
    state.close()
