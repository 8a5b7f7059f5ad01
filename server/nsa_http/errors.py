"""Errors on the wire: OpenAI's nested `{"error": {...}}`, and what each exception becomes."""

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nsa_serve.errors import EngineDeadError, NSAServeError, QueueFullError, RequestError

_logger = logging.getLogger(__name__)

MAX_ECHO_CHARS = 200
MAX_VALIDATION_ERRORS = 10

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ModelNotFoundError(Exception):
    """The request names a model that is not served: HTTP 404."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model `{clip(name)}` does not exist.")


class GenerationError(Exception):
    """One request failed inside the engine, which lives on: HTTP 500."""


class ClientDisconnectedError(Exception):
    """The client left; nobody reads the answer."""


class ShutdownError(Exception):
    """The server stopped before the request ended: HTTP 503."""


def clip(text: str) -> str:
    """Cut client input that is repeated in a message."""
    return text if len(text) <= MAX_ECHO_CHARS else text[:MAX_ECHO_CHARS] + "..."


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """Return the JSON body of an error."""
    return orjson.dumps(
        {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "APIError"),
                "param": param,
                "code": status,
            }
        }
    )


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the response of an error."""
    return Response(
        error_body(status, message, param), status, headers, media_type="application/json"
    )


def describe(error: Exception) -> tuple[int, str, str | None, dict[str, str]]:
    """Return (status, message, param, headers) of an exception. Unexpected ones are logged here.

    The text of an unexpected exception stays in the log: it may hold paths or addresses.
    """
    match error:
        case RequestError():
            return 400, str(error), error.param, {}
        case RequestValidationError():
            message, param = _describe_validation(error)
            return 400, message, param, {}
        case ModelNotFoundError():
            return 404, str(error), "model", {}
        case HTTPException():
            return error.status_code, str(error.detail), None, dict(error.headers or {})
        case QueueFullError():
            return 503, str(error), None, {"Retry-After": str(max(1, error.retry_after_s))}
        case EngineDeadError():
            _logger.error("the engine is dead: %s", error)
            return 500, "The engine stopped; the server is going down.", None, {}
        case ShutdownError():
            return 503, "The server is shutting down.", None, {"Retry-After": "5"}
        case GenerationError() | NSAServeError():
            _logger.error("request failed: %s", error)
            return 500, "The engine failed on this request.", None, {}
        case _:
            _logger.error("unexpected error", exc_info=error)
            return 500, "Internal server error; the server log has the details.", None, {}


def response_of(error: Exception) -> Response:
    """Return the response that an exception becomes."""
    status, message, param, headers = describe(error)
    return error_response(status, message, param=param, headers=headers)


def add_handlers(app: FastAPI) -> None:
    """Make the router's own errors (unknown path, wrong method) look like all others."""

    async def handle(_request: Request, error: Exception) -> Response:
        return response_of(error)

    app.add_exception_handler(HTTPException, handle)


def _describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    items = error.errors()
    lines = []
    for item in items[:MAX_VALIDATION_ERRORS]:
        name = _location(item["loc"])
        if item["type"] == "json_invalid":
            reason = item.get("ctx", {}).get("error", "")
            lines.append(f"the body is not valid JSON: {clip(str(reason))}")
        else:
            lines.append(f"{name or 'body'}: {item['msg']}, got {_echo(item.get('input'))}")
    if len(items) > MAX_VALIDATION_ERRORS:
        lines.append(f"and {len(items) - MAX_VALIDATION_ERRORS} more errors")
    is_json = items[0]["type"] != "json_invalid"
    return "; ".join(lines), (_location(items[0]["loc"]) or None) if is_json else None


def _location(loc: tuple[Any, ...]) -> str:
    # Pydantic adds the name of the union member that failed, such as "list[str]": not a field.
    parts = [part for part in loc if part != "body" and not str(part).startswith(("list[", "con"))]
    return clip(".".join(str(part) for part in parts if part not in ("str", "int")))


def _echo(value: Any) -> str:
    """Describe client input shortly, without rendering all of it first."""
    if isinstance(value, str):
        return repr(clip(value[: MAX_ECHO_CHARS + 1]))
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)} items"
    return clip(repr(value))
