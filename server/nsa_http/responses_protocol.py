"""The body of POST /v1/responses, and the chat request that it stands for."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from nsa_http.protocol import (
    MAX_INT,
    MAX_MESSAGES,
    ChatBody,
    ReasoningEffort,
    SamplingBody,
)
from nsa_http.responses_input import read_input
from nsa_http.tools.definitions import json_size
from nsa_http.unsupported import check_unsupported, unknown_fields
from nsa_serve.errors import RequestError
from nsa_serve.request import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"

_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object"}, "maxItems": MAX_MESSAGES},
    ]
}
_TOOLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "name"],
        "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    },
}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
        },
    ]
}
# Fields that a chat request has under the same name, with the same meaning.
_SHARED = (
    *SamplingBody.model_fields,  # `model` among them
    "parallel_tool_calls",
    "chat_template_kwargs",
    "include_reasoning",
)
# Names in errors of the chat request -> names of this one.
_PARAMS = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "truncate_prompt_tokens": "truncation",
}


# Other APIs' fields: what to send instead, or what is missing here.
_FOREIGN = {
    "conversation": "responses are not stored; send the earlier items in input",
    "max_completion_tokens": "send max_output_tokens",
    "max_tokens": "send max_output_tokens",
    "messages": "send input",
    "n": "a response has one answer; leave it out",
    "prompt": "there are no stored prompts; send input",
    "reasoning_effort": "send reasoning.effort",
    "response_format": "send text.format",
}
# They concern built-in tools and padding of a stream, of which there are none.
_HARMLESS = frozenset({"max_tool_calls", "stream_options"})


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class Reasoning(_Body):
    """`reasoning`: how much to think. A summary is not made: the text itself is returned."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class TextConfig(_Body):
    """`text`: the form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(SamplingBody):
    """POST /v1/responses."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    text: TextConfig | None = None
    tools: Annotated[Any, WithJsonSchema(_TOOLS_SCHEMA)] = None
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    # Encrypted reasoning stays null: it comes as text.
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        Field(None, max_length=16)
    )
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        """True when the text comes with log-probabilities."""
        return LOGPROBS in (self.include or ())

    def check_extra(self) -> Iterator[str]:
        """Refuse fields of other APIs; return the names of fields that nobody knows."""
        extra = self.model_extra or {}
        for name, value in extra.items():
            if name in _FOREIGN and value is not None:
                raise RequestError(
                    f"{name} is not supported in responses: {_FOREIGN[name]}", param=name
                )
        check_unsupported(extra)
        known = _FOREIGN.keys() | _HARMLESS
        return (name for name in unknown_fields(extra) if name not in known)

    def to_chat(self, *, max_model_len: int) -> ChatBody:
        """Return the chat request with the same meaning. Raises RequestError."""
        self._check_stateless()
        if self.top_logprobs and not self.wants_logprobs:
            raise RequestError(f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs")
        if self.text is not None:
            json_size(self.text.format, param="text.format")
        fields = {name: getattr(self, name) for name in _SHARED}
        fields["messages"] = read_input(self.input, self.instructions)
        fields["max_completion_tokens"] = self.max_output_tokens
        fields["logprobs"] = self.wants_logprobs
        fields["top_logprobs"] = self.top_logprobs if self.wants_logprobs else None
        fields["response_format"] = _response_format(self.text)
        fields["reasoning_effort"] = None if self.reasoning is None else self.reasoning.effort
        has_tools = self.tools not in (None, [])
        if has_tools:
            fields["tools"] = _chat_tools(self.tools)
        # "auto" is OpenAI's default here, also without tools.
        if has_tools or self.tool_choice not in (None, "auto"):
            fields["tool_choice"] = _chat_choice(self.tool_choice)
        if self.truncation == "auto":
            room = max_model_len - min(self.max_output_tokens or 1, max_model_len - 1)
            fields["truncate_prompt_tokens"] = room
        return ChatBody.model_validate(fields)

    def _check_stateless(self) -> None:
        if self.previous_response_id is not None:
            raise RequestError(
                "previous_response_id is not supported: responses are not stored; send the earlier "
                "items in input",
                param="previous_response_id",
            )
        if self.background:
            raise RequestError(
                "background is not supported: responses are not stored; leave it out",
                param="background",
            )


def rename_param(error: RequestError) -> RequestError:
    """Return the error of a chat request with the name that the field has here."""
    first = (error.param or "").partition(".")[0]
    if first not in _PARAMS:
        return error
    # The message begins with the field, as a rule.
    message = str(error)
    if message.startswith(error.param or first):
        message = _PARAMS[first] + message.removeprefix(error.param or first)
    return RequestError(message, param=_PARAMS[first])


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    wanted = None if text is None else text.format
    if wanted is None or wanted.get("type") != "json_schema":
        return wanted
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in wanted.items() if name != "type"},
    }


def _chat_tools(tools: Any) -> Any:
    if not isinstance(tools, list):
        return tools
    return [_chat_tool(tool) for tool in tools]


def _chat_tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        return tool
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def _chat_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice
