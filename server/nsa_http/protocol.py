"""Request bodies. Every optional field also takes null, which means its default.

Ranges that the engine checks as well (`SamplingParams`) are not repeated; bounds here keep
hostile sizes out.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from nsa_http.state import REQUEST_ID_PATTERN
from nsa_http.tools.definitions import MAX_TOOLS
from nsa_serve.errors import RequestError
from nsa_serve.request import (
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_TRACED_LAYERS,
    MAX_TRACED_TOKENS,
    SamplingParams,
)

MAX_N = 128
MAX_PROMPTS = 1024
MAX_INT = 2**31 - 1
MAX_MESSAGES = 4096

BoundedInt = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TruncationSide = Literal["left", "right"]

_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "maxItems": MAX_PROMPTS},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "items": _TOKEN_IDS_SCHEMA, "maxItems": MAX_PROMPTS},
    ]
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"type": "string"}, "content": {}},
    },
}
_TOOLS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 128},
                    "description": {"type": ["string", "null"]},
                    "parameters": {"type": ["object", "null"]},
                },
            },
        },
    },
}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}},
                },
            },
        },
    ]
}
# Large arrays are checked by hand: pydantic would collect one error for each of a million items.
Prompt = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
Messages = Annotated[Any, WithJsonSchema(_MESSAGES_SCHEMA)]
TokenIds = Annotated[Any, WithJsonSchema(_TOKEN_IDS_SCHEMA)]
Tools = Annotated[Any, WithJsonSchema(_TOOLS_SCHEMA)]
ToolChoiceField = Annotated[Any, WithJsonSchema(_TOOL_CHOICE_SCHEMA)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    model: str | None = None


class StreamOptions(_Body):
    """`stream_options`: a last chunk with the usage, or the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TraceOptions(BaseModel):
    """`nsa_trace` as an object: which layers, and how many tokens of the output at most."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    layers: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TRACED_LAYERS)] | None = (
        None
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_TRACED_TOKENS)


class SamplingBody(_Body):
    """Fields that every generation endpoint has."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: BoundedInt | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: BoundedInt | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    request_id: str | None = Field(None, pattern=f"^{REQUEST_ID_PATTERN.pattern}$")
    stream: bool | None = None


class GenerationBody(SamplingBody):
    """Fields that completions and chat share."""

    n: int | None = Field(None, ge=1, le=MAX_N)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    prompt_logprobs: int | None = None
    allowed_token_ids: TokenIds = None
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS)] | None = None
    response_format: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_INT)
    truncation_side: TruncationSide | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    nsa_trace: bool | TraceOptions | None = None

    @property
    def num_samples(self) -> int:
        """`n`, or 1."""
        return 1 if self.n is None else self.n

    @property
    def has_usage_chunk(self) -> bool:
        """True when a stream ends with a chunk that carries the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """True when every chunk carries the usage so far (honoured with include_usage, as vLLM)."""
        return self.has_usage_chunk and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def check_common(self, *, allows_priority: bool) -> None:
        """Raise RequestError when fields do not go together."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError(
                "prompt_logprobs cannot be streamed; set stream=false", param="prompt_logprobs"
            )
        if self.best_of is not None and self.best_of != self.num_samples:
            raise RequestError(
                f"best_of must equal n ({self.num_samples}) or be left out, got {self.best_of}",
                param="best_of",
            )
        if self.priority and not allows_priority:
            raise RequestError(
                "priority must be 0: the server was started without --scheduling-policy priority",
                param="priority",
            )

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Return the engine's parameters, all but what `constraints.constrain` adds.

        defaults: of the server, for fields that are left out. Raises RequestError for values out
        of range.
        """
        fields: dict[str, Any] = dict(defaults)
        for name in _SAMPLING_FIELDS:
            value = getattr(self, name)
            if value is not None:
                fields[name] = value
        if isinstance(self.stop, str):
            fields["stop"] = (self.stop,)
        elif self.stop is not None:
            fields["stop"] = tuple(self.stop)
        if self.stop_token_ids is not None:
            fields["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias is not None:
            fields["logit_bias"] = _int_keys(self.logit_bias)
        if self.allowed_token_ids is not None:
            ids = check_token_ids(self.allowed_token_ids, param="allowed_token_ids")
            fields["allowed_token_ids"] = tuple(dict.fromkeys(ids))
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **fields)


_SAMPLING_FIELDS = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=-1, le=MAX_LOGPROBS)

    def check(self, *, allows_priority: bool) -> None:
        """Raise RequestError when fields do not go together."""
        self.check_common(allows_priority=allows_priority)
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(
                "max_tokens must be at least 1 (0 is only for echo=true)", param="max_tokens"
            )


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1, le=MAX_LOGPROBS)
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None

    def check(self, *, allows_priority: bool) -> None:
        """Raise RequestError when fields do not go together."""
        self.check_common(allows_priority=allows_priority)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.top_logprobs == -1:
            raise RequestError(
                "top_logprobs -1, the whole vocabulary, is not supported; ask for at most "
                f"{MAX_LOGPROBS}",
                param="top_logprobs",
            )
        if self.max_tokens == 0:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")


class TokenizeBody(_Body):
    """POST /tokenize: a prompt, or chat messages."""

    prompt: str | None = None
    messages: Messages = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """POST /detokenize."""

    tokens: TokenIds


def check_token_ids(value: Any, *, param: str) -> list[int]:
    """Return `value` when it is a list of token ids. Raises RequestError."""
    if not isinstance(value, list) or not is_token_ids(value):
        raise RequestError(f"{param} must be an array of token ids (integers >= 0)", param=param)
    return value


def is_token_ids(items: list[Any]) -> bool:
    """Return whether all items are integers that can be token ids."""
    # `type(...) is int`, since True is an int by isinstance.
    return all(type(item) is int and 0 <= item <= MAX_INT for item in items)


def _int_keys(bias: dict[str, float]) -> dict[int, float]:
    ids: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(
                f"logit_bias keys must be token ids, got {key[:64]!r}", param="logit_bias"
            )
        ids[int(key)] = value
    return ids
