"""Every exception of the client.

APIError                       base: message, status, type, param, code, request_id
├── APIConnectionError         no answer: refused, lost, or cut in the middle of a stream
│   └── APITimeoutError        no answer in time
├── InvalidResponseError       an answer that is not what the API promises
├── StreamError                the server reported an error after the stream had begun
└── APIStatusError             the server answered with an HTTP error
    ├── BadRequestError        400: `param` names the field at fault
    ├── AuthenticationError    401
    ├── PermissionDeniedError  403
    ├── NotFoundError          404: no such model or route
    ├── RequestTooLargeError   413
    ├── RateLimitError         429
    └── InternalServerError    500 and above
        └── ServiceUnavailableError  503: queue full, loading or shutting down
"""

from collections.abc import Mapping
from typing import Any

import httpx

MAX_ECHOED_CHARS = 200


class APIError(Exception):
    """A request failed. Fields that the server did not send are None.

    status: HTTP status. type, param, code: as in the server's error object.
    request_id: the `X-Request-Id` to look for in the server's log.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.request_id = request_id


class APIConnectionError(APIError):
    """The server could not be reached, or the connection broke."""


class APITimeoutError(APIConnectionError):
    """The server did not answer in time."""


class InvalidResponseError(APIError):
    """The answer is not the JSON or the event stream that was expected."""


class StreamError(APIError):
    """The server reported an error in a stream that had already begun with status 200."""


class APIStatusError(APIError):
    """The server answered with an HTTP error status."""


class BadRequestError(APIStatusError):
    """400: the request is invalid."""


class AuthenticationError(APIStatusError):
    """401: the API key is missing or wrong."""


class PermissionDeniedError(APIStatusError):
    """403: the API key does not allow this."""


class NotFoundError(APIStatusError):
    """404: the model or the route does not exist."""


class RequestTooLargeError(APIStatusError):
    """413: the body is larger than the server accepts."""


class RateLimitError(APIStatusError):
    """429: too many requests."""


class InternalServerError(APIStatusError):
    """500 and above: the server failed."""


class ServiceUnavailableError(InternalServerError):
    """503: the queue is full, the model is loading, or the server is shutting down."""


_BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: RequestTooLargeError,
    429: RateLimitError,
    503: ServiceUnavailableError,
}


def connection_error(error: httpx.RequestError, base_url: str) -> APIConnectionError:
    """Translate a failure below HTTP; the message names the server and the cause."""
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(f"{base_url} did not answer in time ({cause}); raise `timeout`")
    return APIConnectionError(f"the connection to {base_url} failed ({cause})")


def status_error(response: httpx.Response) -> APIStatusError:
    """Build the exception of an HTTP error. The response must have been read."""
    try:
        fields = error_fields(response.json())
    except ValueError:  # not JSON, or not UTF-8: a proxy's page, most likely
        text = response.text[:MAX_ECHOED_CHARS].strip()
        fields = {"message": f"HTTP {response.status_code} {response.reason_phrase}: {text}"}
    status = response.status_code
    cls = _BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)
    return cls(**fields, status=status, request_id=response.headers.get("x-request-id"))


def error_fields(body: Any) -> dict[str, Any]:
    """Return message, type, param and code of an error object, nested (OpenAI) or flat (SGLang).

    Raises ValueError when the body holds no error message.
    """
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict) or "message" not in error:
        raise ValueError(f"no error message in {str(body)[:MAX_ECHOED_CHARS]}")
    fields = {name: error.get(name) for name in ("type", "param", "code")}
    return {"message": str(error["message"]), **fields}
