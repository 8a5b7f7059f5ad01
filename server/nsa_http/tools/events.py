"""What a parser finds in the text of an answer, and the interface that all parsers have."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the reasoning block."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. index: which one of the answer, from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments, as the model wrote them: JSON once all are put together."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | CallStart | ArgumentsDelta


class ToolParser(Protocol):
    """Finds the tool calls in an answer that comes in pieces.

    How the answer is cut into pieces does not change what is found. Each character is looked at a
    bounded number of times.
    """

    def feed(self, text: str) -> list[Event]:
        """Return what this text completes."""
        ...

    def finish(self) -> list[Event]:
        """Return what was held back: the answer is over."""
        ...


class EventBuffer:
    """Collects events; neighbours of one kind become one."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._pieces: list[str] = []
        # The call whose arguments `_pieces` are; None for content.
        self._index: int | None = None

    def content(self, text: str) -> None:
        """Add text for the user."""
        self._add(text, None)

    def arguments(self, index: int, text: str) -> None:
        """Add to the arguments of a call."""
        self._add(text, index)

    def start(self, index: int, name: str) -> None:
        """Begin a call."""
        self._close()
        self._events.append(CallStart(index, name))

    def take(self) -> list[Event]:
        """Return what was added since the last time."""
        self._close()
        events, self._events = self._events, []
        return events

    def _add(self, text: str, index: int | None) -> None:
        if not text:
            return
        if index != self._index:
            self._close()
            self._index = index
        self._pieces.append(text)

    def _close(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if text:
            index = self._index
            self._events.append(
                ContentDelta(text) if index is None else ArgumentsDelta(index, text)
            )
