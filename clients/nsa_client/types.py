"""What the server answers, as frozen dataclasses.

Each answer keeps the whole JSON object as `raw`, so a field that has no attribute here is not lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict


class ChatMessage(TypedDict):
    """One message of a chat, as the API takes it."""

    role: str
    content: str


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


@dataclass(frozen=True, slots=True)
class ChatCompletionChoice:
    """One of the `n` answers."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None


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
        """The content of the first choice's message."""
        return self.choices[0].message["content"]


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


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server offers. max_model_len: its context in tokens."""

    id: str
    max_model_len: int | None
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """The tokens of a text."""

    token_ids: tuple[int, ...]
    max_model_len: int | None
    raw: Mapping[str, Any]
