"""A tokenizer for a preset, which has only a vocabulary size: bytes, and words for the rest."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nsa_serve.tokenizer import Tokenizer

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_preset_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """Return a byte-level tokenizer of a config.json's vocab_size and of its two special tokens.

    It has no merges, so text becomes bytes; a word stands for every other id, so that each that a
    model samples is text. Ids of beginning and end are bos_token_id and eos_token_id, which are the
    two last of the vocabulary.
    """
    vocab_size = config["vocab_size"]
    num_tokens = vocab_size - 2
    assert (config["bos_token_id"], config["eos_token_id"]) == (num_tokens, num_tokens + 1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    for index in range(len(vocab), num_tokens):
        # "\u0120" is a space in this alphabet.
        vocab[f"\u0120{_word(index)}"] = index
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (BEGIN, END)])
    return Tokenizer(
        backend,
        special_tokens={"bos_token": BEGIN, "eos_token": END},
        chat_template=_TEMPLATE,
        add_bos=True,
        add_eos=False,
    )


def _word(index: int) -> str:
    """Return a word of three letters or more, another for each index."""
    letters = ""
    while index or len(letters) < 3:
        index, letter = divmod(index, 26)
        letters += chr(ord("a") + letter)
    return letters
