"""From the text of one choice to reasoning, content and tool calls, streamed or whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from nsa_http import reasoning
from nsa_http.prompts import RenderedChat
from nsa_http.protocol import ChatBody
from nsa_http.reasoning import ThinkParser
from nsa_http.state import ServerState
from nsa_http.tools.definitions import ToolRequest
from nsa_http.tools.events import (
    CallStart,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolParser,
)
from nsa_http.tools.forced import NamedParser, RequiredParser
from nsa_http.tools.formats import ToolFormat, choose_format
from nsa_serve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers of one request are to be read.

    splits_reasoning: whether a reasoning block is told apart; is_block_open: the prompt began it;
    shows_reasoning: whether the client gets it. tool_format: the form of calls that the model may
    make of itself.
    """

    tools: ToolRequest
    tool_format: ToolFormat
    splits_reasoning: bool = False
    is_block_open: bool = False
    shows_reasoning: bool = True

    @property
    def reads_calls(self) -> bool:
        """True when the answer may hold tool calls."""
        return bool(self.tools.tools) and self.tools.choice.mode != "none"

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """True when a marker is a special token, which the text would otherwise not show."""
        markers: list[str] = []
        if self.reads_calls and not self.tools.is_forced:
            markers += self.tool_format.markers
        if self.splits_reasoning:
            markers += [reasoning.OPEN, reasoning.CLOSE]
        ids = [tokenizer.encode(marker, add_special_tokens=False) for marker in markers]
        return any(len(row) == 1 and tokenizer.is_special(row[0]) for row in ids)

    def finish_reason(self, reason: str | None, *, has_calls: bool) -> str | None:
        """Return what the client sees; "tool_calls" for calls the model chose, as OpenAI has it."""
        if reason == "stop" and has_calls and self.tools.choice.mode != "named":
            return "tool_calls"
        return reason


def make_format(
    state: ServerState,
    body: ChatBody,
    tools: ToolRequest,
    rendered: RenderedChat,
    *,
    is_constrained: bool,
) -> AnswerFormat:
    """Decide how to read the answers to `body`.

    is_constrained: the engine enforces a form from the first token on, so there is no reasoning.
    """
    template = state.tokenizer.chat_template or ""
    setting = state.config.reasoning_parser
    by_default = setting == "think" or (setting == "auto" and reasoning.OPEN in template)
    wanted = by_default if body.separate_reasoning is None else body.separate_reasoning
    return AnswerFormat(
        tools,
        choose_format(state.config.tool_call_parser, template),
        splits_reasoning=wanted and not is_constrained,
        is_block_open=rendered.is_block_open,
        shows_reasoning=body.include_reasoning is not False,
    )


class AnswerParser:
    """Reads one choice. Feed it every piece of text, then finish it."""

    def __init__(self, answer_format: AnswerFormat) -> None:
        self.has_calls = False
        self._format = answer_format
        self._think: ThinkParser | None = None
        self._tools: ToolParser | None = None
        if answer_format.splits_reasoning:
            self._think = ThinkParser(is_open=answer_format.is_block_open)
        if answer_format.reads_calls:
            self._tools = _make_tool_parser(answer_format)

    @property
    def is_reasoning(self) -> bool:
        """True inside a reasoning block."""
        return self._think is not None and self._think.is_reasoning

    def feed(self, text: str, *, is_last: bool) -> list[Event]:
        """Return what this text completes; with the last, everything that was held back."""
        if self._think is None and self._tools is None:
            return [ContentDelta(text)] if text else []
        if self._think is None:
            events: Sequence[Event] = [ContentDelta(text)] if text else []
        else:
            events = self._think.feed(text)
            if is_last:
                events = [*events, *self._think.finish()]
        if self._tools is not None:
            events = self._read_calls(self._tools, events)
            if is_last:
                events = [*events, *self._tools.finish()]
        kept = [event for event in events if self._is_kept(event)]
        self.has_calls |= any(isinstance(event, CallStart) for event in kept)
        return kept

    @staticmethod
    def _read_calls(parser: ToolParser, events: Sequence[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += parser.feed(event.text) if isinstance(event, ContentDelta) else [event]
        return found

    def _is_kept(self, event: Event) -> bool:
        if isinstance(event, ReasoningDelta):
            return self._format.shows_reasoning
        # parallel_tool_calls=false: the client wants the first call alone, as with vLLM.
        if isinstance(event, ContentDelta):
            return True
        return event.index == 0 or self._format.tools.allows_several


def _make_tool_parser(answer_format: AnswerFormat) -> ToolParser:
    choice = answer_format.tools.choice
    if choice.mode == "required":
        return RequiredParser()
    if choice.mode == "named" and choice.name is not None:
        return NamedParser(choice.name)
    return answer_format.tool_format.make_parser()
