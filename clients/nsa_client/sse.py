"""Server-sent events: bytes to events, as the WHATWG HTML standard defines them (section 9.2.6)."""

from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event. last_event_id is the newest `id` seen in the stream so far."""

    data: str
    event: str = "message"
    last_event_id: str = ""


class SSEDecoder:
    """Decode a byte stream that may be cut anywhere, in time linear in its length.

    An event that the stream ends in the middle of is never returned, as the standard demands.
    The `retry` field is not kept: a completion cannot be resumed on another connection.
    """

    def __init__(self) -> None:
        self._tail: list[bytes] = []  # pieces of a line whose end has not come
        self._after_cr = False  # the last byte was CR: an LF now belongs to the same line end
        self._is_first_line = True
        self._data: list[str] = []
        self._event = ""
        self._last_event_id = ""

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Return the events that these bytes complete."""
        if not data:
            return []
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        events = []
        # bytes.splitlines knows CR, LF and CRLF only, exactly the standard's line ends.
        for line in data.splitlines(keepends=True):
            self._tail.append(line)
            if line[-1:] not in b"\r\n":
                break
            event = self._line(b"".join(self._tail).rstrip(b"\r\n"))
            self._tail.clear()
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, raw_value = line.partition(b":")
        value = raw_value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id" and "\0" not in value:
            self._last_event_id = value
        # Whatever else is a comment (empty name) or a field that the standard tells us to ignore.
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        event = None
        if self._data:
            event = ServerSentEvent(
                "\n".join(self._data), self._event or "message", self._last_event_id
            )
        self._data = []
        self._event = ""
        return event
