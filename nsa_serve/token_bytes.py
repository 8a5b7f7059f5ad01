"""The bytes of each token, so that text can be put together in linear time.

A tokenizer's decoder is a small pipeline over token strings. The two pipelines that language models
use (byte-level BPE, and sentencepiece's ▁ with byte fallback) give each token the same bytes
wherever it stands, but for a space at the very start; so they come down to a table. Invalid UTF-8
becomes U+FFFD once per maximal subpart, in a stream as in one piece.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

from nsa_serve.errors import ModelError

_SUPPORTED = "ByteLevel, or Replace, Metaspace, ByteFallback, Fuse and a leading Strip"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Map GPT-2's 256 printable characters to the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


class TokenBytes:
    """What each token of one tokenizer contributes to the text.

    Raises ModelError when the tokenizer's decoder is not one that a table can stand for.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        self._backend = backend
        self._table: list[bytes | None] = [None] * vocab_size
        self._added = backend.get_added_tokens_decoder()
        self._alphabet: dict[str, int] = {}
        self._replacements: list[tuple[str, str]] = []
        self._has_byte_tokens = False
        self._metaspace: str | None = None
        self._strips_leading_space = False
        self._configure(_decoder_steps(backend))

    @property
    def depends_on_start(self) -> bool:
        """True when a token at the start of a text loses its leading space."""
        return self._strips_leading_space or self._metaspace is not None

    def get(self, token_id: int) -> bytes:
        """Return the token's bytes anywhere but at the start; b"" for an id without a token."""
        if not 0 <= token_id < len(self._table):
            return b""
        known = self._table[token_id]
        if known is None:
            text = self._backend.id_to_token(token_id)
            known = self._table[token_id] = b"" if text is None else self._bytes(token_id, text)
        return known

    def join(self, token_ids: Sequence[int], *, at_start: bool) -> tuple[bytes, bool]:
        """Return the bytes of `token_ids`, and whether the next token is still at the start."""
        if not at_start or not self.depends_on_start:
            return b"".join(map(self.get, token_ids)), at_start
        if self._metaspace is not None:
            return self._join_from_first_token(token_ids, self._metaspace)
        joined = b"".join(map(self.get, token_ids))
        return joined.removeprefix(b" "), not joined

    def _join_from_first_token(self, ids: Sequence[int], metaspace: str) -> tuple[bytes, bool]:
        for i, token_id in enumerate(ids):
            text = self._backend.id_to_token(token_id) if token_id < len(self._table) else None
            if text is not None:
                first = self._bytes(token_id, text.replace(metaspace, ""))
                return first + b"".join(map(self.get, ids[i + 1 :])), False
        return b"", True

    def _bytes(self, token_id: int, text: str) -> bytes:
        if self._alphabet:
            if token_id in self._added:
                return text.encode()
            try:
                return bytes(map(self._alphabet.__getitem__, text))
            except KeyError:
                return text.encode()
        byte_token = _BYTE_TOKEN.fullmatch(text) if self._has_byte_tokens else None
        if byte_token is not None:
            return bytes([int(byte_token[1], 16)])
        for old, new in self._replacements:
            text = text.replace(old, new)
        return text.encode()

    def _configure(self, steps: list[dict[str, Any]]) -> None:
        kinds = [step["type"] for step in steps]
        if "ByteLevel" in kinds:
            if set(kinds) - {"ByteLevel", "Fuse"}:
                raise _unsupported(" + ".join(kinds))
            self._alphabet = _byte_alphabet()
            return
        handlers: dict[str, Callable[[dict[str, Any], bool], None]] = {
            "Replace": self._add_replace,
            "Metaspace": self._add_metaspace,
            "ByteFallback": self._add_byte_fallback,
            "Strip": self._add_strip,
        }
        is_fused = False
        for step in steps:
            if step["type"] == "Fuse":
                is_fused = True
            elif step["type"] in handlers:
                handlers[step["type"]](step, is_fused)
            else:
                raise _unsupported(step["type"])

    def _add_replace(self, step: dict[str, Any], is_fused: bool) -> None:
        old = step["pattern"].get("String")
        # On fused text a longer pattern could match across tokens.
        if not old or (is_fused and len(old) > 1):
            raise _unsupported(json.dumps(step))
        self._replacements.append((old, step["content"]))

    def _add_metaspace(self, step: dict[str, Any], is_fused: bool) -> None:
        if is_fused:
            raise _unsupported("Metaspace after Fuse")
        self._replacements.append((step["replacement"], " "))
        if step.get("prepend_scheme", "always") != "never":
            self._metaspace = step["replacement"]

    def _add_byte_fallback(self, step: dict[str, Any], is_fused: bool) -> None:
        if is_fused:
            raise _unsupported("ByteFallback after Fuse")
        self._has_byte_tokens = True

    def _add_strip(self, step: dict[str, Any], is_fused: bool) -> None:
        is_leading = step["content"] == " " and step["stop"] == 0 and step["start"] in (0, 1)
        if not (is_leading and is_fused):
            raise _unsupported(json.dumps(step))
        self._strips_leading_space = step["start"] == 1


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        raise _unsupported("none")
    # The decoder's state is its section of tokenizer.json; to_str() would write the vocabulary too.
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return _flatten(state)


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for child in step["decoders"] for inner in _flatten(child)]


def _unsupported(decoder: str) -> ModelError:
    return ModelError(f"the tokenizer's decoder ({decoder}) is not supported; use {_SUPPORTED}")
