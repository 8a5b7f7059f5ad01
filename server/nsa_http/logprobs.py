"""Log-probabilities in OpenAI's two formats, and vLLM's for prompts."""

import codecs
from collections.abc import Sequence
from typing import Any

from nsa_serve.request import TokenLogprobs
from nsa_serve.tokenizer import Tokenizer

# JSON has no -inf; OpenAI writes this for tokens that cannot occur.
MIN_LOGPROB = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, items: Sequence[TokenLogprobs], *, as_token_ids: bool = False
) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice; tokens are "token_id:N" with as_token_ids."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _token_text(tokenizer, token_id, as_token_ids),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            {
                **entry(item.token_id, item.logprob),
                "top_logprobs": [entry(*pair) for pair in item.top],
            }
            for item in items
        ]
    }


def _token_text(tokenizer: Tokenizer, token_id: int, as_token_ids: bool) -> str:
    return f"token_id:{token_id}" if as_token_ids else tokenizer.token_to_str(token_id)


def prompt_logprobs(
    tokenizer: Tokenizer, items: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: null for the first token, then id -> its facts."""
    rows: list[dict[str, Any] | None] = [None]
    for item in items:
        ranked = [(i + 1, *pair) for i, pair in enumerate(item.top)]
        if all(token_id != item.token_id for _, token_id, _ in ranked):
            ranked.append((item.rank, item.token_id, item.logprob))
        rows.append(
            {
                str(token_id): {
                    "logprob": max(logprob, MIN_LOGPROB),
                    "rank": rank,
                    "decoded_token": tokenizer.token_to_str(token_id),
                }
                for rank, token_id, logprob in ranked
            }
        )
    return rows


class LegacyLogprobs:
    """The `logprobs` object of /v1/completions, over the deltas of one choice.

    text_offset counts characters of the returned text; a token that ends inside a character starts
    where that character starts. as_token_ids: tokens are "token_id:N", not text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, as_token_ids: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def add(
        self, token_ids: Sequence[int], items: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """Return the object for these tokens. An item is None for a prompt's first token."""
        return {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [
                None if item is None else max(item.logprob, MIN_LOGPROB) for item in items
            ],
            "top_logprobs": [None if item is None else self._top(item) for item in items],
            "text_offset": [self._advance(token_id) for token_id in token_ids],
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        pairs = list(item.top)
        if all(token_id != item.token_id for token_id, _ in pairs):
            pairs.append((item.token_id, item.logprob))
        top: dict[str, float] = {}
        for token_id, logprob in pairs:
            # Two ids may show as the same text: the likelier one comes first and stays.
            top.setdefault(self._text(token_id), max(logprob, MIN_LOGPROB))
        return top

    def _text(self, token_id: int) -> str:
        return _token_text(self._tokenizer, token_id, self._as_token_ids)

    def _advance(self, token_id: int) -> int:
        offset = self._num_chars
        if not (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            self._num_chars += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return offset
