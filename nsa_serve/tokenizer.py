"""Text to token ids and back, and the model's chat template."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nsa_serve.chat_template import ChatTemplate
from nsa_serve.errors import ModelError, RequestError
from nsa_serve.gguf_tokenizer import read_gguf_tokenizer
from nsa_serve.token_bytes import TokenBytes

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """One model's tokenizer: `tokenizers` encodes, a table of bytes decodes.

    special_tokens: role ("bos_token", "eos_token", ...) -> text. chat_template: Jinja text.
    add_bos, add_eos: what encoding with special tokens adds; None leaves it to the tokenizer's own
    post-processor. Raises ModelError when a token is missing or the decoder is not supported.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        _add_specials(backend, self._special_tokens.values())
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._bytes = TokenBytes(backend, self._vocab_size)
        self._bos_token_id = self._find("bos_token")
        self._eos_token_id = self._find("eos_token")
        self._special_ids = self._find_special_ids()
        self._affixes = self._find_affixes(add_bos, add_eos)
        self._template = (
            None if chat_template is None else ChatTemplate(chat_template, self._special_tokens)
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Load tokenizer.json and what lies beside it: tokenizer_config.json, chat_template.jinja.

        Raises ModelError when a file is missing or damaged.
        """
        folder = Path(path)
        backend = _load_backend(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        try:
            _add_configured_tokens(backend, config)
            special_tokens = _special_tokens(folder, config, backend)
            template = _read_template(folder, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}/tokenizer_config.json is damaged: {error!r}") from error
        return cls(
            backend,
            special_tokens=special_tokens,
            chat_template=template,
            add_bos=config.get("add_bos_token"),
            add_eos=config.get("add_eos_token"),
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Build the tokenizer from a GGUF file's metadata. Raises ModelError."""
        parts = read_gguf_tokenizer(path)
        return cls(
            parts.backend,
            special_tokens=parts.special_tokens,
            chat_template=parts.chat_template,
            add_bos=parts.add_bos,
            add_eos=parts.add_eos,
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model's embedding may be padded beyond it."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self._eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The template's Jinja text."""
        return None if self._template is None else self._template.source

    @property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template reads; none without a template."""
        return frozenset() if self._template is None else self._template.variables

    @property
    def byte_table(self) -> TokenBytes:
        """What the incremental detokenizer puts text together from."""
        return self._bytes

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; special tokens written in it become their ids.

        add_special_tokens: add what the model wants around a plain prompt, such as BOS. Raises
        RequestError for text that is not valid Unicode.
        """
        use_own = add_special_tokens and self._affixes is None
        try:
            # Not a batch of one: that would start the library's thread pool.
            ids: list[int] = self._backend.encode(text, add_special_tokens=use_own).ids
        except (TypeError, UnicodeEncodeError):
            raise _not_unicode([text]) from None
        return self._affix(ids) if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text, on all cores. Raises RequestError as `encode` does."""
        use_own = add_special_tokens and self._affixes is None
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=use_own)
        except (TypeError, UnicodeEncodeError):
            raise _not_unicode(texts) from None
        rows: list[list[int]] = [encoding.ids for encoding in encodings]
        return [self._affix(row) for row in rows] if add_special_tokens else rows

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `ids`, U+FFFD where its bytes are not UTF-8.

        An id without a token (a padded vocabulary has some) has no text.
        """
        shown = [i for i in ids if i not in self._special_ids] if skip_special_tokens else ids
        return self._bytes.join(shown, at_start=True)[0].decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes the token adds to a text; special tokens give their name."""
        return self._bytes.get(token_id)

    def token_to_str(self, token_id: int) -> str:
        """Return the token as text for display; part of a character shows as U+FFFD."""
        return self._bytes.get(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """True for tokens that mark structure, such as EOS."""
        return token_id in self._special_ids

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as a tokenizer.json, without its chat template."""
        self._backend.save(str(path))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: str | int | float | bool | None,
    ) -> str:
        """Write chat messages as the prompt the model was trained on; see `ChatTemplate.render`.

        The text holds its special tokens: encode it with add_special_tokens=False. kwargs set
        variables that the template reads. Raises RequestError.
        """
        if self._template is None:
            raise RequestError(
                "the model has no chat template, so it cannot take chat messages; "
                "send a plain prompt to /v1/completions",
                param="messages",
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=kwargs,
        )

    def _find(self, role: str) -> int | None:
        text = self._special_tokens.get(role)
        if text is None:
            return None
        token_id: int | None = self._backend.token_to_id(text)
        if token_id is None:
            raise ModelError(f"the tokenizer's {role} {text!r} is not in its vocabulary")
        return token_id

    def _find_special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder().items()
        ids = {token_id for token_id, token in added if token.special}
        named = map(self._backend.token_to_id, self._special_tokens.values())
        return frozenset(ids.union(token_id for token_id in named if token_id is not None))

    def _find_affixes(
        self, add_bos: bool | None, add_eos: bool | None
    ) -> tuple[list[int], list[int]] | None:
        """Return what to put around a prompt, or None when the post-processor does so itself."""
        own: list[int] = self._backend.encode("", add_special_tokens=True).ids
        # One token may be both BOS and EOS: standing alone, it is BOS.
        has_bos = own[:1] == [self._bos_token_id]
        has_eos = own[int(has_bos) :][-1:] == [self._eos_token_id]
        wants_bos = has_bos if add_bos is None else add_bos
        wants_eos = has_eos if add_eos is None else add_eos
        if (has_bos, has_eos) == (wants_bos, wants_eos):
            return None
        prefix = [self._require("bos_token", self._bos_token_id)] if wants_bos else []
        suffix = [self._require("eos_token", self._eos_token_id)] if wants_eos else []
        return prefix, suffix

    def _affix(self, ids: list[int]) -> list[int]:
        if self._affixes is None:
            return ids
        prefix, suffix = self._affixes
        return [*prefix, *ids, *suffix]

    @staticmethod
    def _require(role: str, token_id: int | None) -> int:
        if token_id is None:
            raise ModelError(f"the tokenizer is set to add a {role}, but has none")
        return token_id


def _not_unicode(texts: Sequence[str]) -> RequestError:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return RequestError(
                f"text must be valid Unicode; character {error.start} is a lone surrogate"
            )
    return RequestError("text must be a string")


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; save the model's tokenizer in the tokenizer.json format"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The library raises nothing narrower.
    except Exception as error:
        raise ModelError(f"{path} is not a tokenizer: {error}") from None
    # A saved tokenizer may still have training's limits; prompts are never cut or padded.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is not there is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"chat_template must be text, got {type(template).__name__}")
    return template


def _token_text(value: Any) -> str | None:
    """Read a token as tokenizer_config.json writes it: text, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _special_tokens(
    folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, str]:
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    texts = {role: _token_text(merged.get(role)) for role in _ROLES}
    found = {role: text for role, text in texts.items() if text is not None}
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name)
        for role in ("bos_token", "eos_token"):
            value = ids.get(f"{role}_id")
            token_id = value[0] if isinstance(value, list) and value else value
            if role not in found and isinstance(token_id, int):
                text = backend.id_to_token(token_id)
                if text is not None:
                    found[role] = text
    return found


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json has beyond tokenizer.json, under their ids."""
    entries = config.get("added_tokens_decoder", {})
    for key, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        options = {name: value for name, value in entry.items() if name != "__type"}
        token = AddedToken(**options)
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        actual = backend.token_to_id(token.content)
        if actual != int(key):
            raise ModelError(
                f"tokenizer_config.json gives {token.content!r} the id {key}, "
                f"but in tokenizer.json it is {actual}"
            )
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    texts = extra.values() if isinstance(extra, dict) else extra
    _add_specials(backend, filter(None, map(_token_text, texts)))


def _add_specials(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Mark tokens of the vocabulary as special, so that text is split at them."""
    known = [text for text in texts if backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True) for text in known])
