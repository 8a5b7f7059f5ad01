"""A fake engine, its app, and a client that talks to the app in memory."""

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import ASGIApp

from tests.server.fake_engine import FakeEngine, make_app


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def app(engine: FakeEngine) -> ASGIApp:
    return make_app(engine)


@pytest.fixture
async def client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
