"""A tokenizer from the metadata of a GGUF file: byte-level BPE, as its converter found it.

The pre-tokenizers are named by `tokenizer.ggml.pre`; what the names mean is llama.cpp's table
(src/llama-vocab.cpp) and the tokenizer.json of the models they were named after.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nsa_serve.errors import ModelError
from nsa_serve.gguf_metadata import read_gguf_metadata

_PREFIX = "tokenizer."
_CONTROL_TYPE = 3
_USER_DEFINED_TYPE = 4
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Llama 3 and Qwen 2 differ in how many digits stand together.
_CASELESS_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """What a GGUF file says about its tokenizer.

    special_tokens: role ("bos_token", ...) -> text. add_bos, add_eos: whether encoding with special
    tokens adds them.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None
    add_bos: bool
    add_eos: bool


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    # A word that is a token as a whole is taken before merges are tried.
    ignore_merges: bool = False
    add_bos: bool = False


def _byte_level(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level(use_regex=True)])


def _splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, _byte_level(use_regex=False)])


_PRE_TOKENIZERS = {
    "smollm": _PreTokenizer(_smollm),
    "gpt-2": _PreTokenizer(lambda: _byte_level(use_regex=True)),
    "default": _PreTokenizer(
        lambda: _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
    ),
    "llama-bpe": _PreTokenizer(
        lambda: _splits(_CASELESS_WORDS.format(digits=r"\p{N}{1,3}")),
        ignore_merges=True,
        add_bos=True,
    ),
    "qwen2": _PreTokenizer(
        lambda: _splits(_CASELESS_WORDS.format(digits=r"\p{N}")), normalizer=normalizers.NFC
    ),
}


def read_gguf_tokenizer(path: str | Path) -> GGUFTokenizer:
    """Build the tokenizer that a GGUF file describes.

    Raises ModelError when a field is missing or inconsistent, or the tokenizer is of a kind that is
    not supported; the message names it.
    """
    metadata = _Metadata(path)
    model = metadata.get("ggml.model", str)
    if model != "gpt2":
        raise metadata.error(f"tokenizer.ggml.model is {model!r}; only 'gpt2' is supported")
    name = metadata.get("ggml.pre", str)
    if name not in _PRE_TOKENIZERS:
        raise metadata.error(
            f"tokenizer.ggml.pre is {name!r}; supported are {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    pre = _PRE_TOKENIZERS[name]
    tokens: list[str] = metadata.get("ggml.tokens", list)
    return GGUFTokenizer(
        backend=_build_backend(metadata, tokens, pre),
        special_tokens=_special_tokens(metadata, tokens),
        chat_template=metadata.find("chat_template", str),
        add_bos=metadata.find("ggml.add_bos_token", bool, default=pre.add_bos),
        add_eos=metadata.find("ggml.add_eos_token", bool, default=False),
    )


class _Metadata:
    """The `tokenizer.` keys of one file, with errors that name the file and the key."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._values = read_gguf_metadata(path, keys=[_PREFIX])

    def error(self, problem: str) -> ModelError:
        return ModelError(f"{self._path}: {problem}")

    def find(self, key: str, kind: type, *, default: Any = None) -> Any:
        value = self._values.get(_PREFIX + key, default)
        if value is not None and not isinstance(value, kind):
            raise self.error(f"{_PREFIX}{key} must be a {kind.__name__}, got {value!r:.80}")
        return value

    def get(self, key: str, kind: type) -> Any:
        value = self.find(key, kind)
        if value is None:
            raise self.error(f"{_PREFIX}{key} is missing; convert the model again")
        return value


def _build_backend(
    metadata: _Metadata, tokens: list[str], pre: _PreTokenizer
) -> tokenizers.Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise metadata.error("tokenizer.ggml.tokens has the same token twice")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("ggml.merges", list)]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise metadata.error(f"a merge must be two tokens, got {' '.join(wrong)!r}")
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    # The library raises nothing narrower.
    except Exception as error:
        raise metadata.error(f"tokenizer.ggml.merges does not fit the tokens: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, _token_types(metadata, tokens))
    return backend


def _token_types(metadata: _Metadata, tokens: list[str]) -> list[int]:
    types: list[int] = metadata.get("ggml.token_type", list)
    if len(types) != len(tokens):
        raise metadata.error(f"there are {len(tokens)} tokens, but {len(types)} token types")
    return types


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    typed = [(token, kind) for token, kind in zip(tokens, types, strict=True) if token]
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in typed if kind == _CONTROL_TYPE]
    )
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in typed
            if kind == _USER_DEFINED_TYPE
        ]
    )


def _special_tokens(metadata: _Metadata, tokens: list[str]) -> dict[str, str]:
    found = {}
    for role, key in _SPECIAL_TOKENS.items():
        token_id = metadata.find(f"ggml.{key}", int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise metadata.error(
                f"tokenizer.ggml.{key} is {token_id}, but there are {len(tokens)} tokens"
            )
        found[role] = tokens[token_id]
    return found
