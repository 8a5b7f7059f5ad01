"""Answers under tool_choice "required" or a named function: JSON that the engine enforces.

required: an array of `{"name": ..., "parameters": ...}`. A named function: its arguments alone.
"""

import enum
from collections.abc import Sequence
from typing import Any

from nsa_http.tools.call_object import WHITESPACE, CallObject, Progress
from nsa_http.tools.definitions import Tool
from nsa_http.tools.events import ArgumentsDelta, CallStart, Event, EventBuffer

# Under these keys of a schema stands data, where "$ref" is no reference.
_DATA_KEYS = frozenset({"const", "default", "enum", "example", "examples"})


def required_schema(tools: Sequence[Tool], *, allows_several: bool) -> dict[str, Any]:
    """Return the JSON schema of an answer that calls at least one of the tools."""
    alternatives = []
    for i, tool in enumerate(tools):
        base = f"#/items/anyOf/{i}/properties/parameters"
        alternatives.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool.name]},
                    "parameters": _move_refs(tool.parameters, base),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": alternatives}}
    if not allows_several:
        schema["maxItems"] = 1
    return schema


def _move_refs(schema: Any, base: str) -> Any:
    """Make references to the schema's own root find it at `base`."""
    if isinstance(schema, list):
        return [_move_refs(item, base) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = base + value[1:]
        else:
            moved[key] = value if key in _DATA_KEYS else _move_refs(value, base)
    return moved


class _State(enum.Enum):
    START = enum.auto()
    CALL = enum.auto()
    BETWEEN = enum.auto()
    CONTENT = enum.auto()


class RequiredParser:
    """Implements `ToolParser` for an array of calls. What is not one is content."""

    def __init__(self) -> None:
        self._buffer = EventBuffer()
        self._state = _State.START
        self._num_calls = 0
        self._call = self._next_call()

    def feed(self, text: str) -> list[Event]:
        """Return what this text completes."""
        for char in text:
            self._step(char)
        return self._buffer.take()

    def finish(self) -> list[Event]:
        """Return what was held back: the answer is over."""
        if self._state is _State.CALL:
            if not self._call.has_started:
                self._buffer.content(self._call.raw)
            self._call.finish()
        return self._buffer.take()

    def _step(self, char: str) -> None:
        match self._state:
            case _State.CONTENT:
                self._buffer.content(char)
            case _State.CALL:
                self._step_call(char)
            case _ if char in WHITESPACE:
                pass
            case _State.START if char == "[":
                self._state = _State.CALL
            case _State.BETWEEN if char == ",":
                self._state = _State.CALL
            case _State.BETWEEN if char == "]":
                self._state = _State.CONTENT
            case _:
                self._state = _State.CONTENT
                self._buffer.content(char)

    def _step_call(self, char: str) -> None:
        call = self._call
        progress = call.push(char)
        if progress is Progress.MORE:
            return
        if call.has_started:
            self._num_calls += 1
            self._state = _State.BETWEEN
        else:
            self._buffer.content(call.raw)
            self._state = _State.CONTENT
        self._call = self._next_call()
        if progress is Progress.REJECTED:
            self._step(char)

    def _next_call(self) -> CallObject:
        return CallObject(self._num_calls, self._buffer, needs_arguments=False)


class NamedParser:
    """Implements `ToolParser` for one call whose arguments are the answer."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Event]:
        """Return what this text completes."""
        events: list[Event] = []
        if text and self._name is not None:
            events.append(CallStart(0, self._name))
            self._name = None
        if text:
            events.append(ArgumentsDelta(0, text))
        return events

    def finish(self) -> list[Event]:
        """Return what was held back: nothing."""
        return []
