"""Token arrays and the rows cut out of them."""

import json
import lzma
from pathlib import Path

import data
import numpy as np
import pytest

from nsa_serve.config import EngineConfig
from nsa_serve.model_source import load_tokenizer
from nsa_serve.tokenizer import Tokenizer

DOCUMENTS = [f"Document {i}.\n" + f"It says {i} again and again. " * (5 + 40 * i) for i in range(5)]
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still nobody at all."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EngineConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of five documents and one conversation, and a file that is to be left out."""
    root = tmp_path_factory.mktemp("corpus")
    text = "\n\n<|endoftext|>\n\n".join(DOCUMENTS)
    (root / "some.txt.xz").write_bytes(lzma.compress(text.encode()))
    (root / "heldout.txt").write_text("must never be read")
    chat = root / "chat.jsonl"
    chat.write_text(json.dumps({"messages": CHAT}) + "\n")
    out = root / "out"
    data.main(["--books", str(root), "--chat", str(chat), "--out", str(out), "--processes", "1"])
    return out


def test_arrays_hold_every_document_and_no_held_out_one(folder: Path, tokenizer: Tokenizer) -> None:
    corpus = data.open_corpus(folder)
    assert corpus.kinds == ("books", "chat", "retrieval")
    assert corpus.meta["kinds"]["books"]["files"] == ["some.txt.xz"]
    ids = np.lib.format.open_memmap(folder / "books.npy", mode="r")
    ends = np.lib.format.open_memmap(folder / "books.ends.npy", mode="r")
    parts = [part.tolist() for part in np.split(ids, ends)][:-1]
    texts = [tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    assert texts == [text.strip() for text in DOCUMENTS]


@pytest.mark.parametrize("length", [2, 63, 257, 1501])
def test_rows_are_whole_runs_of_documents(folder: Path, length: int) -> None:
    corpus = data.open_corpus(folder, tokens_per_batch=2 * length + 1)
    ids, weight = corpus.batch("books", length, np.random.default_rng(length))
    assert ids.shape == weight.shape == (2, length)
    assert ids.dtype == np.int64 and weight.dtype == np.float32
    assert not weight[:, 0].any() and (weight[:, 1:] == 1).all()
    flat = np.lib.format.open_memmap(folder / "books.npy", mode="r").tolist()
    ends = np.lib.format.open_memmap(folder / "books.ends.npy", mode="r").tolist()
    documents = [flat[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    for row in ids.tolist():
        runs: list[list[int]] = [[]]
        for token in row:
            if token == corpus.end_id:
                runs.append([])
            else:
                runs[-1].append(token)
        # All but the last are whole; a row that is one run may start anywhere.
        assert all(run in documents for run in runs[:-1])
        text = " ".join(map(str, runs[-1]))
        assert any(text in " ".join(map(str, document)) for document in documents)


def test_rows_follow_the_generator_alone(folder: Path) -> None:
    corpus = data.open_corpus(folder)
    for kind in corpus.kinds:
        first = corpus.batch(kind, 300, np.random.default_rng(7), batch_size=3)
        again = data.open_corpus(folder).batch(kind, 300, np.random.default_rng(7), batch_size=3)
        other = corpus.batch(kind, 300, np.random.default_rng(8), batch_size=3)
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
        assert kind == "chat" or not (first[0] == other[0]).all()


def test_chat_weighs_answers_only(tokenizer: Tokenizer) -> None:
    ids, weight = data.encode_chat(tokenizer, CHAT)
    assert weight is not None
    whole = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    assert ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)
    said = tokenizer.decode(ids[weight == 1].tolist(), skip_special_tokens=True)
    assert said.split("\n") == ["Nobody.", "Still nobody at all.", ""]


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"meta\.json is missing"):
        data.open_corpus(tmp_path)
    with pytest.raises(SystemExit, match="it has books, chat, retrieval"):
        data.open_corpus(folder).batch("text", 64, np.random.default_rng(0))
    with pytest.raises(SystemExit, match="does not exist"):
        data.find_files([tmp_path / "none"], skip="")
