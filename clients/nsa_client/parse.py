"""The server's JSON to the dataclasses of types.py."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import httpx

from nsa_client.errors import MAX_ECHOED_CHARS, InvalidResponseError, StreamError, error_fields
from nsa_client.sse import SSEDecoder
from nsa_client.types import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatMessage,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionChoice,
    Model,
    NSATrace,
    TokenizeResult,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

T = TypeVar("T")
_DONE = "[DONE]"


def parse_response(response: httpx.Response, build: Callable[[Any, str | None], T]) -> T:
    """Build the answer from a successful response; anything malformed is InvalidResponseError."""
    request_id = response.headers.get("x-request-id")
    try:
        return build(response.json(), request_id)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(response.text, error, request_id) from error


class ChunkParser:
    """Turn the bytes of an event stream into chunks, until `[DONE]`."""

    def __init__(self, request_id: str | None) -> None:
        self._decoder = SSEDecoder()
        self._request_id = request_id
        self.is_done = False

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Yield the chunks that these bytes complete. Raises StreamError for an error event."""
        for event in self._decoder.feed(data):
            if event.data == _DONE:
                self.is_done = True
                return
            try:
                raw = json.loads(event.data)
                if "error" in raw:
                    fields = error_fields(raw)
                    raise StreamError(**fields, request_id=self._request_id)
                chunk = parse_chunk(raw)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise _invalid(event.data, error, self._request_id) from error
            yield chunk

    def close(self) -> None:
        """Raise StreamError when the stream ended before `[DONE]`: the text may be incomplete."""
        if not self.is_done:
            raise StreamError(
                "the stream ended before [DONE]; the text may be incomplete",
                request_id=self._request_id,
            )


def _invalid(text: str, error: Exception, request_id: str | None) -> InvalidResponseError:
    return InvalidResponseError(
        f"unexpected answer ({type(error).__name__}: {error}): {text[:MAX_ECHOED_CHARS]!r}",
        request_id=request_id,
    )


def parse_completion(raw: Any, request_id: str | None) -> Completion:
    """Build the answer of /v1/completions."""
    choices = tuple(
        CompletionChoice(
            index=choice["index"],
            text=choice["text"],
            logprobs=_completion_logprobs(choice.get("logprobs")),
            **_ending(choice),
        )
        for choice in _choices(raw)
    )
    return Completion(choices=choices, request_id=request_id, **_envelope(raw))


def parse_chat_completion(raw: Any, request_id: str | None) -> ChatCompletion:
    """Build the answer of /v1/chat/completions."""
    choices = tuple(
        ChatCompletionChoice(
            index=choice["index"],
            message=_message(choice["message"]),
            logprobs=_chat_logprobs(choice.get("logprobs")),
            tool_calls=_tool_calls(choice["message"].get("tool_calls") or ()),
            reasoning=_reasoning(choice["message"]),
            **_ending(choice),
        )
        for choice in _choices(raw)
    )
    return ChatCompletion(choices=choices, request_id=request_id, **_envelope(raw))


def parse_chunk(raw: Any) -> Chunk:
    """Build a chunk of either endpoint: a chat's has a `delta`, a completion's a `text`."""
    choices = []
    for choice in raw["choices"]:
        is_chat = "delta" in choice
        delta = choice["delta"] if is_chat else {"content": choice["text"]}
        parse_logprobs = _chat_logprobs if is_chat else _completion_logprobs
        choices.append(
            ChunkChoice(
                index=choice["index"],
                text=delta.get("content") or "",
                role=delta.get("role"),
                logprobs=parse_logprobs(choice.get("logprobs")),
                tool_calls=_tool_call_deltas(delta.get("tool_calls") or ()),
                reasoning=_reasoning(delta) or "",
                **_ending(choice),
            )
        )
    return Chunk(choices=tuple(choices), **_envelope(raw))


def parse_models(raw: Any, request_id: str | None) -> list[Model]:
    """Build the answer of /v1/models."""
    return [parse_model(model, request_id) for model in raw["data"]]


