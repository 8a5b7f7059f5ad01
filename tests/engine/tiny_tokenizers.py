"""Small tokenizers of both kinds, trained on a few lines, and a folder or GGUF file of them."""

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from nsa_serve.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567 times; it's not the first time.",
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe: 10 m²",
    "素早い茶色の狐は、のろまな犬を飛び越える。敏捷的棕色狐狸跳过懒狗。",
    "Быстрая коричневая лиса 🦊 прыгает через ленивую собаку 🐕‍🦺",
]
TEXTS = [
    "the quick fox",
    "  two  spaces,\n\nnewlines\tand a tab ",
    "Ünïcödé, 日本語, العربية, हिन्दी, 한국어",
    "emoji: 🦊🐕‍🦺👩‍👩‍👧 and a flag 🇺🇳",
    "never seen: ↯⸘𝔘𓀀\x00\x7f",
    "",
]
SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@functools.cache
def byte_level_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("  added  ", special=False, normalized=False)])
    return backend.to_str()


@functools.cache
def metaspace_json(*, llama_style: bool) -> str:
    """A sentencepiece-like BPE with byte fallback.

    llama_style: Llama 2's pipelines instead of the Metaspace pre-tokenizer and decoder.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIALS.values(), *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    if llama_style:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    pipeline = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*pipeline, decoders.Strip(" ", 1, 0)]
        if llama_style
        else [decoders.ByteFallback(), decoders.Metaspace()]
    )
    backend.add_special_tokens(list(SPECIALS.values()))
    return backend.to_str()


def backend_of(kind: str) -> tokenizers.Tokenizer:
    """kind: "byte_level", "llama" or "metaspace". A fresh one: they can be changed."""
    text = (
        byte_level_json() if kind == "byte_level" else metaspace_json(llama_style=kind == "llama")
    )
    return tokenizers.Tokenizer.from_str(text)


def tokenizer_of(kind: str, **options: Any) -> Tokenizer:
    return Tokenizer(backend_of(kind), special_tokens=SPECIALS, **options)


def write_folder(
    folder: Path,
    backend: tokenizers.Tokenizer,
    *,
    config: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in (files or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def write_gguf(path: Path, **changes: Any) -> Path:
    """Write the byte-level tokenizer as GGUF metadata; `changes` set or (None) drop a key."""
    backend = backend_of("byte_level")
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(byte_level_json())["model"]["merges"]
    kinds = [3 if token in SPECIALS.values() else 4 if " " in token else 1 for token, _ in vocab]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [token for token, _ in vocab],
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in keys.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float64(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
