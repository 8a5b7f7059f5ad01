"""Reasoning blocks: `<think>...</think>` before the answer, told apart as the text comes."""

from nsa_http.tools.call_object import WHITESPACE
from nsa_http.tools.events import ContentDelta, Event, ReasoningDelta

OPEN = "<think>"
CLOSE = "</think>"


def is_block_open(text: str) -> bool:
    """True when a reasoning block has begun in `text` and not ended."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def ends_with_open(prompt: str) -> bool:
    """True when a prompt ends with the marker: the template began the block for the model."""
    return prompt.rstrip(WHITESPACE).endswith(OPEN)


class ThinkParser:
    """Splits an answer into reasoning and content; both keep their white space.

    is_open: the prompt has begun the block. Otherwise the answer has one only if it begins with
    it. Text is held back only while it may be a marker; how it is cut into pieces changes nothing.
    """

    def __init__(self, *, is_open: bool) -> None:
        self.is_reasoning = is_open
        self._is_at_start = not is_open
        # At the start: white space, then how much of the marker has come. In the block: its tail.
        self._spaces: list[str] = []
        self._num_matched = 0
        self._tail = ""

    def feed(self, text: str) -> list[Event]:
        """Return what this text completes."""
        if self._is_at_start:
            return self._feed_start(text)
        if self.is_reasoning:
            return self._feed_block(text)
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Event]:
        """Return what was held back: the answer is over."""
        if self.is_reasoning:
            return [ReasoningDelta(self._tail)] if self._tail else []
        held = "".join(self._spaces) + OPEN[: self._num_matched]
        return [ContentDelta(held)] if held else []

    def _feed_start(self, text: str) -> list[Event]:
        for i, char in enumerate(text):
            if char == OPEN[self._num_matched]:
                self._num_matched += 1
                if self._num_matched == len(OPEN):
                    self._is_at_start, self.is_reasoning = False, True
                    self._spaces.clear()
                    self._num_matched = 0
                    return self._feed_block(text[i + 1 :])
            elif char in WHITESPACE and not self._num_matched:
                self._spaces.append(char)
            else:
                held = "".join(self._spaces) + OPEN[: self._num_matched]
                self._is_at_start = False
                self._spaces.clear()
                self._num_matched = 0
                return [ContentDelta(held + text[i:])]
        return []

    def _feed_block(self, text: str) -> list[Event]:
        text = self._tail + text
        reasoning, marker, content = text.partition(CLOSE)
        self._tail = ""
        if marker:
            self.is_reasoning = False
        else:
            # `<` occurs in the marker once, so only the last one can begin it.
            start = text.rfind(CLOSE[0])
            if start >= 0 and CLOSE.startswith(text[start:]):
                reasoning, self._tail = text[:start], text[start:]
        events: list[Event] = [ReasoningDelta(reasoning)] if reasoning else []
        return [*events, ContentDelta(content)] if content else events
