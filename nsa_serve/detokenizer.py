"""Token ids to text as they come, and the stop strings in that text. Linear in the output."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from nsa_serve.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """One request's text, in pieces that together are `Tokenizer.decode` of all its tokens.

    Bytes that do not yet make a character wait; those that never will become U+FFFD.
    prompt_token_ids: what the output continues. A sentencepiece model's first token loses its space
    only when no text stands before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        prompt_token_ids: Iterable[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.byte_table
        self._skips_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_at_start = self._bytes.depends_on_start and not any(
            self._bytes.get(token_id)
            for token_id in prompt_token_ids
            if not (skip_special_tokens and tokenizer.is_special(token_id))
        )

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        if len(token_ids) == 1 and not self._is_at_start:
            # One token at a time is how text is streamed; it costs half as much this way.
            token_id = token_ids[0]
            if self._skips_special and self._tokenizer.is_special(token_id):
                return ""
            return self._decoder.decode(self._bytes.get(token_id))
        if self._skips_special:
            is_special = self._tokenizer.is_special
            token_ids = [token_id for token_id in token_ids if not is_special(token_id)]
        data, self._is_at_start = self._bytes.join(token_ids, at_start=self._is_at_start)
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Search for stop strings in text that comes in pieces (Aho-Corasick: each character once).

    The match that ends first wins; of those that end together, the longest. The answer does not
    depend on how the text is cut into pieces. Text is held back only while it may be the
    beginning of a stop string. include: a match stays in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._include = include
        # One state per prefix of a stop string; state 0 is the empty prefix.
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that is safe to show, and the stop string that was found, if any.

        After a match the text has ended: push no more.
        """
        if not self._next[0]:
            return text, None
        state = self._state
        for i, char in enumerate(text):
            while state and char not in self._next[state]:
                state = self._fail[state]
            state = self._next[state].get(char, 0)
            matched = self._match[state]
            if matched is not None:
                shown = self._held + text[: i + 1]
                self._held, self._state = "", 0
                return shown if self._include else shown[: -len(matched)], matched
        self._state = state
        held = self._held + text
        num_safe = len(held) - self._depth[state]
        self._held = held[num_safe:]
        return held[:num_safe], None

    def finish(self) -> str:
        """Return the text that was held back: it was not a stop string after all."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = self._next[state][char]
        self._match[state] = stop

    def _link(self) -> None:
        """Give each state the longest shorter suffix of its text that is a state as well."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                fail = self._fail[state]
                while fail and char not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(char, 0)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
                queue.append(child)