def parse_model(raw: Any, request_id: str | None) -> Model:
    """Build the answer of /v1/models/{id}."""
    return Model(id=raw["id"], max_model_len=raw.get("max_model_len"), raw=raw)


def parse_tokenize(raw: Any, request_id: str | None) -> TokenizeResult:
    """Build the answer of /tokenize."""
    strs = raw.get("token_strs")
    return TokenizeResult(
        tuple(raw["tokens"]),
        raw.get("max_model_len"),
        raw,
        token_strs=None if strs is None else tuple(strs),
    )


def parse_detokenize(raw: Any, request_id: str | None) -> str:
    """Return the text in the answer of /detokenize."""
    text = raw["prompt"]
    if not isinstance(text, str):
        raise TypeError(f"prompt must be a string, got {type(text).__name__}")
    return text


def parse_version(raw: Any, request_id: str | None) -> str:
    """Return the version in the answer of /version."""
    return str(raw["version"])


def _choices(raw: Any) -> list[Any]:
    choices = raw["choices"]
    if not choices:
        raise ValueError("choices is empty")
    return sorted(choices, key=lambda choice: choice["index"])


def _envelope(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": raw["id"],
        "model": raw["model"],
        "created": raw["created"],
        "usage": _usage(raw.get("usage")),
        "raw": raw,
    }


def _ending(choice: Mapping[str, Any]) -> dict[str, Any]:
    token_ids = choice.get("token_ids")
    return {
        "finish_reason": choice.get("finish_reason"),
        "stop_reason": choice.get("stop_reason"),
        "token_ids": None if token_ids is None else tuple(token_ids),
        "nsa_trace": _trace(choice.get("nsa_trace")),
    }


def _message(message: Mapping[str, Any]) -> ChatMessage:
    """Keep what can be sent back: the thought is not part of a conversation."""
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls:
        return ChatMessage(role=message["role"], content=content, tool_calls=calls)
    return ChatMessage(role=message["role"], content=content or "")


def _reasoning(message: Mapping[str, Any]) -> str | None:
    # vLLM renamed the field; servers send either name, or both with the same text.
    text = message.get("reasoning")
    return message.get("reasoning_content") if text is None else text


def _tool_calls(calls: Iterable[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in calls
    )


def _tool_call_deltas(calls: Iterable[Mapping[str, Any]]) -> tuple[ToolCallDelta, ...]:
    functions = ((call, call.get("function") or {}) for call in calls)
    return tuple(
        ToolCallDelta(
            call["index"], call.get("id"), function.get("name"), function.get("arguments") or ""
        )
        for call, function in functions
    )


def _trace(trace: Mapping[str, Any] | None) -> NSATrace | None:
    if trace is None:
        return None
    return NSATrace(
        block_size=trace["block_size"],
        position=trace.get("position"),
        layers=tuple(trace["layers"]),
        tokens=tuple(
            tuple(tuple(tuple(blocks) for blocks in heads) for heads in layers)
            for layers in trace["tokens"]
        ),
        is_truncated=bool(trace.get("truncated")),
        raw=trace,
    )


def _usage(usage: Mapping[str, Any] | None) -> Usage | None:
    if usage is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        usage["prompt_tokens"],
        usage.get("completion_tokens", 0),
        usage["total_tokens"],
        details.get("cached_tokens"),
    )


def _completion_logprobs(logprobs: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None:
        return None
    tokens = logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    offsets = logprobs.get("text_offset") or [None] * len(tokens)
    rows = zip(tokens, logprobs["token_logprobs"], tops, offsets, strict=True)
    return tuple(
        TokenLogprob(token, logprob, _best_first((top or {}).items()), text_offset=offset)
        for token, logprob, top, offset in rows
    )


def _chat_logprobs(logprobs: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None or logprobs.get("content") is None:
        return None
    return tuple(
        TokenLogprob(
            entry["token"],
            entry["logprob"],
            _best_first((top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()),
            utf8=None if entry.get("bytes") is None else bytes(entry["bytes"]),
        )
        for entry in logprobs["content"]
    )


def _best_first(pairs: Any) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))
