"""The FastAPI application: routes, and how a body is read."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import ASGIApp

from nsa_http.chat import create_chat_completion
from nsa_http.completions import create_completion
from nsa_http.errors import (
    ERROR_RESPONSES,
    ModelNotFoundError,
    add_handlers,
    error_response,
    response_of,
)
from nsa_http.middleware import wrap
from nsa_http.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from nsa_http.state import ServerState
from nsa_http.tokenize import detokenize, tokenize
from nsa_serve.metrics import CONTENT_TYPE
from nsa_serve.version import __version__


def create_app(state: ServerState) -> ASGIApp:
    """Return the ASGI application that serves `state`."""
    app = FastAPI(
        title="nsa-serve",
        version=__version__,
        # The documentation pages would load scripts from a foreign host.
        docs_url=None,
        redoc_url=None,
        responses=ERROR_RESPONSES,
        redirect_slashes=False,
    )
    app.router.route_class = _JSONRoute
    add_handlers(app)
    _add_generation_routes(app, state)
    _add_model_routes(app, state)
    _add_probe_routes(app, state)
    return wrap(app, state)


class _JSONRequest(Request):
    async def json(self) -> Any:
        """Parse strictly: NaN, Infinity, numbers beyond a double and deep nesting are errors."""
        body = await self.body()
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            # orjson's own has the whole body for its `doc`.
            raise json.JSONDecodeError(error.msg, "", 0) from None


class _JSONRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if self.body_field is not None:
                media_type = request.headers.get("content-type", "").partition(";")[0].strip()
                if media_type.lower() != "application/json":
                    return error_response(
                        400, "Unsupported Media Type: send Content-Type: application/json"
                    )
            try:
                return await handle(_JSONRequest(request.scope, request.receive))
            # Here, since Starlette would answer an unexpected one with plain text of its own.
            except Exception as error:
                return response_of(error)

        return handle_json


def _add_generation_routes(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Complete one or more prompts."""
        return await create_completion(request, body, state)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Answer chat messages."""
        return await create_chat_completion(request, body, state)

    @app.post("/tokenize", response_model=None)
    async def tokenize_route(body: TokenizeBody) -> Response:
        """Return the token ids of a prompt or of chat messages."""
        return await tokenize(body, state)

    @app.post("/detokenize", response_model=None)
    async def detokenize_route(body: DetokenizeBody) -> Response:
        """Return the text of token ids."""
        return await detokenize(body, state)


def _add_model_routes(app: FastAPI, state: ServerState) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": state.created_s,
            "owned_by": "nsa-serve",
            "root": state.served_names[0],
            "parent": None,
            "max_model_len": state.require_engine().info.max_model_len,
        }

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """List the names under which the model is served."""
        return _json({"object": "list", "data": [card(name) for name in state.served_names]})

    # A hub id has a slash.
    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        """Describe one model name."""
        if name not in state.served_names:
            raise ModelNotFoundError(name)
        return _json(card(name))


def _add_probe_routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/health", response_model=None)
    @app.get("/ping", response_model=None)
    async def health() -> Response:
        """Answer 200 when the engine is loaded and makes progress, else 503."""
        return _status(state.is_healthy())

    @app.get("/ready", response_model=None)
    @app.get("/health/ready", response_model=None)
    async def ready() -> Response:
        """Answer 200 when new requests are taken: healthy and not draining."""
        return _status(state.phase == "ready" and state.is_healthy())

    @app.get("/health/live", response_model=None)
    async def live() -> Response:
        """Answer 200 unless the server must be restarted; loading and draining are alive."""
        return _status(state.engine is None or state.is_healthy())

    @app.get("/version", response_model=None)
    async def version() -> Response:
        """Return the server's version."""
        return _json({"version": __version__})

    @app.get("/load", response_model=None)
    async def load() -> Response:
        """Return how many requests are being answered, this one not counted."""
        return _json({"server_load": state.num_inflight - 1})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _status(is_good: bool) -> Response:
    if is_good:
        return _json({"status": "ok"})
    return Response(
        orjson.dumps({"status": "unavailable"}),
        503,
        {"Retry-After": "5"},
        media_type="application/json",
    )
