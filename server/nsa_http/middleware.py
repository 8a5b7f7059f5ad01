"""Pure ASGI around the app: request ids and logs, authentication, readiness, body limits.

Paths are read from scope["path"], never from a URL built with the Host header.
"""

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Sequence

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nsa_http.errors import error_response, response_of
from nsa_http.logs import REQUEST_ID
from nsa_http.playground import PLAYGROUND_PATHS
from nsa_http.state import REQUEST_ID_PATTERN, ServerState

_logger = logging.getLogger(__name__)

# Open without a key, and answered while the model loads.
PROBE_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/ready"})
# Need no engine, but a key when keys are set.
_ENGINELESS_PATHS = frozenset({"/version", "/metrics", "/openapi.json", "/server_info"})
# Scraped and probed all day, they would drown the rest (nor does vLLM time them).
_UNTIMED_HANDLERS = PROBE_PATHS | {"/metrics", "/load", "/version", "/server_info"}
_DURATION_BUCKETS_S = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestContext:
    """Outermost: gives each request an id, logs it, counts it, and answers what nobody caught."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._num_requests = Counter(
            "http_requests",
            "HTTP requests answered.",
            ("handler", "method", "status"),
            registry=state.metrics.registry,
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ("handler", "method"),
            registry=state.metrics.registry,
            buckets=_DURATION_BUCKETS_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks only http, got {scope['type']}")
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        token = REQUEST_ID.set(request_id)
        start_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            response = response_of(error)
            if status:
                raise
            await response(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.monotonic() - start_s)
            REQUEST_ID.reset(token)

    def _record(self, scope: Scope, status: int, duration_s: float) -> None:
        # Labels come from closed sets: clients must not be able to create series.
        route = scope.get("route")
        handler = getattr(route, "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._num_requests.labels(handler, method, f"{status // 100}xx").inc()
        if handler not in _UNTIMED_HANDLERS:
            self._durations.labels(handler, method).observe(duration_s)
        if self._state.config.log_requests and handler not in PROBE_PATHS | {"/metrics"}:
            path = ascii(scope["path"][:200])[1:-1]
            fields = {"method": method, "path": path, "status": status, "duration_s": duration_s}
            _logger.info(
                "%s %s %d in %.3f s", method, path, status, duration_s, extra={"fields": fields}
            )


class Head:
    """Answers HEAD as GET, without the body: load balancers probe with it."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            is_body = message["type"] == "http.response.body"
            await send({**message, "body": b""} if is_body else message)

        # A copy: the server leaves out the body of what it knows as HEAD.
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send_head)
        finally:
            if "route" in as_get:
                scope["route"] = as_get["route"]


class CrossOrigin:
    """Lets pages of allowed origins read answers, errors included; preflights need no key."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        config = state.config
        self._app = app
        if config.allowed_origins:
            self._app = CORSMiddleware(
                app,
                allow_origins=config.allowed_origins,
                allow_methods=config.allowed_methods,
                allow_headers=config.allowed_headers,
                allow_credentials=config.allow_credentials,
                expose_headers=("Retry-After", "X-Request-Id"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class Gate:
    """Refuses requests without a key (401), before the model is ready or while draining (503)."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        keys = (key.get_secret_value() for key in state.config.api_key)
        self._key_digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open_paths = PROBE_PATHS
        if state.config.playground:
            self._open_paths |= PLAYGROUND_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if path in self._open_paths:
            await self._app(scope, receive, send)
            return
        if self._key_digests and not self._is_authorized(scope):
            response = error_response(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await response(scope, receive, send)
            return
        refusal = None if path in _ENGINELESS_PATHS else self._refusal(scope["method"])
        if refusal is not None:
            response = error_response(
                503, refusal, headers={"Retry-After": "5", "Connection": "close"}
            )
            await response(scope, receive, send)
            return
        self._state.num_inflight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.num_inflight -= 1

    def _is_authorized(self, scope: Scope) -> bool:
        header = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, so that the time says nothing about which one is near.
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        return scheme.lower() == b"bearer" and any(matches)

    def _refusal(self, method: str) -> str | None:
        match self._state.phase:
            case "loading":
                return "The model is loading."
            case "draining" if method == "POST":
                self._state.metrics.on_rejected("shutting_down")
                return "The server is shutting down."
            case "dead":
                self._state.metrics.on_rejected("engine_dead")
                return "The engine stopped; the server is going down."
        return None


class BodyLimit:
    """Bounds the size of request bodies (413) and the time they may take to arrive (408)."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._max_bytes = state.config.max_request_bytes
        self._timeout_s = state.config.request_read_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            await response_of(self._too_large())(scope, receive, send)
            return
        num_bytes = 0
        is_complete = False
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s

        async def receive_bounded() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"the request body did not arrive within {self._timeout_s:g} s",
                    {"Connection": "close"},
                ) from None
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_bounded, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413,
            f"the request body is larger than {self._max_bytes} bytes; "
            "send less, or raise --max-request-bytes",
            {"Connection": "close"},
        )


def route_path(scope: Scope) -> str:
    """Return the path below root_path."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def wrap(app: ASGIApp, state: ServerState) -> ASGIApp:
    """Put the middleware around `app`, in order."""
    layers: Sequence[type[BodyLimit | Gate | CrossOrigin | Head | RequestContext]]
    layers = (BodyLimit, Gate, CrossOrigin, Head, RequestContext)
    for layer in layers:
        app = layer(app, state)
    return app


def _request_id(given: str | None) -> str:
    if given is not None and REQUEST_ID_PATTERN.fullmatch(given):
        return given
    return uuid.uuid4().hex
