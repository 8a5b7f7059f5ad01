"""What the server answers, as frozen dataclasses.

Each answer keeps the whole JSON object as `raw`, so a field that has no attribute here is not lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


class ChatMessage(TypedDict):
    """One message of a chat, as the API takes it and as an answer brings it.

    content: None in an answer that only calls tools. tool_calls: as the API spells them, so that
    an answer's message can be sent back as it is. tool_call_id: the call that a `tool` message
    answers.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]] | None
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called. arguments: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a chunk adds to the tool call `index`. id and name come with its first delta only."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class NSATrace:
    """The blocks of the context that tokens selected, asked for with `nsa_trace`.

    tokens: [token][layer][kv head] to ascending block ids; block b is the context's tokens from
    b * block_size on. position: that of the first of these tokens. layers: the layers reported.
    is_truncated: the server's bound was reached, and later tokens have no trace.
    """

    block_size: int
    position: int | None
    layers: tuple[int, ...]
    tokens: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    is_truncated: bool
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request. num_prefix_hit_tokens: prompt tokens found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    num_prefix_hit_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the likeliest tokens at its position, best first.

    logprob: None for the first token of an echoed prompt, which nothing precedes.
    text_offset: where the token starts in the text (completions). utf8: its bytes (chat).
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    text_offset: int | None = None
    utf8: bytes | None = None


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One of the `n` texts."""

    index: int
    text: str
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    nsa_trace: NSATrace | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletionChoice:
    """One of the `n` answers. reasoning: the block of thought, where the server separates it."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    nsa_trace: NSATrace | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class ChunkChoice:
    """What a chunk adds to one of the `n` texts. role: in the first chunk of a chat only."""

    index: int
    text: str
    role: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    nsa_trace: NSATrace | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of `complete`."""

    id: str
    model: str
    created: int
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None
    request_id: str | None
    raw: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The answer of `chat`."""

    id: str
    model: str
    created: int
    choices: tuple[ChatCompletionChoice, ...]
    usage: Usage | None
    request_id: str | None
    raw: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The content of the first choice's message; empty when it only calls tools."""
        content = self.choices[0].message["content"]
        return content if isinstance(content, str) else ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls of the first choice."""
        return self.choices[0].tool_calls


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream. The last one has no choices: it carries the usage."""

    id: str
    model: str
    created: int
    choices: tuple[ChunkChoice, ...]
    usage: Usage | None
    raw: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The text added to choice 0; empty when this chunk belongs to another choice."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)

    @property
    def reasoning(self) -> str:
        """The thought added to choice 0."""
        return "".join(choice.reasoning for choice in self.choices if choice.index == 0)

    @property
    def tool_calls(self) -> tuple[ToolCallDelta, ...]:
        """What is added to the tool calls of choice 0."""
        return tuple(d for choice in self.choices if choice.index == 0 for d in choice.tool_calls)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server offers. max_model_len: its context in tokens."""

    id: str
    max_model_len: int | None
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """The tokens of a text. token_strs: their spellings, where they were asked for."""

    token_ids: tuple[int, ...]
    max_model_len: int | None
    raw: Mapping[str, Any]
    token_strs: tuple[str, ...] | None = None


def join_tool_calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Put the deltas of one choice together into its calls, in the order of their indices.

    Raises ValueError for a call whose first delta, with its id and name, is missing.
    """
    by_index: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return tuple(_join(index, by_index[index]) for index in sorted(by_index))


def _join(index: int, deltas: Sequence[ToolCallDelta]) -> ToolCall:
    id_ = next((delta.id for delta in deltas if delta.id), None)
    name = next((delta.name for delta in deltas if delta.name), None)
    if id_ is None or name is None:
        raise ValueError(f"tool call {index} has no delta with its id and name")
    return ToolCall(id_, name, "".join(delta.arguments for delta in deltas))
