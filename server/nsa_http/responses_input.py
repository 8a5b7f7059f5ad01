"""The items of a /v1/responses `input` become chat messages."""

from typing import Any

from nsa_http.protocol import MAX_MESSAGES
from nsa_serve.errors import RequestError

Message = dict[str, Any]

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def read_input(items: Any, instructions: str | None) -> list[Message]:
    """Return the messages. Raises RequestError."""
    reader = _Reader()
    if instructions:
        reader.messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise RequestError("input must be a string or an array of at least one item", param="input")
    if len(items) > MAX_MESSAGES:
        raise RequestError(
            f"input has {len(items)} items; at most {MAX_MESSAGES} are allowed", param="input"
        )
    for i, item in enumerate(items):
        reader.add(item, f"input.{i}")
    return reader.messages


class _Reader:
    """Puts what the model said in one turn (reasoning, text, calls) into one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        # The message of the model's turn, while nothing else has come.
        self._turn: Message | None = None

    def add(self, item: Any, where: str) -> None:
        """Read one item."""
        if not isinstance(item, dict):
            raise RequestError(f"{where} must be an object", param=where)
        kind = item.get("type", "message")
        match kind:
            case "message":
                self._add_message(item, where)
            case "function_call":
                self._add_call(item, where)
            case "function_call_output":
                self._append(
                    {
                        "role": "tool",
                        "tool_call_id": _text_field(item, "call_id", where),
                        "content": _text_of(item.get("output"), f"{where}.output"),
                    }
                )
            case "reasoning":
                self._add_reasoning(item, where)
            case _:
                raise RequestError(
                    f"{where}: items of type {str(kind)[:64]!r} are not supported; send message, "
                    "function_call, function_call_output or reasoning",
                    param=where,
                )

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise RequestError(
                f"{where}.role must be user, assistant, system or developer, "
                f"got {str(role)[:64]!r}",
                param=f"{where}.role",
            )
        text = _text_of(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._append({"role": _ROLES[role], "content": text})
        elif self._turn is not None and self._turn["content"] is None:
            self._turn["content"] = text
        else:
            self._begin_turn()["content"] = text

    def _add_call(self, item: dict[str, Any], where: str) -> None:
        call = {
            "id": _text_field(item, "call_id", where),
            "type": "function",
            "function": {
                "name": _text_field(item, "name", where),
                "arguments": _text_field(item, "arguments", where),
            },
        }
        turn = self._turn or self._begin_turn()
        turn.setdefault("tool_calls", []).append(call)

    def _add_reasoning(self, item: dict[str, Any], where: str) -> None:
        parts = item.get("content") or item.get("summary") or []
        text = _text_of(parts, f"{where}.content")
        if not text and item.get("encrypted_content"):
            raise RequestError(
                f"{where}: encrypted reasoning cannot be read here; leave the item out",
                param=where,
            )
        self._begin_turn()["reasoning"] = text

    def _append(self, message: Message) -> None:
        self._turn = None
        self.messages.append(message)

    def _begin_turn(self) -> Message:
        turn: Message = {"role": "assistant", "content": None}
        self.messages.append(turn)
        self._turn = turn
        return turn


def _text_field(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
    return value


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or an array of parts", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}.{i}: only parts of text are supported, with a string `text`; "
                f"got type {str(kind)[:64]!r}",
                param=f"{where}.{i}",
            )
        texts.append(part["text"])
    return "\n".join(texts)
