"""A tokenizer of 256 tokens for tests: token id i is byte i."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nsa_serve.tokenizer import Tokenizer


def make_byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Return the byte-level BPE tokenizer without merges."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on.
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, chat_template=chat_template)
