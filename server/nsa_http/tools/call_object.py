"""One tool call written as a JSON object, read a character at a time.

`{"name": "f", "arguments": {...}}`, in any order; "parameters" is another name for "arguments",
and other keys are skipped. The arguments are passed on as they are written, so a client that
parses them sees the model's own mistakes.
"""

import enum
from json import JSONDecodeError, loads

from nsa_http.tools.events import EventBuffer

WHITESPACE = " \t\r\n"
_SCALAR_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")
_ARGUMENT_KEYS = ("arguments", "parameters")


class Progress(enum.Enum):
    """What a character was: part of the object, its end, or not of it (then it is not taken)."""

    MORE = enum.auto()
    DONE = enum.auto()
    REJECTED = enum.auto()


class _State(enum.Enum):
    START = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    COMMA = enum.auto()
    DONE = enum.auto()


class CallObject:
    """Reads the object of call `index` into `buffer`.

    needs_arguments: an object without arguments is no call; else its arguments are `{}`.
    """

    def __init__(self, index: int, buffer: EventBuffer, *, needs_arguments: bool) -> None:
        self.has_started = False
        self._index = index
        self._buffer = buffer
        self._needs_arguments = needs_arguments
        self._state = _State.START
        self._value: _Value | None = None
        self._key: str | None = None
        self._name: str | None = None
        self._has_arguments = False
        # The object's text until it is known to be a call, and arguments that came before the name.
        self._raw: list[str] = []
        self._early: list[str] = []

    @property
    def raw(self) -> str:
        """The text that was taken, while `has_started` is false."""
        return "".join(self._raw)

    def push(self, char: str) -> Progress:
        """Take the next character."""
        progress = self._in_value(char) if self._value is not None else self._between(char)
        if progress is not Progress.REJECTED and not self.has_started:
            self._raw.append(char)
        if progress is Progress.DONE:
            self._end()
        return progress

    def finish(self) -> None:
        """The answer ended inside the object: pass on what is there of the arguments."""
        value = self._value
        if self.has_started and value is not None and self._is_arguments:
            self._buffer.arguments(self._index, value.take())

    @property
    def _is_arguments(self) -> bool:
        return self._key in _ARGUMENT_KEYS

    def _between(self, char: str) -> Progress:
        state = self._state
        if char in WHITESPACE:
            return Progress.MORE
        if state is _State.START and char == "{":
            self._state = _State.KEY
        elif state is _State.KEY and char == '"':
            self._key = None
            self._value = _Value(char)
        elif state is _State.COLON and char == ":":
            self._state = _State.VALUE
        elif state is _State.COMMA and char == ",":
            self._state = _State.KEY
        elif state in (_State.KEY, _State.COMMA) and char == "}":
            self._state = _State.DONE
            return Progress.DONE
        elif state is _State.VALUE:
            return self._begin_value(char)
        else:
            return Progress.REJECTED
        return Progress.MORE

    def _begin_value(self, char: str) -> Progress:
        is_name = self._key == "name"
        if char not in '"{[' and (is_name or char not in _SCALAR_CHARS):
            return Progress.REJECTED
        if is_name and char != '"':
            return Progress.REJECTED
        if self._is_arguments and self._has_arguments:
            # Said twice: the first stands, since it may have been sent already.
            self._key = ""
        self._has_arguments |= self._is_arguments
        self._value = _Value(char)
        if self._is_arguments:
            self._start_if_known()
        return Progress.MORE

    def _in_value(self, char: str) -> Progress:
        value = self._value
        if value is None:
            return Progress.REJECTED
        if value.ends_before(char):
            self._end_value(value)
            return self._between(char)
        is_over = value.push(char)
        if self._is_arguments and not value.is_string:
            self._pass_on(value.take())
        if is_over:
            return self._end_value(value)
        return Progress.MORE

    def _end_value(self, value: "_Value") -> Progress:
        self._value = None
        if self._state is _State.KEY:
            key = value.decode()
            if key is None:
                return Progress.REJECTED
            self._key, self._state = key, _State.COLON
            return Progress.MORE
        self._state = _State.COMMA
        if self._is_arguments:
            text = value.take()
            self._pass_on(_unquote(text) if value.is_string else text)
        elif self._key == "name" and self._name is None:
            self._name = value.decode()
            if not self._name:
                return Progress.REJECTED
            if self._has_arguments:
                self._start_if_known()
        return Progress.MORE

    def _pass_on(self, text: str) -> None:
        if self.has_started:
            self._buffer.arguments(self._index, text)
        else:
            self._early.append(text)

    def _start_if_known(self) -> None:
        if self._name is None:
            return
        self.has_started = True
        self._buffer.start(self._index, self._name)
        self._buffer.arguments(self._index, "".join(self._early))
        self._early.clear()

    def _end(self) -> None:
        if not self.has_started and self._name is not None and not self._needs_arguments:
            self._early.append("{}")
            self._start_if_known()


class _Value:
    """The text of one JSON value. Brackets are counted, not matched."""

    def __init__(self, first: str) -> None:
        self.is_string = first == '"'
        self._is_scalar = first not in '"{['
        self._depth = 0 if self.is_string or self._is_scalar else 1
        self._in_string = self.is_string
        self._is_escaped = False
        self._pieces = [first]

    def ends_before(self, char: str) -> bool:
        """True when a number or a word ends, since `char` cannot be part of it."""
        return self._is_scalar and char not in _SCALAR_CHARS

    def push(self, char: str) -> bool:
        """Take a character; True when it is the value's last."""
        self._pieces.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            if char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
                return self.is_string
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def take(self) -> str:
        """Return the text that was not returned yet."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def decode(self) -> str | None:
        """Return what the string says, or None when it is not valid JSON."""
        return _decode("".join(self._pieces))


def _unquote(text: str) -> str:
    """Return the JSON that a string holds: some models write the arguments so."""
    decoded = _decode(text)
    return text if decoded is None else decoded or "{}"


def _decode(text: str) -> str | None:
    try:
        value = loads(text, strict=False)
    except JSONDecodeError:
        return None
    return value if isinstance(value, str) else None
