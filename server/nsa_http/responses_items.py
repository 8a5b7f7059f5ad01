"""The output items of a response, and the typed events that tell of them as they grow."""

import uuid
from collections.abc import Sequence
from typing import Any

from nsa_http.tools.events import ArgumentsDelta, CallStart, ContentDelta, Event

Item = dict[str, Any]
TypedEvent = dict[str, Any]


class OutputItems:
    """Grows items from the events of one answer; only the last one is open.

    Every method returns the typed events that are due, without their sequence numbers.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._is_open = False
        self._pieces: list[str] = []

    def add(self, event: Event, logprobs: Sequence[Any]) -> list[TypedEvent]:
        """Take over an event; logprobs: those of its tokens, kept where it is content."""
        match event:
            case CallStart():
                return self._open(_new_call(event.name))
            case ArgumentsDelta():
                self._pieces.append(event.text)
                return [self._event("response.function_call_arguments.delta", delta=event.text)]
            case ContentDelta():
                events = self._open_kind("message")
                self._part["logprobs"] += logprobs
                self._pieces.append(event.text)
                delta = self._event(
                    "response.output_text.delta",
                    content_index=0,
                    delta=event.text,
                    logprobs=list(logprobs),
                )
                return [*events, delta]
            case _:
                events = self._open_kind("reasoning")
                self._pieces.append(event.text)
                delta = self._event(
                    "response.reasoning_text.delta", content_index=0, delta=event.text
                )
                return [*events, delta]

    def close(self, status: str) -> list[TypedEvent]:
        """End the item that is open. status: "completed" or "incomplete"."""
        if not self._is_open:
            return []
        self._is_open = False
        text = "".join(self._pieces)
        self._pieces.clear()
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            done = self._event(
                "response.function_call_arguments.done", name=item["name"], arguments=text
            )
            return [done, self._item_event("response.output_item.done")]
        self._part["text"] = text
        facts = {"content_index": 0, "text": text}
        if item["type"] == "message":
            done = self._event(
                "response.output_text.done", **facts, logprobs=self._part["logprobs"]
            )
        else:
            done = self._event("response.reasoning_text.done", **facts)
        return [
            done,
            self._event("response.content_part.done", content_index=0, part=dict(self._part)),
            self._item_event("response.output_item.done"),
        ]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    def _open_kind(self, kind: str) -> list[TypedEvent]:
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        item: Item
        part: dict[str, Any]
        if kind == "message":
            item = {"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {
                "id": _new_id("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [],
                "encrypted_content": None,
            }
            part = {"type": "reasoning_text", "text": ""}
        events = self._open({**item, "status": "in_progress"})
        self.items[-1]["content"] = [part]
        added = self._event("response.content_part.added", content_index=0, part=_copy(part))
        return [*events, added]

    def _open(self, item: Item) -> list[TypedEvent]:
        events = self.close("completed")
        self.items.append(item)
        self._is_open = True
        return [*events, self._item_event("response.output_item.added")]

    def _event(self, kind: str, **facts: Any) -> TypedEvent:
        item = self.items[-1]
        return {
            "type": kind,
            "output_index": len(self.items) - 1,
            "item_id": item["id"],
            **facts,
        }

    def _item_event(self, kind: str) -> TypedEvent:
        return {"type": kind, "output_index": len(self.items) - 1, "item": _copy(self.items[-1])}


def _new_call(name: str) -> Item:
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "call_id": _new_id("call"),
        "name": name,
        "arguments": "",
        "status": "in_progress",
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Copy one level of lists: items grow after their event was made."""
    return {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
