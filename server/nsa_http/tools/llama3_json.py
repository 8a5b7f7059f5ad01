"""The Llama 3 form: the whole answer is `{"name": ..., "parameters": ...}`, or several with `;`.

`<|python_tag|>` may stand before the first. An answer that begins otherwise is content, and so is
an object without a name and parameters: it is JSON that the user asked for.
"""

import enum

from nsa_http.tools.call_object import WHITESPACE, CallObject, Progress
from nsa_http.tools.events import Event, EventBuffer

TAG = "<|python_tag|>"
SEPARATOR = ";"


class _State(enum.Enum):
    START = enum.auto()
    CALL = enum.auto()
    BETWEEN = enum.auto()
    CONTENT = enum.auto()


class Llama3JsonParser:
    """Implements `ToolParser`."""

    def __init__(self) -> None:
        self._buffer = EventBuffer()
        self._state = _State.START
        self._num_calls = 0
        self._call = self._next_call()
        # What came before a possible call, and how much of the tag or separator is in it.
        self._held: list[str] = []
        self._num_matched = 0

    def feed(self, text: str) -> list[Event]:
        """Return what this text completes."""
        for char in text:
            self._step(char)
        return self._buffer.take()

    def finish(self) -> list[Event]:
        """Return what was held back: the answer is over."""
        if self._state is _State.START:
            self._buffer.content("".join(self._held))
        elif self._state is _State.CALL:
            if not self._call.has_started:
                self._buffer.content("".join(self._held) + self._call.raw)
            self._call.finish()
        return self._buffer.take()

    def _step(self, char: str) -> None:
        if self._state is _State.CONTENT:
            self._buffer.content(char)
        elif self._state is _State.CALL:
            self._step_call(char)
        else:
            self._step_between(char)

    def _step_between(self, char: str) -> None:
        """Before a call: white space, the tag before the first, the separator before others."""
        is_first = self._state is _State.START
        mark = TAG if is_first else SEPARATOR
        is_in_mark = 0 < self._num_matched < len(mark)
        if self._num_matched < len(mark) and char == mark[self._num_matched]:
            self._num_matched += 1
        elif char == "{" and not is_in_mark and (is_first or self._num_matched):
            self._num_matched = 0
            self._state = _State.CALL
            self._call.push(char)
            return
        elif char not in WHITESPACE or is_in_mark:
            self._show("".join(self._held) + char)
            return
        self._held.append(char)

    def _step_call(self, char: str) -> None:
        call = self._call
        progress = call.push(char)
        if progress is Progress.MORE:
            return
        if not call.has_started:
            self._show("".join(self._held) + call.raw)
        else:
            self._held.clear()
            self._num_calls += 1
            self._call = self._next_call()
            self._state = _State.BETWEEN
        if progress is Progress.REJECTED:
            self._step(char)

    def _show(self, text: str) -> None:
        """Give up on calls: the rest of the answer is content."""
        self._buffer.content(text)
        self._held.clear()
        self._state = _State.CONTENT

    def _next_call(self) -> CallObject:
        return CallObject(self._num_calls, self._buffer, needs_arguments=True)
