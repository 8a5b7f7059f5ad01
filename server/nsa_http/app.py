"""The FastAPI application: routes, and how a body is read."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import ASGIApp

from nsa_http import openapi
from nsa_http.chat import create_chat_completion
from nsa_http.completions import create_completion
from nsa_http.errors import (
    ModelNotFoundError,
    add_handlers,
    error_response,
    response_of,
)
from nsa_http.middleware import wrap
from nsa_http.operations import add_operator_routes, add_probe_routes, json_response
from nsa_http.playground import add_playground
from nsa_http.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from nsa_http.responses import create_response
from nsa_http.responses_protocol import ResponsesBody
from nsa_http.state import ServerState
from nsa_http.tokenize import detokenize, tokenize
from nsa_serve.version import __version__


def create_app(state: ServerState) -> ASGIApp:
    """Return the ASGI application that serves `state`."""
    app = FastAPI(
        title="nsa-serve",
        version=__version__,
        # The documentation pages would load scripts from a foreign host.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    openapi.use_our_schema(app)
    app.router.route_class = _JSONRoute
    add_handlers(app)
    _add_generation_routes(app, state)
    _add_model_routes(app, state)
    add_probe_routes(app, state)
    add_operator_routes(app, state)
    if state.config.playground:
        add_playground(app)
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
    @app.post(
        "/v1/completions",
        response_model=None,
        responses=openapi.generation(openapi.CompletionAnswer),
    )
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Complete one or more prompts."""
        return await create_completion(request, body, state)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses=openapi.generation(openapi.ChatAnswer),
    )
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Answer chat messages."""
        return await create_chat_completion(request, body, state)

    @app.post(
        "/v1/responses",
        response_model=None,
        responses=openapi.generation(openapi.ResponseAnswer),
    )
    async def responses(request: Request, body: ResponsesBody) -> Response:
        """Answer input items; nothing is stored."""
        return await create_response(request, body, state)

    @app.post(
        "/tokenize",
        response_model=None,
        responses=openapi.generation(openapi.TokenizeAnswer, can_stream=False),
    )
    async def tokenize_route(body: TokenizeBody) -> Response:
        """Return the token ids of a prompt or of chat messages."""
        return await tokenize(body, state)

    @app.post(
        "/detokenize",
        response_model=None,
        responses=openapi.generation(openapi.DetokenizeAnswer, can_stream=False),
    )
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

    @app.get("/v1/models", response_model=None, responses=openapi.query(openapi.ModelList, 503))
    async def models() -> Response:
        """List the names under which the model is served."""
        return json_response(
            {"object": "list", "data": [card(name) for name in state.served_names]}
        )

    # A hub id has a slash.
    @app.get(
        "/v1/models/{name:path}",
        response_model=None,
        responses=openapi.query(openapi.ModelCard, 404, 503),
    )
    async def model(name: str) -> Response:
        """Describe one model name."""
        if name not in state.served_names:
            raise ModelNotFoundError(name)
        return json_response(card(name))
