"""What OpenAPI says about answers: the shape of each, and every status that a route can have.

The models describe answers for readers and tools; the answers themselves are written by hand.
"""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from nsa_http.errors import MAX_ECHO_CHARS


class ErrorDetail(BaseModel):
    """What was wrong. `param` names the field at fault, `code` repeats the status."""

    message: str
    type: str
    param: str | None = Field(max_length=MAX_ECHO_CHARS + 3)
    code: int


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """cached_tokens: prompt tokens that the prefix cache had."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None


class CompletionAnswer(BaseModel):
    """A whole completion; a stream has chunks of the same shape."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ChatMessage(BaseModel):
    """The assistant's message."""

    role: str
    content: str | None = None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: dict[str, Any] | None = None


class ChatAnswer(BaseModel):
    """A whole chat answer; a stream has chunks with `delta` in place of `message`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ResponseUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(BaseModel):
    """A whole response; a stream has typed events, the last one with the response in it."""

    id: str
    object: str
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    usage: ResponseUsage | None


class TokenizeAnswer(BaseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    """The text of token ids."""

    prompt: str


class ModelCard(BaseModel):
    """A name under which the model is served."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    """All names."""

    object: str
    data: list[ModelCard]


class StatusAnswer(BaseModel):
    """status: "ok" with 200, "unavailable" with 503."""

    status: str


class VersionAnswer(BaseModel):
    """The server's version."""

    version: str


class LoadAnswer(BaseModel):
    """server_load: requests that are being answered."""

    server_load: int


class ServerInfo(BaseModel):
    """Settings, versions and what was loaded; model and cache are null while it loads."""

    version: str
    phase: str
    served_model_names: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    model: dict[str, Any] | None
    cache: dict[str, Any] | None
    memory: dict[str, Any] | None
    startup_s: dict[str, float] | None


_DESCRIPTIONS: Final = {
    400: "The request is invalid; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "The model does not exist.",
    408: "The request took too long to arrive.",
    413: "The request body is too large.",
    500: "The server failed.",
    503: "The server is loading, full or shutting down; Retry-After says when to come back.",
}
_EVENTS: Final = {
    "schema": {
        "type": "string",
        "description": "`data: {...}` events, the last one `data: [DONE]`; an error after the "
        "stream began is an event with an `error` object",
    }
}
Responses = dict[int | str, dict[str, Any]]


def generation(answer: type[BaseModel], *, can_stream: bool = True) -> Responses:
    """Return the responses of a route that takes a body and generates."""
    ok: dict[str, Any] = {"model": answer, "description": "The answer."}
    if can_stream:
        ok["description"] = "The answer, or with `stream: true` its events."
        ok["content"] = {"text/event-stream": _EVENTS}
    return {200: ok, **errors(400, 401, 404, 408, 413, 500, 503)}


def query(answer: type[BaseModel], *statuses: int) -> Responses:
    """Return the responses of a GET route: 401 and 500 are always possible."""
    ok = {"model": answer, "description": "The answer."}
    return {200: ok, **errors(401, *statuses, 500)}


def probe() -> Responses:
    """Return the responses of a probe, which needs no key."""
    retry = {"description": _DESCRIPTIONS[503], "model": StatusAnswer}
    return {200: {"model": StatusAnswer, "description": "Yes."}, 503: retry}


def text(*statuses: int) -> Responses:
    """Return the responses of a route that answers in plain text."""
    ok = {"description": "The answer.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {200: ok, **errors(401, *statuses, 500)}


def errors(*statuses: int) -> Responses:
    """Return the error responses of these statuses."""
    return {
        status: {"description": _DESCRIPTIONS[status], "model": ErrorAnswer} for status in statuses
    }


def use_our_schema(app: FastAPI) -> None:
    """Make `app` leave out the 422 that FastAPI declares and this server never sends."""

    def make_schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = make_schema  # type: ignore[method-assign]
