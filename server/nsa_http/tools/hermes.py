"""The Hermes form, which Qwen uses too: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

Calls may stand anywhere in the answer. White space around them is markup, not content. A marker
that no call follows is content.
"""

import enum

from nsa_http.tools.call_object import WHITESPACE, CallObject, Progress
from nsa_http.tools.events import Event, EventBuffer

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class _State(enum.Enum):
    CONTENT = enum.auto()
    CALL = enum.auto()
    CLOSE = enum.auto()


class HermesParser:
    """Implements `ToolParser`."""

    def __init__(self) -> None:
        self._buffer = EventBuffer()
        self._state = _State.CONTENT
        self._num_calls = 0
        self._call = self._next_call()
        # White space before a possible marker, and how much of the marker has come.
        self._spaces: list[str] = []
        self._num_matched = 0
        self._is_after_call = False

    def feed(self, text: str) -> list[Event]:
        """Return what this text completes."""
        if self._is_plain(text):
            self._show(text)
        else:
            for char in text:
                self._step(char)
        return self._buffer.take()

    def finish(self) -> list[Event]:
        """Return what was held back: the answer is over."""
        if self._state is _State.CONTENT:
            partial = OPEN[: self._num_matched]
            # White space after the last call is markup.
            if partial or not self._is_after_call:
                self._buffer.content("".join(self._spaces) + partial)
        elif self._state is _State.CALL:
            if not self._call.has_started:
                self._show(OPEN + self._call.raw)
            self._call.finish()
        return self._buffer.take()

    def _is_plain(self, text: str) -> bool:
        """True for text that no marker can begin in, the usual case: it needs no scan."""
        is_outside = self._state is _State.CONTENT and not self._num_matched
        return is_outside and OPEN[0] not in text and text[-1:].strip(WHITESPACE) != ""

    def _step(self, char: str) -> None:
        match self._state:
            case _State.CONTENT:
                self._step_content(char)
            case _State.CALL:
                self._step_call(char)
            case _State.CLOSE:
                self._step_close(char)

    def _step_content(self, char: str) -> None:
        if char == OPEN[self._num_matched]:
            self._num_matched += 1
            if self._num_matched == len(OPEN):
                self._num_matched = 0
                self._state = _State.CALL
            return
        if self._num_matched:
            # `<` occurs in the marker once, so no shorter match can have begun inside this one.
            self._show(OPEN[: self._num_matched])
            self._num_matched = int(char == OPEN[0])
            if self._num_matched:
                return
        if char in WHITESPACE:
            self._spaces.append(char)
        else:
            self._show(char)

    def _show(self, text: str) -> None:
        self._buffer.content("".join(self._spaces) + text)
        self._spaces.clear()
        self._is_after_call = False

    def _step_call(self, char: str) -> None:
        call = self._call
        progress = call.push(char)
        if progress is Progress.MORE:
            return
        if call.has_started:
            self._spaces.clear()
            self._num_calls += 1
            self._is_after_call = True
            self._state = _State.CLOSE
        else:
            self._show(OPEN + call.raw)
            self._state = _State.CONTENT
        self._call = self._next_call()
        if progress is Progress.REJECTED:
            self._step(char)

    def _step_close(self, char: str) -> None:
        if char == CLOSE[self._num_matched]:
            self._num_matched += 1
            if self._num_matched == len(CLOSE):
                self._spaces.clear()
                self._num_matched = 0
                self._state = _State.CONTENT
        elif char in WHITESPACE and not self._num_matched:
            self._spaces.append(char)
        else:
            partial, self._num_matched = CLOSE[: self._num_matched], 0
            self._state = _State.CONTENT
            for held in partial + char:
                self._step_content(held)

    def _next_call(self) -> CallObject:
        return CallObject(self._num_calls, self._buffer, needs_arguments=False)
